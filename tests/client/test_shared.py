"""One model for all clients of a process: everybody finds their own weights in it."""

import pytest
import torch
from flwr.app import Context, RecordDict

from fedkd.client import trainer
from fedkd.client.runtime import Runtime
from fedkd.errors import KnowledgeError
from fedkd.payloads import Weights
from fedkd.students import build_student
from fedkd.threads import one_thread


def students(scenario, count=2):
    runtime = Runtime(scenario)
    return runtime, [runtime.student(p, 1, Context(0, 0, {}, RecordDict(), {})) for p in range(count)]


def filled(student, value):
    return Weights({n: torch.full_like(t, value) for n, t in student.weights().state.items()}, student.arch)


def values(state):
    return {float(value) for tensor in state.values() for value in tensor.flatten()}


def test_students_take_turns_in_one_model(small):
    _, (one, two) = students(small("fedavg"))
    one.load(filled(one, 1.0))
    two.load(filled(two, 2.0))
    assert one.model is two.model
    with torch.no_grad():
        for parameter in one.model.parameters():
            parameter += 10
    assert values(two.model.state_dict()) == {2.0}
    assert values(one.weights().state) == values(one.state) == {11.0}
    assert values(one.model.state_dict()) == {11.0}
    assert values(two.weights().state) == {2.0}


def test_received_weights_are_not_copied_before_they_are_needed(small):
    _, (one, two) = students(small("fedavg"))
    sent = filled(one, 3.0)
    one.load(sent)
    assert all(one.state[name] is tensor for name, tensor in sent.state.items())
    one.model.train()
    two.model.train()
    assert all(one.state[name] is not tensor for name, tensor in sent.state.items())
    assert values(sent.state) == {3.0}


def test_weights_are_copies(small):
    _, (one, _) = students(small("fedavg"))
    sent = filled(one, 1.0)
    one.load(sent)
    for tensor in one.weights().state.values():
        tensor += 1
    assert values(one.state) == values(sent.state) == {1.0}


