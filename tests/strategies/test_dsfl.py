"""DS-FL: rounds of digesting, training, predicting, sharpening and distilling, worked out by hand."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fedkd.data.batches import epoch_order
from fedkd.data.federation import build_federation
from fedkd.payloads import ProxyOutputs, Request
from fedkd.seeds import Purpose, rng
from fedkd.students import build_student

HYPER = {
    "name": "dsfl",
    "open_size": 30,
    "temperature": 0.2,
    "distill_epochs": 3,
    "distill_batch_size": 8,
    "server_lr": 0.07,
}
FOUR = {"partition__clients": 4, "run__participation": 1.0, "run__rounds": 2, "system__trainer": "sequential"}


def soft_ce(z, target):
    return -(target * z.log_softmax(1)).sum(1).mean()


def passes(rows, size, epochs, draw):
    return [batch for _ in range(epochs) for batch in epoch_order(rows, size, draw)]


def test_rounds_by_hand(small, federate, tap_of, descend):
    """Clients digest the last labels, train and predict; mean, softmax of mean / T, server. In plain PyTorch."""
    scenario, tap = small(HYPER, **FOUR, client__epochs=2), tap_of()
    strategy, events = federate(scenario, mods=[tap])
    federation, seed = build_federation(scenario), scenario.run.seed
    proxy, train, open_rows = federation.proxy.data, federation.train, np.arange(30)

    server, *models = (build_student(scenario, federation.dataset, "mlp") for _ in range(5))
    ids, labels = None, None
    for round in (1, 2):
        outputs, asked = [], tap.of(round)[0].down.get(Request).ids.numpy()
        for client, (model, passed) in enumerate(zip(models, tap.of(round), strict=True)):
            assert np.array_equal(passed.down.get(Request).ids, asked)
            if labels is not None:
                sent = passed.down.get(ProxyOutputs)
                assert sent.space == "probs" and np.array_equal(sent.ids, ids)
                torch.testing.assert_close(sent.values, labels, rtol=1e-4, atol=1e-5)
                batches = passes(open_rows, 8, 3, rng(seed, Purpose.DIGEST, round, client))
                descend(model, proxy, ids, batches, lambda z, rows, y, labels=labels: soft_ce(z, labels[rows]))
            own = np.asarray(federation.shards[client].train)
            batches = passes(own, 16, 2, rng(seed, Purpose.BATCHES, round, client))
            descend(model, train, np.arange(len(train)), batches, lambda z, rows, y: F.cross_entropy(z, y))
            for name, tensor in model.state_dict().items():
                torch.testing.assert_close(passed.after[name], tensor, rtol=1e-4, atol=1e-5)
            outputs.append(model(proxy.gather(asked).x).logits.softmax(1).detach())
            torch.testing.assert_close(passed.up.get(ProxyOutputs).values, outputs[-1], rtol=1e-4, atol=1e-5)
        ids, labels = asked, (torch.stack(outputs).mean(0) / 0.2).softmax(1)
        draw = rng(seed, Purpose.DISTILLATION, round)
        draw.integers(2**63)  # the seed of dropout
        batches = passes(open_rows, 8, 3, draw)
        descend(server, proxy, ids, batches, lambda z, rows, y, labels=labels: soft_ce(z, labels[rows]), lr=0.07)
    assert np.array_equal(strategy.labels.ids, ids)
    torch.testing.assert_close(strategy.labels.values, labels, rtol=1e-4, atol=1e-5)
    for name, tensor in server.state_dict().items():
        torch.testing.assert_close(strategy.students["mlp"][name], tensor, rtol=1e-4, atol=1e-5)
    right = server(federation.test.gather(np.arange(100)).x).logits.argmax(1).numpy() == federation.test.labels
    assert events[-1]["whose"] == "server" and events[-1]["accuracy"] == pytest.approx(right.mean())
