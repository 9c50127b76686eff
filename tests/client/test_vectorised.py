"""Students trained together against students trained one by one: nothing but rounding may differ."""

import logging
import textwrap
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedkd import tapes
from fedkd.client import vectorised
from fedkd.client.handlers import REFUSED
from fedkd.losses import names
from fedkd.payloads import Knowledge, ProxyOutputs, Request, Weights

CLIENTS = 6
IMAGES = {
    "data__options": {"classes": 4, "train": 160, "test": 40, "shape": [8, 8]},
    "models__student": "cnn",
    "models__options": {"width": 0.5},
    "client__channels_last": False,  # the layout changes rounding more than the trainer does
}


@pytest.fixture(params=[vectorised.CACHED, 1], ids=["", "in-turn"])
def both(cohort, close, trained, monkeypatch, request):
    """Return a function that trains a scenario's clients both ways and checks that all agrees; it returns all.

    Steps are replayed wherever they can be, with all clients at once and with one after the other.
    """
    monkeypatch.setattr("fedkd.tapes.REPLAYS", 0)
    monkeypatch.setattr(vectorised, "CACHED", request.param)
    if request.param == 1:  # several gathers of a few batches, too
        monkeypatch.setattr(vectorised, "GATHERED", 4000)

    def run(scenario, rounds=1, tolerance=1e-5, clients=CLIENTS, **config):
        one_by_one = cohort(scenario).train(rounds, trainer="sequential", **config)
        assert trained == {"alone": rounds * clients}
        trained.clear()
        at_once = cohort(scenario).train(rounds, trainer="vectorised", **config)
        assert trained == {"together": rounds * clients}
        close(one_by_one, at_once, tolerance)
        return at_once

    return run


# --- optimisers, schedules, batches --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "client",
    [
        {},
        {"momentum": 0.9, "weight_decay": 1e-2},
        {"momentum": 0.9, "nesterov": True, "schedule": "cosine"},
        {"optimizer": "adam", "lr": 0.01},
        {"optimizer": "adam", "lr": 0.01, "weight_decay": 1e-2, "schedule": "linear", "lr_decay": 0.5},
        {"clip": 0.2},
        {"schedule": "linear", "lr_decay": 0.5},
    ],
    ids=["sgd", "decay", "nesterov", "adam", "adam-linear", "clip", "linear"],
)
@pytest.mark.parametrize("span", [{"epochs": 2}, {"steps": 7}], ids=["epochs", "steps"])
def test_every_optimiser_and_schedule_on_ragged_shards(small, both, client, span):
    both(small("fedavg", client={"batch_size": 16, "lr": 0.1} | client | span), rounds=2, tolerance=1e-4)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_shards_from_one_sample_up(small, both, optimizer):
    sizes = [1, 2, 15, 16, 17, 33, 64, 100]
    partition = {"name": "inner-dirichlet", "alpha": 0.5, "clients": 8, "options": {"partition_sizes": sizes}}
    client = {"epochs": 3, "batch_size": 16, "optimizer": optimizer, "lr": 0.01}
    scenario = small("fedavg", partition=partition, client=client | {"momentum": 0.5 * (optimizer == "sgd")},
                     data__options__train=310)  # fmt: skip
    replies = both(scenario, tolerance=1e-4, clients=8)[0][0]
    assert [int(reply["num-examples"]) for reply in replies] == sizes


def test_a_client_without_samples_is_left_as_it_was(small, cohort, trained):
    clients = cohort(small("fedavg", partition__name="dirichlet", partition__alpha=0.01, partition__clients=12))
    empty = [n for n, p in enumerate(clients.partitions) if not len(clients.federation.shards[p].train)]
    assert empty
    replies = clients.train(trainer="vectorised")[0][0]
    assert trained == {"together": 12}
    for number in empty:
        for name, tensor in clients.weights(noise=1).state.items():
            assert np.array_equal(replies[number][f"weights/{name}"], tensor.numpy())
        assert replies[number]["loss"] == 0.0


@given(st.lists(st.lists(st.integers(1, 4), max_size=6), max_size=8))
def test_a_schedule_takes_every_batch_once_in_each_clients_order(sizes):
    at, begun = [0] * len(sizes), Counter()
    for clients in vectorised.schedule(sizes):
        assert clients == sorted(set(clients)) != []
        assert len({sizes[client][at[client]] for client in clients}) == 1
        assert len({at[client] == 0 for client in clients}) == 1
        for client in clients:
            at[client] += 1
            begun[client] += 1
    assert at == [len(each) for each in sizes]


