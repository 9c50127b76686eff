"""FedFTG: terms and weights by hand, the generator between rounds, label counts, resume."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fedkd.models import Outputs
from fedkd.models.generators import Generator
from fedkd.payloads import Knowledge, LabelCounts
from fedkd.server.generation import Generated
from strategies.fedftg import FedFTG

FAST = {"name": "fedftg", "iterations": 2, "batch_size": 12, "noise": 6, "width": 8}
IMAGES = {"classes": 4, "train": 160, "test": 40, "shape": [8, 8]}
BN = {"models__student": "cnn", "models__options": {"width": 0.25}, "models__norm": "batch", "data__options": IMAGES}
LN3 = math.log(3)


def rounds_of(events):
    return [{k: v for k, v in e.items() if k != "seconds"} for e in events if e["event"] == "round"]


def batch(student, teacher, y, weight):
    x, z = torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0], [2.0]])
    return Generated(x, z, torch.tensor(y), torch.tensor(student), torch.tensor(teacher), torch.tensor(weight))


# Softmax of (ln 3, 0) is (3/4, 1/4). Weights 0.5 and 0.2.
CASE = batch([[0.0, 0.0], [LN3, 0.0]], [[LN3, 0.0], [0.0, 0.0]], [0, 1], [0.5, 0.2])


def test_terms_of_the_paper_by_hand():
    terms = FedFTG(lambda_cls=2.0, lambda_dis=3.0).terms(CASE, clients=4)
    first = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    second = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert float(terms["disagreement"]) == pytest.approx(-(0.5 * first + 0.2 * second) / 2, rel=1e-5)
    ce = (-math.log(0.75) * 0.5 - math.log(0.5) * 0.2) / 2  # of the client on the labels
    assert float(terms["classification"]) == pytest.approx(2 * ce, rel=1e-5)
    # Two of four pairs differ: noise by 4, samples by 1.
    assert float(terms["diversity"]) == pytest.approx(3 * math.exp(-2 * 4 / 4) / 4, rel=1e-5)


def test_terms_of_the_released_code_by_hand():
    terms = FedFTG(disagreement="l1", weighted="means").terms(CASE, clients=1)
    assert float(terms["disagreement"]) == pytest.approx(-(0.5 * LN3 / 2 + 0.2 * LN3 / 2) / 2, rel=1e-5)
    ce = (-math.log(0.75) - math.log(0.5)) / 2
    assert float(terms["classification"]) == pytest.approx(ce * 0.35, rel=1e-5)


@pytest.mark.parametrize(("disagreement", "through_client"), [("kl", True), ("l1", False)])
def test_disagreement_is_zero_for_equal_models_and_which_gradients_it_has(disagreement, through_client):
    method = FedFTG(disagreement=disagreement)
    z = torch.randn(2, 3)
    same = Generated(torch.randn(2, 1), torch.randn(2, 1), torch.tensor([0, 1]), z, z.clone(), torch.ones(2))
    assert float(method.terms(same, 1)["disagreement"]) == pytest.approx(0, abs=1e-6)
    student, teacher = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    differ = Generated(same.x, same.noise, same.y, student, teacher, torch.ones(2))
    gap = method.terms(differ, 1)["disagreement"]
    assert float(gap.detach()) < 0  # which the generator makes smaller
    gap.backward()
    assert student.grad is not None and (teacher.grad is not None) == through_client


@pytest.mark.parametrize(("reduction", "factor"), [("batchmean", 1.0), ("mean_all", 0.5)])
def test_loss_of_the_average_by_hand(reduction, factor):
    target = torch.tensor([[0.75, 0.25], [0.5, 0.5]])
    loss = FedFTG(reduction=reduction).student_loss(torch.zeros(2, 2), target)
    kl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert float(loss) == pytest.approx(factor * kl / 2, rel=1e-5)


def test_presets(small):
    from fedkd import plugins

    code = plugins.make_strategy(small({"name": "fedftg", "preset": "code"}))
    assert (code.disagreement, code.weighted) == ("l1", "means")


def watched(monkeypatch):
    """Keep what `Alternation` was given in every round."""
    from fedkd.server import generation

    seen, original = [], generation.Alternation.run

    def spy(turns, *arguments):
        before = copy.deepcopy(turns.generator.state_dict())
        losses = original(turns, *arguments)
        seen.append((turns, before, copy.deepcopy(turns.generator.state_dict()), losses))
        return losses

    monkeypatch.setattr(generation.Alternation, "run", spy)
    return seen


def test_class_weights_labels_and_rates(small, federate, monkeypatch):
    seen = watched(monkeypatch)
    strategy, _ = federate(small(FAST, run__rounds=2))
    (first, begun, ended, _), (second, went_on, _, _) = seen
    federation = strategy.server.federation
    shards = [np.asarray(federation.shards[p].train) for p in strategy.selected]
    rows = np.stack([np.bincount(federation.dataset.y_train[shard], minlength=4) for shard in shards])
    np.testing.assert_array_equal(second.counts.numpy(), rows)
    total = rows.sum(0)
    np.testing.assert_allclose(second.alpha.numpy()[:, total > 0], rows[:, total > 0] / total[total > 0])
    for turns, decay in ((first, 1.0), (second, 0.998)):
        assert turns.tune.param_groups[0]["lr"] == pytest.approx(0.01 * decay)
        assert turns.descend.param_groups[0]["lr"] == pytest.approx(0.1 * decay)
    # The generator lives on.
    assert all(torch.equal(tensor, went_on[name]) for name, tensor in ended.items())
    assert any(not torch.equal(tensor, begun[name]) for name, tensor in ended.items())


class Linear(torch.nn.Module):
    """A linear classifier that tells training from evaluation mode."""

    def __init__(self, seed):
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.norm, self.head = torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 3)
        for tensor in (*self.head.parameters(), self.norm.running_mean):
            tensor.data.normal_(generator=draw)
        self.norm.running_var.uniform_(0.5, 2.0, generator=draw)

    def forward(self, x):
        return Outputs(self.head(self.norm(x)), x)


class LinearGenerator(Generator):
    """A linear generator that does so too, and remembers what its samples are made of."""

    def __init__(self):
        super().__init__(5, 3)
        self.norm, self.map, self.seen = torch.nn.BatchNorm1d(8, affine=False), torch.nn.Linear(8, 4), []
        for parameter in self.map.parameters():
            parameter.data.normal_(generator=torch.Generator().manual_seed(9))

    def forward(self, noise, labels):
        self.seen.append((noise, labels))
        return self.of(noise, labels)

    def of(self, noise, labels):
        return self.map(self.norm(torch.cat([noise, torch.eye(3)[labels]], dim=1)))


def fine_tune(method, average, generator, clients, counts):
    """Let a method fine-tune an average in round 3, with two clients that have so many samples of each class."""
    method.server = SimpleNamespace(  # type: ignore[assignment]
        seed=0,
        device=torch.device("cpu"),
        model=lambda arch, state=None: average,
        complete=lambda arch, state: dict(state),
        state_of=lambda model: model.state_dict(),
    )
    method.generator, method.round, method.distilled = generator, 3, {}
    method.counts = {p: torch.tensor(count) for p, count in zip((4, 8), counts, strict=True)}
    method.members = [  # type: ignore[assignment]
        SimpleNamespace(partition_id=p, arch="linear", state=client.state_dict())
        for p, client in zip((4, 8), clients, strict=True)
    ]
    method.students = {"linear": average.state_dict()}
    method.distill()


def test_labels_are_drawn_like_the_samples_of_the_selected_clients():
    generator = LinearGenerator()
    method = FedFTG(iterations=4, student_steps=1, batch_size=600)
    fine_tune(method, Linear(3), generator, [Linear(1).eval(), Linear(2).eval()], [[9, 1, 0], [1, 4, 0]])

    labels = torch.cat([y for _, y in generator.seen[::3]])  # twice a client's turn and once the average's
    assert labels.shape == (4 * 600,)
    shares = labels.bincount(minlength=3).double() / len(labels)
    assert shares.tolist() == pytest.approx([10 / 15, 5 / 15, 0], abs=0.03) and float(shares[2]) == 0


def test_two_iterations_by_hand(adam):
    clients, average, generator = [Linear(1).eval(), Linear(2).eval()], Linear(3), LinearGenerator()
    student, made = copy.deepcopy(average), copy.deepcopy(generator)
    method = FedFTG(iterations=2, student_steps=3, batch_size=7, lambda_cls=0.7, lambda_dis=2.0)
    fine_tune(method, average, generator, clients, [[6, 1, 0], [2, 3, 4]])

    # Twice a step for each client and samples for the average, of the same noise and labels.
    assert len(generator.seen) == 2 * (2 + 1) and method.distilled["linear"]["steps"] == 2 * 3
    draws = [generator.seen[i : i + 3] for i in (0, 3)]
    assert all(torch.equal(z, turn[0][0]) and torch.equal(y, turn[0][1]) for turn in draws for z, y in turn)
    assert not torch.equal(draws[0][0][0], draws[1][0][0])
    shares = torch.tensor([[6 / 8, 1 / 4, 0.0], [2 / 8, 3 / 4, 1.0]])
    tune, losses = adam(made.parameters()), []
    for (z, y), *_ in draws:
        alphas = shares[:, y]
        for client, alpha in zip(clients, alphas, strict=True):
            x = made.train().of(z, y)
            log_p, log_q = client(x).logits.log_softmax(1), student.eval()(x).logits.log_softmax(1)
            gap = (alpha * (log_p.exp() * (log_p - log_q)).sum(1)).sum() / 7
            fit = -(alpha * log_p[range(7), y]).sum() / 7
            alike = [(z[i] - z[j]).square().mean() * (x[i] - x[j]).abs().mean() for i in range(7) for j in range(7)]
            loss = -gap + 0.7 * fit + 2.0 * torch.exp(-sum(alike) / 49) / 2
            tune(torch.autograd.grad(loss, list(made.parameters())), 0.01 * 0.998**2)
        with torch.no_grad():
            x = made.eval().of(z, y)
            target = sum(alpha[:, None] * client(x).logits.softmax(1) for client, alpha in zip(clients, alphas))
        for _ in range(3):
            log_q = student.train()(x).logits.log_softmax(1)
            loss = (target * (target.log() - log_q)).sum() / (7 * 3)
            gradients = torch.autograd.grad(loss, list(student.parameters()))
            with torch.no_grad():
                for parameter, gradient in zip(student.parameters(), gradients, strict=True):
                    parameter -= 0.1 * 0.998**2 * (gradient + 1e-3 * parameter)
            losses.append(loss.item())
    for name, tensor in generator.state_dict().items():
        torch.testing.assert_close(tensor, made.state_dict()[name], rtol=1e-5, atol=2e-6)
    for name, tensor in student.state_dict().items():
        torch.testing.assert_close(method.students["linear"][name], tensor, rtol=1e-5, atol=2e-6)
    ends = [method.distilled["linear"][key] for key in ("loss_first", "loss_last")]
    assert ends == pytest.approx([losses[0], losses[-1]], rel=1e-4)


@pytest.mark.parametrize("buffers", ["all", "params_only"])
def test_without_iterations_it_is_fedavg(small, federate, buffers):
    idle, _ = federate(small(FAST | {"iterations": 0}, **BN, models__buffers=buffers))
    plain, _ = federate(small("fedavg", **BN, models__buffers=buffers))
    expected = plain.students["cnn"]
    assert idle.students["cnn"].keys() == expected.keys()
    assert ("body.stages.0.1.running_mean" in expected) == (buffers == "all")
    assert all(torch.equal(t, expected[n]) for n, t in idle.students["cnn"].items())


def test_one_client_has_nothing_to_teach(small, federate, monkeypatch):
    # Its model is the average, and its class weights are 1: the loss of the first step is the KL of equals.
    seen = watched(monkeypatch)
    federate(small(FAST, run__participation=0.01, run__rounds=1))
    [(turns, _, _, losses)] = seen
    assert len(turns.teachers) == 1 and losses[0] == pytest.approx(0, abs=1e-6)


def test_the_average_learns_to_agree_on_generated_samples(small, federate, monkeypatch):
    seen = watched(monkeypatch)
    fast = {"iterations": 1, "student_steps": 200, "batch_size": 40, "lr": 4.0, "weight_decay": 0.0}
    federate(small(FAST | fast, client__epochs=10, run__rounds=1))
    [(_, _, _, losses)] = seen
    assert losses[-1] < 0.75 * losses[0]


def test_label_counts_travel(small, federate):
    strategy, events = federate(small(FAST, run__rounds=2))
    theta = sum(tensor.nbytes for tensor in strategy.server.initial("mlp").values())
    for event in rounds_of(events):
        assert event["bytes_up"] == {"weights": 4 * theta, "label-counts": 4 * 4 * 4}
        assert event["bytes_down"] == {"weights": 4 * theta}
        assert event["distill"]["mlp"]["steps"] == 2 * 5


@pytest.mark.parametrize(
    ("counts", "reason"),
    [([1000, 0, 0, 0], "1000 samples"), ([0, 0, 0], "wrong classes"), ([-1, 1, 1, 1], "negative")],
)
def test_false_counts_are_refused_and_the_round_goes_on(small, federate, counts, reason):
    def mod(message, context, call_next):
        reply = call_next(message, context)
        if message.metadata.message_type == "train" and context.node_config["partition-id"] == 0:
            said = Knowledge.from_records(reply.content)
            said.payloads["label-counts"] = LabelCounts(torch.tensor(counts))
            reply.content = said.to_records(dict(reply.content.config_records["config"]))
        return reply

    _, events = federate(small(FAST, run__rounds=1, run__participation=1.0), mods=[mod])
    [refused] = [e for e in events if e["event"] == "refused"]
    assert refused["partition_id"] == 0 and reason in refused["reason"]
    assert rounds_of(events)[0]["received"] == 5


def test_a_resumed_run_has_the_same_bits(small, resumes):
    resumes(small(FAST))


@pytest.mark.parametrize("preset", ["paper", "code"])
def test_two_rounds_on_digits_with_batch_norm(small, federate, preset):
    scenario = small(
        FAST | {"preset": preset},
        data={"source": "digits", "train_samples": 400, "test_samples": 100, "options": {}},
        models__student="cnn",
        models__options={},
        models__norm="batch",
        run__rounds=2,
        proxy={"source": "none", "size": 0},
    )
    _, events = federate(scenario)
    assert len(rounds_of(events)) == 2 and math.isfinite(rounds_of(events)[-1]["distill"]["cnn"]["loss_last"])
