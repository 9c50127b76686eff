"""Methods in which global models teach at the client: rounds of a client, worked out by hand."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fedkd.data.batches import epoch_order
from fedkd.data.federation import build_federation
from fedkd.payloads import ClassWeights, TeacherWeights, Weights
from fedkd.seeds import Purpose, rng
from fedkd.students import build_student

FOUR = {
    "run__rounds": 4,
    "run__participation": 0.5,
    "client__epochs": 2,
    "proxy__server_labels": 40,
    "system__cohort": 3,
}


def received_model(models):
    return models[:1]


def mean_of_last_two(models):
    trained = models[:-1][:2]  # the oldest one is the initial model
    return [{name: sum(model[name] for model in trained) / len(trained) for name in trained[0]}] if trained else []


def last_two(models):
    return models[:-1][:2]


def kl(z, taught, temperature=1.0):
    p, log_q = (taught / temperature).softmax(1), (z / temperature).log_softmax(1)
    return (p * (p.log() - log_q)).sum(1).mean()


def not_true(z, y, taught, down):
    others = torch.tensor([[c for c in range(4) if c != label] for label in y.tolist()])
    return 0.8 * 2**2 * kl(z.gather(1, others), taught[0].gather(1, others), 2.0)


def from_the_mean(z, y, taught, down):
    return 0.5 * 2**2 * kl(z, taught[0], 2.0) if taught else 0.0


def from_each_as_voted(z, y, taught, down):
    if not taught:
        return 0.0
    votes = down.get(TeacherWeights).values
    assert len(votes) == len(taught)
    return sum(vote * 0.5 * 2**2 * kl(z, one, 2.0) for vote, one in zip(votes, taught, strict=True))


def weighed_by_class(z, y, taught, down):
    weights = 1.2 * (down.get(ClassWeights).values - 0.1).clamp(min=0)
    return ((weights * (taught[0] - z)) ** 2).sum(1).mean()


def weighed_by_class_and_sample(z, y, taught, down):
    right = taught[0].softmax(1)[torch.arange(len(y)), y]
    weights = 4 * (down.get(ClassWeights).values * (1 - (1 - right).sqrt())[:, None] - 0.05).clamp(min=0)
    return ((weights * (taught[0] - z)) ** 2).sum(1).mean()


GKD = {"buffer": 2, "coefficient": 0.5, "temperature": 2.0}
CASES = [
    ({"name": "fedntd", "beta": 0.8, "tau": 2.0}, received_model, not_true),
    ({"name": "fedgkd", **GKD}, mean_of_last_two, from_the_mean),
    ({"name": "fedgkd_vote", **GKD}, last_two, from_each_as_voted),
    ({"name": "fedcad", "m_max": 1.2}, received_model, weighed_by_class),
    ({"name": "fedssd", "m_max": 4.0, "threshold": 0.05}, received_model, weighed_by_class_and_sample),
]


@pytest.mark.parametrize("trainer", ["sequential", "vectorised"])
@pytest.mark.parametrize(("method", "teachers", "term"), CASES, ids=[case[0]["name"] for case in CASES])
def test_a_clients_rounds_by_hand(small, federate, tap_of, descend, method, teachers, term, trainer):
    """From the model received: cross-entropy and the method's term, towards models that stay as they were sent."""
    scenario, tap = small(method, **FOUR, system__trainer=trainer), tap_of()
    federate(scenario, mods=[tap])
    federation, seed = build_federation(scenario), scenario.run.seed
    train, everything = federation.train, np.arange(len(federation.train))

    def model_with(state):
        model = build_student(scenario, federation.dataset, "mlp")
        model.load_state_dict(state)
        return model

    models = []  # global ones, the newest first
    for round in (1, 2, 3, 4):
        models.insert(0, tap.of(round)[0].down.get(Weights).state)
        with torch.no_grad():
            all_taught = [model_with(one)(train.gather(everything).x).logits for one in teachers(models)]
        for passed in tap.of(round):
            own = np.asarray(federation.shards[passed.client].train)

            def trained(loss, passed=passed, own=own, round=round):
                draw = rng(seed, Purpose.BATCHES, round, passed.client)
                batches = [rows for _ in range(2) for rows in epoch_order(own, 16, draw)]
                model = model_with(passed.down.get(Weights).state)
                descend(model, train, everything, batches, loss)
                return model.state_dict()

            def loss(z, rows, y, passed=passed, all_taught=all_taught):
                taught = [logits[rows] for logits in all_taught]
                return F.cross_entropy(z, y) + term(z, y, taught, passed.down)

            uploaded, expected = passed.up.get(Weights).state, trained(loss)
            for name, tensor in expected.items():
                torch.testing.assert_close(uploaded[name], tensor, rtol=1e-4, atol=1e-5)
            if round == 4:  # what is taught matters
                plain = trained(lambda z, rows, y: F.cross_entropy(z, y))
                assert max(float((plain[name] - tensor).abs().max()) for name, tensor in expected.items()) > 1e-3
