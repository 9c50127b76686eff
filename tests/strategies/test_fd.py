"""FD: rounds of training towards the others' mean outputs by class, worked out by hand."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fedkd.data.batches import epoch_order
from fedkd.data.federation import build_federation
from fedkd.payloads import ClassOutputs
from fedkd.seeds import Purpose, rng
from fedkd.students import build_student

FEW = {
    "partition__alpha": 0.1,
    "run__participation": 0.5,
    "run__rounds": 4,
    "run__seed": 17,
    "client__epochs": 2,
    "system__trainer": "sequential",
}


def soft_ce(z, target):
    return -(target * z.log_softmax(1)).sum(1)


def kl_of_logits(z, target):
    return (target.softmax(1) * (target.log_softmax(1) - z.log_softmax(1))).sum(1)


PAPER = {"name": "fd", "gamma": 0.7}, "probs", 0.7, soft_ce, False
CODE = {"name": "fd", "preset": "code"}, "logits", 1.0, kl_of_logits, True


def mean_of(tables):
    """Return for every class the mean of its rows [C, C] over the tables that have it, and how many have it [C]."""
    means, owners = np.zeros((4, 4)), np.zeros(4)
    for c in range(4):
        rows = [table.means[c].double().numpy() for table in tables if table.counts[c] > 0]
        owners[c] = len(rows)
        if rows:
            means[c] = np.mean(rows, axis=0)
    return means, owners


@pytest.mark.parametrize(("method", "space", "gamma", "distance", "own_too"), [PAPER, CODE], ids=["paper", "code"])
def test_rounds_by_hand(small, federate, tap_of, descend, method, space, gamma, distance, own_too):
    """Clients train towards the mean of the latest tables and share the means of their outputs. In plain PyTorch."""
    scenario, tap = small(method, **FEW), tap_of()
    federate(scenario, mods=[tap])
    federation, seed = build_federation(scenario), scenario.run.seed
    models = [build_student(scenario, federation.dataset, "mlp") for _ in range(6)]

    tables, met = {}, set()
    for round in (1, 2, 3, 4):
        assert len(tap.of(round)) == 3
        for passed in tap.of(round):
            client, model = passed.client, models[passed.client]
            means, owners = mean_of([table for k, table in tables.items() if own_too or k != client])
            if round == 1:
                assert not passed.down.payloads
            else:
                sent = passed.down.get(ClassOutputs)
                assert sent.space == space and sent.counts.tolist() == owners.tolist()
                np.testing.assert_allclose(sent.means.numpy(), means, rtol=0, atol=1e-6)
                assert sent.present.tolist() == (owners > 0).tolist()

            targets, present = torch.tensor(means, dtype=torch.float32), torch.tensor(owners > 0).float()
            seen = []

            def loss(z, rows, y, targets=targets, present=present, seen=seen):
                out = z.detach()
                seen.append((out.softmax(1) if space == "probs" else out, y))
                return F.cross_entropy(z, y) + gamma * (present[y] * distance(z, targets[y])).sum() / len(y)

            own, draw = np.asarray(federation.shards[client].train), rng(seed, Purpose.BATCHES, round, client)
            batches = [rows for _ in range(2) for rows in epoch_order(own, 16, draw)]
            descend(model, federation.train, np.arange(len(federation.train)), batches, loss)
            for name, tensor in model.state_dict().items():
                torch.testing.assert_close(passed.after[name], tensor, rtol=1e-4, atol=1e-5)

            up = passed.up.get(ClassOutputs)
            outputs, labels = (torch.cat(parts) for parts in zip(*seen, strict=True))
            assert up.space == space and up.counts.tolist() == torch.bincount(labels, minlength=4).tolist()
            for c in range(4):
                row = outputs[labels == c].mean(0) if (labels == c).any() else torch.zeros(4)
                torch.testing.assert_close(up.means[c], row, rtol=1e-4, atol=1e-5)

            met |= {"nobody else"} if round > 1 and (owners[labels.numpy()] == 0).any() else set()
            met |= {"missing class"} if 0 in up.counts else set()
        now = {passed.client: passed.up.get(ClassOutputs) for passed in tap.of(round)}
        met |= {"absent"} if round < 4 and tables.keys() - now.keys() else set()
        met |= {"back"} if tables.keys() & now.keys() else set()
        tables |= now
    assert met == {"nobody else", "missing class", "absent", "back"}