@pytest.mark.parametrize(
    ("clients", "sizes"),
    [(6, [6]), (12, [6, 6]), (25, [5] * 5), (10, [5, 5]), (13, [5, 4, 4]), (31, [6] + [5] * 5), (0, [])],
)
def test_parts_of_a_cohort_are_of_one_size_where_that_can_be_had(clients, sizes):
    # Six clients have as many bytes of weights as a part is allowed.
    steps = list(vectorised.schedule_in_parts([[4, 4]] * clients, vectorised.CACHED // 6))
    assert steps[::2] == steps[1::2] and [len(each) for each in steps[::2]] == sizes
    assert [client for each in steps[::2] for client in each] == list(range(clients))
    assert list(vectorised.schedule_in_parts([[4, 4]] * clients, 0)) == [list(range(clients))] * (2 * bool(clients))


def test_steps_are_replayed_for_clients_that_come_later_and_batches_of_any_size(small, cohort, close, monkeypatch):
    recorded, replayed = [], []
    record, replay = tapes.record, tapes.Tape.replay
    monkeypatch.setattr(tapes, "record", lambda *work: recorded.append(record(*work)) or recorded[-1])
    monkeypatch.setattr(tapes.Tape, "replay", lambda self, given: (replayed.append(self), replay(self, given)))
    monkeypatch.setattr(vectorised, "CACHED", 1)
    scenario = small("fd", partition={"name": "iid", "clients": 5}, client={"batch_size": 16, "epochs": 3, "lr": 0.1})
    with_tapes = cohort(scenario).train(trainer="vectorised")
    # A tape for full batches and one for the last, smaller ones; maybe one for those that begin a tally.
    assert None not in recorded and len(recorded) <= 3 and len(replayed) > 20
    assert len({id(tape) for tape in replayed}) == len(recorded)
    monkeypatch.setattr(tapes, "REPLAYS", 1000)
    close(cohort(scenario).train(trainer="vectorised"), with_tapes, 1e-5)
    assert len(recorded) <= 3


def test_a_schedule_waits_for_clients_that_need_the_same():
    # Two epochs of shards of 9, 10 and 12 samples in batches of 4: all full batches are taken by all three.
    sizes = [[4, 4, 1] * 2, [4, 4, 2] * 2, [4, 4, 4] * 2]
    taken = list(vectorised.schedule(sizes))
    assert taken.count([0, 1, 2]) == 4
    assert len(taken) == 10


# --- models, data, losses ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["mlp", "cnn", "resnet8"])
def test_every_kind_of_image_model(small, both, model):
    both(small("fedavg", **IMAGES | {"models__student": model, "models__options": {}}, client__steps=2))


def test_channels_last_is_for_one_model_at_a_time(small, both):
    both(small("fedavg", **IMAGES | {"client__channels_last": True}, client__steps=2))


@pytest.mark.parametrize("augment", ["flip", "crop-flip"])
def test_augmentation_draws_the_same(small, both, augment):
    both(small("fedavg", **IMAGES, data__augment=augment, client__epochs=2))


def test_half_precision(small, both):
    both(small("fedavg", **IMAGES, client__precision="bf16", client__steps=2), tolerance=1e-2)


def test_texts(small, both, tmp_path):
    draw = np.random.default_rng(0)
    tokens, labels = draw.integers(0, 50, (200, 7)), draw.integers(0, 3, 200)
    np.savez(tmp_path / "words.npz", x_train=tokens, y_train=labels, x_test=tokens[:20], y_test=labels[:20])
    both(small("fedavg", data={"source": "npz:words.npz", "folder": str(tmp_path), "options": {}},
               models__student="text", models__options={"dim": 8}, proxy__size=20))  # fmt: skip


@pytest.mark.parametrize("loss", names())
def test_every_term(small, both, loss):
    # A teacher that is not the student itself: some losses have a kink there, at which rounding decides.
    terms = [{"loss": loss, "weight": 0.5, "teacher": "own", "temperature": 2.0}, {"teacher": "ema:0.5"}]
    both(small("fedavg", **IMAGES, client__terms=terms, client__steps=3), rounds=2, tolerance=1e-4)


@pytest.mark.parametrize("teacher", ["global", "last:2", "ema:0.9", "own"])
def test_every_teacher_over_rounds(small, both, teacher):
    terms = [{"loss": "kd", "weight": 0.5, "teacher": teacher}, {"loss": "mse", "weight": 0.1, "teacher": teacher}]
    _, memory = both(small("fedavg", client__terms=terms), rounds=3)
    assert all(bool(kept) == (teacher in ("last:2", "own")) for kept in memory)


def test_a_moving_teacher_needs_nobody_who_was_trained_alone_before(small, cohort, trained):
    cohort(small("fedavg", client__terms=[{"teacher": "ema:0.9"}], run__seed=77)).train(trainer="vectorised")
    assert trained == {"together": CLIENTS}


def test_those_who_have_no_teacher_yet_learn_apart_from_those_who_have(small, cohort, trained):
    def train(trainer):
        clients = cohort(small("fedavg", client__terms=[{"teacher": "own"}]))
        known = Knowledge.of(clients.weights())
        each = [known if n % 2 else Knowledge.of() for n in range(CLIENTS)]  # half of them refuse the first round
        clients.ask(each, 1, trainer=trainer)
        replies = clients.ask(Knowledge.of(clients.weights(noise=1)), 2, trainer=trainer)
        return [reply.content["metrics"] for reply in replies]

    one_by_one, at_once = train("sequential"), train("vectorised")
    assert trained == {"alone": 9, "together": 9}
    assert ["kd" in metrics for metrics in at_once] == [False, True] * 3
    for before, after in zip(one_by_one, at_once, strict=True):
        assert dict(before) == pytest.approx(dict(after), rel=1e-4)


def test_a_teacher_that_differs_from_client_to_client(small, cohort, trained):
    def replies(trainer):
        clients = cohort(small("fedgkd"))
        teachers = [clients.weights(noise=number) for number in range(CLIENTS)]
        sent = clients.weights()
        each = [Knowledge.of(sent, Weights(one.state, one.arch, "teacher")) for one in teachers]
        return [reply.content["metrics"]["kd"] for reply in clients.ask(each, round=2, trainer=trainer)]

    one_by_one, at_once = replies("sequential"), replies("vectorised")
    assert trained == {"alone": CLIENTS, "together": CLIENTS}
    np.testing.assert_allclose(one_by_one, at_once, rtol=1e-4)
    assert len(set(one_by_one)) == CLIENTS


# --- methods -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["fedavg", "fedprox", "feddf", "fedgkd", "fedntd", "fd"])
def test_a_cohort_of_every_method(small, both, strategy):
    both(small(strategy), rounds=2)


def test_a_cohort_that_meets_twice_in_a_message(small, cohort, close, trained):
    """DS-FL's clients digest labels and then learn."""
    scenario = small({"name": "dsfl", "distill_epochs": 2, "distill_batch_size": 16})
    ids, draw = torch.arange(0, 60, 3), torch.Generator().manual_seed(0)
    labels = ProxyOutputs(ids, torch.rand(20, 4, generator=draw).softmax(1), "probs")

    def train(trainer):
        clients = cohort(scenario)
        first = clients.ask(Knowledge.of(Request(ids)), 1, trainer=trainer)
        second = clients.ask(Knowledge.of(Request(ids), labels), 2, trainer=trainer)
        return [reply.content["proxy-outputs"]["values"].numpy() for reply in first + second], [
            reply.content["metrics"]["digest"] for reply in second
        ]

    (one_by_one, digested), (at_once, digested_at_once) = train("sequential"), train("vectorised")
    assert trained == {"alone": 3 * CLIENTS, "together": 3 * CLIENTS}
    close(one_by_one, at_once)
    assert digested == pytest.approx(digested_at_once, rel=1e-4)


@pytest.mark.parametrize("strategy", ["fedavg", "fedprox", "feddf", "fedgkd", "fedntd", "dsfl", "fd"])
def test_every_method_from_end_to_end(small, federate, trained, strategy):
    faster = {"feddf": {"steps": 20, "batch_size": 16}, "dsfl": {"open_size": 40, "distill_epochs": 2}}
    made = {"name": strategy} | faster.get(strategy, {})

    def run(trainer):
        # Cohorts of three: the default width would put every client into one of its own.
        done, events = federate(small(made, system={"trainer": trainer, "cohort": 3}, run__participation=1.0))
        return done, [event for event in events if event["event"] == "round"]

    (alone, one_by_one), counts = run("sequential"), dict(trained)
    assert counts.keys() == {"alone"}
    trained.clear()
    together, at_once = run("vectorised")
    assert trained == {"together": counts["alone"]}

    for before, after in zip(one_by_one, at_once, strict=True):
        assert before["train"] == pytest.approx(after["train"], rel=1e-3, abs=1e-4)
        assert before["accuracy"] == pytest.approx(after["accuracy"], abs=0.021)  # two of 100 test samples
    for arch, state in alone.students.items():
        for name, tensor in state.items():
            torch.testing.assert_close(together.students[arch][name], tensor, rtol=1e-3, atol=1e-4)


def test_different_models_meet_their_like(small, federate, trained):
    models = {"models__student": ["mlp", "cnn"], "models__options": {}}
    system = {"trainer": "vectorised", "cohort": CLIENTS}
    scenario = small("fedavg", **IMAGES | models, system=system, run__participation=1.0, client__steps=2)
    together, _ = federate(scenario)
    assert trained == {"together": CLIENTS * 3}
    alone, _ = federate(scenario.model_copy(update={"system": small("fedavg").system}))
    for arch in ("mlp", "cnn"):
        for name, tensor in alone.students[arch].items():
            torch.testing.assert_close(together.students[arch][name], tensor, rtol=1e-4, atol=1e-5)


# --- what cannot be done together, and what goes wrong -------------------------------------------------------------


PLUGIN = '''
import torch
from torch import nn

from fedkd.client.local import LocalTraining
from fedkd.models import Outputs
from strategies.fedavg import FedAvg


def with_dropout(num_classes, input_shape, p=0.5):
    return nn.Sequential(nn.Flatten(), nn.Dropout(p), nn.Linear(input_shape[0], num_classes))


def hard_samples(out, target, batch, *, temperature):
    """Indexes with a boolean mask, for which there is no batching rule."""
    losses = nn.functional.cross_entropy(out.logits, batch.y, reduction="none")
    return losses[losses > losses.median()].sum()


class Stranger(nn.Module):
    def __init__(self, student):
        super().__init__()
        self.head = nn.Linear(12, student.num_classes)
        nn.init.ones_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x):
        return Outputs(self.head(x), x)


class Salted(LocalTraining):
    """What differs between clients is a number and no tensor."""

    def absorb(self, student, knowledge):
        super().absorb(student, knowledge)
        return {"salt": 0.01 * student.partition_id}

    def loss(self, params, batch, out, teachers, aux):
        return {"ce": super().loss(params, batch, out, teachers, aux)["ce"] * (1 + aux["salt"])}


class SaltedAvg(FedAvg):
    local = Salted


class Ragged(Salted):
    """What differs between clients has another length for each."""

    def absorb(self, student, knowledge):
        super().absorb(student, knowledge)
        return {"salt": torch.zeros(1 + student.partition_id)}

    def loss(self, params, batch, out, teachers, aux):
        return LocalTraining.loss(self, params, batch, out, teachers, aux)


class RaggedAvg(FedAvg):
    local = Ragged


class Picky(LocalTraining):
    """One client's loss cannot be computed."""

    def loss(self, params, batch, out, teachers, aux):
        if len(batch.y) == 1:
            raise ValueError("a batch of one")
        return super().loss(params, batch, out, teachers, aux)


class PickyAvg(FedAvg):
    local = Picky
'''


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    (tmp_path / "vectorised_plugin.py").write_text(textwrap.dedent(PLUGIN))
    monkeypatch.syspath_prepend(tmp_path)
    return "vectorised_plugin"


@pytest.fixture
def said(caplog):
    vectorised._say.cache_clear()
    caplog.set_level(logging.WARNING, logger="fedkd.client.vectorised")
    return caplog


@pytest.mark.parametrize(
    ("strategy", "changes", "reason"),
    [
        ("fedavg", IMAGES | {"models__norm": "batch"}, "buffers, such as BatchNorm's"),
        ("fedavg", {"models__student": "vectorised_plugin:with_dropout", "models__options": {}}, "dropout"),
        ("fedavg", {"client__terms": [{"loss": "vectorised_plugin:hard_samples"}]}, "RuntimeError: vmap"),
        ("fedavg", {"client__terms": [{"teacher": "vectorised_plugin:Stranger"}]}, "a teacher is no state"),
        ("vectorised_plugin:SaltedAvg", {}, "no tensors and differ"),
        ("vectorised_plugin:RaggedAvg", {}, "shapes differ"),
    ],
    ids=["batch-norm", "dropout", "loss", "teacher", "aux", "ragged-aux"],
)
def test_what_cannot_be_done_together_is_done_one_by_one(
    small, cohort, close, trained, plugin, said, strategy, changes, reason
):
    scenario = small(strategy, **changes)
    expected = cohort(scenario).train(2, trainer="sequential")
    trained.clear()
    close(cohort(scenario).train(2, trainer="vectorised"), expected, tolerance=0.0)
    assert trained == {"alone": 2 * CLIENTS}
    (record,) = said.records  # once, not for every cohort
    assert "trained one by one" in record.message and reason in record.message


def test_dropout_of_zero_is_none(small, both, plugin):
    both(small("fedavg", models__student=f"{plugin}:with_dropout", models__options={"p": 0.0}))


def test_one_client_is_no_cohort(small, cohort, trained, said):
    clients = cohort(small("fedavg"), partitions=[3])
    clients.train(trainer="vectorised")
    assert trained == {"alone": 1} and not said.records


def test_a_client_whose_loss_fails_harms_nobody(small, cohort, close, plugin, said):
    partition = {"name": "inner-dirichlet", "alpha": 5.0, "clients": 3, "options": {"partition_sizes": [17, 32, 16]}}
    scenario = small(f"{plugin}:PickyAvg", partition=partition, data__options__train=100, proxy__size=20)
    (replies,), _ = cohort(scenario).train(trainer="vectorised")
    assert "ValueError: a batch of one" in replies[0]
    (expected,), _ = cohort(scenario).train(trainer="sequential")
    close(replies[1:], expected[1:], tolerance=0.0)
    assert len(said.records) == 1


def test_clients_that_raise_or_refuse_harm_nobody(small, cohort, close, trained):
    def crash(message, context, call_next):
        if context.node_config["partition-id"] == 1:
            raise RuntimeError("crashed on the way in")
        reply = call_next(message, context)
        if context.node_config["partition-id"] == 2:
            raise RuntimeError("crashed on the way out")
        return reply

    def replies(mods, trainer):
        clients = cohort(small("fedavg"), mods=mods)
        good = Knowledge.of(clients.weights())
        broken = clients.weights()
        broken.state["head.bias"][0] = float("nan")
        each = [good, good, good, Knowledge.of(broken), Knowledge.of(Request(torch.arange(2))), good]
        return clients.ask(each, trainer=trainer)

    seen = replies([crash], "vectorised")
    assert trained == {"together": 3}  # clients 0, 2 and 5 met
    assert [reply.has_error() for reply in seen] == [False, True, True, True, True, False]
    assert "crashed on the way in" in seen[1].error.reason and "crashed on the way out" in seen[2].error.reason
    assert seen[3].error.code == seen[4].error.code == REFUSED
    expected = replies([], "sequential")
    for number in (0, 5):
        for name, array in expected[number].content["weights"].items():
            np.testing.assert_allclose(seen[number].content["weights"][name].numpy(), array.numpy(), atol=1e-5)


# --- settings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "config", "how"),
    [
        ("vectorised", {}, "together"),
        ("sequential", {}, "alone"),
        ("auto", {}, "alone"),
        ("auto", {"trainer": "vectorised"}, "together"),
        ("sequential", {"trainer": "vectorised"}, "together"),
        ("vectorised", {"trainer": "sequential"}, "alone"),
    ],
)
def test_the_message_overrides_the_scenario(small, cohort, trained, setting, config, how):
    cohort(small("fedavg", system__trainer=setting)).train(**config)
    assert trained == {how: CLIENTS}


@pytest.mark.parametrize("trainer", ["sequential", "vectorised"])
def test_steps_can_be_cut_for_measuring(small, cohort, close, trainer):
    scenario = small("fedavg", client__epochs=3)
    cut = cohort(scenario).train(trainer=trainer, **{"max-steps": 2})
    plain = cohort(small("fedavg", client__steps=2)).train(trainer="sequential")
    close(cut[0], plain[0])


def test_others_receive_what_was_sent(small, cohort):
    """What was received is shared memory: training must not write to it."""
    clients = cohort(small("fedprox", client={"momentum": 0.9, "terms": [{"teacher": "ema:0.5"}]}))
    sent = clients.weights()
    before = {name: tensor.clone() for name, tensor in sent.state.items()}
    for trainer in ("sequential", "vectorised"):
        clients.ask(Knowledge.of(sent), trainer=trainer)
        assert all(torch.equal(tensor, before[name]) for name, tensor in sent.state.items())


def test_queries_need_no_meeting(small, cohort, monkeypatch):
    clients = cohort(small("fedavg", system__trainer="vectorised"))
    monkeypatch.setattr("fedkd.engine.worker.meet", None)
    assert not any(reply.has_error() for reply in clients.ask(Knowledge.of(), kind="query"))