def test_weights_that_travel_are_copied_only_from_the_model_at_work(small):
    _, (one, _) = students(small("fedavg"))
    sent = filled(one, 1.0)
    one.load(sent)
    shared = one.weights(copy=False).state
    assert all(shared[name].data_ptr() == tensor.data_ptr() for name, tensor in sent.state.items())
    model = one.model
    leaving = one.weights(copy=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 10
    assert values(leaving.state) == values(sent.state) == {1.0}


def test_weights_for_all_clients_are_read_once_a_round(small, monkeypatch):
    runtime, (one, two) = students(small("fedavg"))
    read, check = [], Weights.check
    monkeypatch.setattr(Weights, "check", lambda self, like: (read.append(self), check(self, like)))
    sent = filled(one, 1.0)
    again = Weights({name: tensor.view_as(tensor) for name, tensor in sent.state.items()}, sent.arch)
    one.load(sent)
    two.load(again)
    assert len(read) == 1
    two.load(filled(two, 1.0))  # equal numbers in other memory
    assert len(read) == 2
    two.load(sent)
    with pytest.raises(KnowledgeError, match="unexpected"):
        two.load(Weights(sent.state | {"more": torch.ones(1)}, sent.arch))
    with pytest.raises(KnowledgeError, match="missing"):
        runtime.student(0, 0, Context(0, 0, {}, RecordDict(), {})).load(Weights({}, sent.arch))
    later = runtime.student(0, 2, Context(0, 0, {}, RecordDict(), {}))
    next(iter(sent.state.values())).fill_(float("nan"))
    with pytest.raises(KnowledgeError, match="NaN"):
        later.load(sent)


def test_loading_into_the_model_at_work_is_seen_by_who_holds_it(small):
    _, (one, _) = students(small("fedavg"))
    model = one.model
    one.load(filled(one, 5.0))
    assert values(model.state_dict()) == {5.0}


@pytest.mark.parametrize("client", [{"momentum": 0.9}, {"optimizer": "adam", "lr": 0.01}], ids=["momentum", "adam"])
def test_nothing_of_a_client_stays_in_the_optimiser(small, client):
    scenario = small("fedavg", client=client)
    runtime, (one, two) = students(scenario)
    for student in (one, two):
        with student:
            trainer.learn(student, runtime.local, {})
            after_another = student.weights().state
    fresh, (_, alone) = students(scenario)
    trainer.learn(alone, fresh.local, {})
    for name, tensor in alone.weights().state.items():
        assert torch.equal(tensor, after_another[name])
    assert not runtime._model("mlp")._optimizer.state
    assert all(parameter.grad is None for parameter in runtime._model("mlp").module.parameters())


def test_whoever_learns_twice_in_a_message_begins_anew(small):
    scenario = small("fedavg", client={"momentum": 0.9})
    runtime, (one, _) = students(scenario)
    trainer.learn(one, runtime.local, {})
    halfway = one.weights()
    trainer.learn(one, runtime.local, {})
    fresh, (two, _) = students(scenario)
    two.load(halfway)
    trainer.learn(two, fresh.local, {})
    for name, tensor in one.weights().state.items():
        assert torch.equal(tensor, two.weights().state[name])


def test_a_teacher_stands_still_while_students_come_and_go(small):
    _, (one, two) = students(small("fedavg"))
    x = one.data.gather(one.shard.train[:4]).x
    with torch.no_grad():
        teacher = one.frozen(one.weights().state)
        before = teacher(x).logits.clone()
        one.load(filled(one, 1.0))
        assert one.model(x).logits.ne(before).any()
        assert two.model(x).logits.equal(before)
    assert torch.equal(teacher(x).logits, before) and not teacher(x).logits.requires_grad


def test_a_teacher_has_the_buffers_that_its_student_had(small):
    images = {"classes": 4, "train": 200, "test": 40, "shape": [8, 8]}
    scenario = small("fedavg", models={"student": "cnn", "norm": "batch", "buffers": "params_only", "options": {}},
                     data__options=images)  # fmt: skip
    runtime, (one, _) = students(scenario)
    teacher = one.teach(one.weights())
    x = one.data.gather(one.shard.train[:8]).x
    before = teacher(x).logits
    trainer.learn(one, runtime.local, {})
    assert torch.equal(teacher(x).logits, before)
    assert "body.stages.0.1.running_mean" in teacher.state


@pytest.mark.parametrize("buffers", ["all", "params_only"])
def test_a_teacher_answers_as_a_model_in_evaluation_mode_and_stands_still(small, buffers):
    images = {"classes": 4, "train": 200, "test": 40, "shape": [8, 8]}
    models = {"student": "cnn", "norm": "batch", "buffers": buffers, "options": {"width": 0.25}}
    scenario = small("fedavg", models=models, data__options=images, client__steps=3)
    runtime, (one, _) = students(scenario)
    with one_thread():
        trainer.learn(one, runtime.local, {})  # running statistics are no longer those of the start
    alone = build_student(scenario, runtime.federation.dataset, "cnn").eval()
    alone.load_state_dict({name: tensor.clone() for name, tensor in one.state.items()})
    teacher, x = one.teach(one.weights()), one.data.gather(one.shard.train[:8]).x
    before = {name: tensor.clone() for name, tensor in teacher.state.items()}
    one.model.train()
    whole = teacher(x).logits
    torch.testing.assert_close(teacher(x[:3]).logits, whole[:3])  # who else is in the batch means nothing
    with torch.no_grad():
        torch.testing.assert_close(whole, alone(x).logits)
    assert teacher.state.keys() == before.keys() == alone.state_dict().keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state.items())


def test_a_hook_is_heard_from_the_next_training_on(small):
    runtime, (student, _) = students(small("fedavg"))
    trainer.learn(student, runtime.local, {})
    heard = []
    handle = student.model.head.register_forward_hook(lambda *args: heard.append(1))
    trainer.learn(student, runtime.local, {})
    assert heard
    handle.remove()
    heard.clear()
    trainer.learn(student, runtime.local, {})
    assert not heard
