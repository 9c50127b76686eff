"""FedGKT against its formulas, worked out in float64; logits by sample id, feature maps, and the pairs' accuracy."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flwr.app import Array, ArrayRecord

from fedkd import plugins, run
from fedkd.client.handlers import make_app
from fedkd.data.batches import Batch
from fedkd.data.federation import build_federation
from fedkd.engine import InlineGrid, Nodes
from fedkd.errors import KnowledgeError
from fedkd.models import Outputs
from fedkd.payloads import FeatureMaps, Knowledge, SampleKnowledge
from fedkd.server.features import FeatureStore
from fedkd.server.runtime import ServerRuntime
from fedkd.students import build_student
from fedkd.threads import one_thread
from strategies.fedgkt import PAIR, EdgeTraining, FedGKT

METHOD = {"name": "fedgkt", "server_epochs": 2, "server_batch_size": 16, "server_lr": 0.01}
IMAGES = {
    "models__student": "cnn",
    "models__options": {},
    "data__options": {"classes": 4, "train": 200, "test": 40, "shape": [8, 8]},
    "proxy__size": 20,
}
MAP = 16 * 4 * 4  # of the cnn's first stage on 8x8 images


def rounds_of(events):
    return [{k: v for k, v in e.items() if k != "seconds"} for e in events if e["event"] == "round"]


def softmax(logits):
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def numbers(seed, temperature):
    draw = np.random.default_rng(seed)
    student, teacher, labels = draw.normal(size=(3, 4)), draw.normal(size=(3, 4)), np.array([2, 0, 3])
    p, q = softmax(student / temperature), softmax(teacher / temperature)
    kl = temperature**2 * (q * np.log(q / p)).sum(1)
    ce = -np.log(softmax(student)[np.arange(3), labels])
    return torch.tensor(student), torch.tensor(teacher), torch.tensor(labels), kl, ce


def test_on_clients_alpha_weighs_the_distillation():
    student, teacher, labels, kl, ce = numbers(0, 2.0)
    targets, known = torch.zeros(10, 4).double(), torch.zeros(10).double()
    ids = torch.tensor([7, 2, 5])  # the sample with id 2 has no logits of the server yet
    targets[ids], known[ids] = teacher, torch.tensor([1.0, 0.0, 1.0]).double()
    local = EdgeTraining(FedGKT(alpha=0.5, temperature=2.0))
    batch = Batch(torch.zeros(3, 1), labels, ids)

    terms = local.loss({}, batch, Outputs(student, student), (), {"targets": targets, "known": known})

    assert float(terms["ce"]) == pytest.approx(ce.mean())
    assert float(terms["kd"]) == pytest.approx(0.5 * (kl[0] + kl[2]) / 3)


def test_on_the_server_alpha_weighs_the_cross_entropy():
    tail, client, labels, kl, ce = numbers(1, 3.0)
    loss = FedGKT(alpha=0.5, temperature=3.0).server_loss(tail, client, labels)
    assert float(loss) == pytest.approx(kl.mean() + 0.5 * ce.mean())


def test_preset_code_has_a_server_that_learns_from_labels_alone():
    tail, client, labels, _, ce = numbers(2, 3.0)
    method = FedGKT(alpha=0.5, **FedGKT.presets["code"])
    assert float(method.server_loss(tail, client, labels)) == pytest.approx(ce.mean())
    assert method.temperature == 3


def test_the_servers_loss_for_bf16_logits_is_computed_in_float32():
    tail, client, labels = (each[None] for each in (torch.tensor([1.0, -2.0, 3.0]), torch.zeros(3), torch.tensor(1)))
    loss = FedGKT(alpha=0.5, temperature=1.0).server_loss(tail.bfloat16(), client, labels)
    # Whole numbers are the same in bfloat16, their logarithms are not: it has two to three digits.
    norm = math.log(math.exp(1) + math.exp(-2) + math.exp(3))
    kl = math.log(1 / 3) + norm - (1 - 2 + 3) / 3
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(kl + 0.5 * (norm + 2), rel=1e-6)


def client_with(ids, method=None):
    """Return a client half and a student of ten samples, of which it owns some."""
    student = SimpleNamespace(
        data=range(10), num_classes=2, shard=SimpleNamespace(train=np.array(ids)), device=torch.device("cpu")
    )
    return EdgeTraining(method or FedGKT()), student


def test_logits_are_laid_out_by_sample_id_whatever_their_order():
    local, student = client_with([3, 5, 8])
    logits = torch.tensor([[8.0, 80.0], [3.0, 30.0]])
    aux = local.absorb(student, Knowledge.of(SampleKnowledge(torch.tensor([8, 3]), logits)))
    assert aux["targets"][torch.tensor([3, 8])].tolist() == [[3.0, 30.0], [8.0, 80.0]]
    assert aux["known"].nonzero().squeeze(1).tolist() == [3, 8]
    first = local.absorb(student, Knowledge())
    assert not first["known"].any() and first["targets"].shape == aux["targets"].shape  # cohorts stay alike


@pytest.mark.parametrize(
    ("ids", "logits", "reason"),
    [
        ([3, 4], torch.zeros(2, 2), "does not have"),
        ([3, 3], torch.zeros(2, 2), "named once"),
        ([3, 5], torch.zeros(2, 3), "wrong shape"),
        ([3, 5], torch.full((2, 2), math.nan), "NaN"),
        ([3, 5], torch.zeros(2, 2).double(), "float64"),
    ],
)
def test_clients_refuse_logits_that_are_not_about_their_samples(ids, logits, reason):
    local, student = client_with([3, 5, 8])
    with pytest.raises(KnowledgeError, match=reason):
        local.absorb(student, Knowledge.of(SampleKnowledge(torch.tensor(ids), logits)))


GOOD = {
    "ids": torch.tensor([4, 7]),
    "features": torch.zeros(2, 3, 2, 2),
    "logits": torch.zeros(2, 5),
    "labels": torch.tensor([0, 4]),
}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"ids": torch.tensor([4, 4])}, "named once"),
        ({"ids": torch.tensor([4])}, "counts 2"),
        ({"features": torch.zeros(2, 3, 2, 1)}, "wrong shape: feature maps"),
        ({"features": torch.full((2, 3, 2, 2), math.inf)}, "feature maps holds NaN or infinite"),
        ({"logits": torch.zeros(2, 4)}, "wrong shape: logits"),
        ({"logits": torch.full((2, 5), math.nan)}, "NaN"),
        ({"labels": torch.tensor([0, 5])}, "no classes"),
        ({"labels": torch.tensor([0, -1])}, "no classes"),
    ],
)
def test_feature_maps_that_do_not_fit_are_refused(change, reason):
    FeatureMaps(**GOOD).check(5, (3, 2, 2), 2)
    with pytest.raises(KnowledgeError, match=reason):
        FeatureMaps(**GOOD | change).check(5, (3, 2, 2), 2)


def test_own_samples_survive_the_wire():
    sent = Knowledge.of(FeatureMaps(**GOOD), SampleKnowledge(GOOD["ids"], GOOD["logits"]))
    records = sent.to_records()
    got = Knowledge.from_records(records)
    for name, value in GOOD.items():
        assert torch.equal(getattr(got.get(FeatureMaps), name), value)
    assert torch.equal(got.get(SampleKnowledge).ids, GOOD["ids"])
    assert sent.nbytes == {"feature-maps": 4 * 2 * 12 + 4 * 2 * 5 + 8 * 2, "sample-knowledge": 4 * 2 * 5 + 4 * 2}
    for kind, nbytes in sent.nbytes.items():
        assert nbytes == sum(a.numpy().nbytes for a in records.array_records[kind].values())
    changed = got.get(FeatureMaps).with_outputs(lambda values, space: values + (space == "logits"))
    assert torch.equal(changed.logits, GOOD["logits"] + 1) and torch.equal(changed.features, GOOD["features"])


def test_a_feature_store_gathers_what_came_in_memory_or_from_a_file():
    draw = torch.Generator().manual_seed(0)
    maps = [torch.randn(4, 2, 3, 3, generator=draw), torch.randn(5, 2, 3, 3, generator=draw), torch.randn(2, 7)]
    labels = [torch.arange(4), torch.arange(5), torch.arange(2)]
    held, filed = FeatureStore(), FeatureStore(in_memory=4 * 4 * 18)
    for store in (held, filed):
        rows = [store.add(*each).tolist() for each in zip(maps, labels, strict=True)]
        assert rows == [[0, 1, 2, 3], [4, 5, 6, 7, 8], [9, 10]]
        assert [group.tolist() for group in store.by_shape()] == [list(range(9)), [9, 10]]
        batch = store.gather(torch.tensor([8, 0, 5]))
        assert torch.equal(batch.x, torch.stack([maps[1][4], maps[0][0], maps[1][1]]))
        assert batch.y.tolist() == [4, 0, 1] and batch.ids.tolist() == [8, 0, 5]
        assert torch.equal(store.gather(np.array([10])).x, maps[2][1:])
    assert [isinstance(m, np.memmap) for m in filed._maps] == [False, True, True]


@pytest.fixture
def start(small):
    """Return a function that binds a strategy to a grid and yields both."""
    grids = []

    def make(scenario):
        clients = build_federation(scenario).num_clients
        grid = InlineGrid(lambda: make_app(scenario), Nodes.alike(clients))
        grids.append(grid.__enter__())
        strategy = plugins.make_strategy(scenario)
        strategy.bind(ServerRuntime(scenario, grid))
        return strategy

    yield make
    for grid in grids:
        grid.__exit__(None, None, None)


def test_a_pair_of_equal_halves_is_the_client_itself(start, small):
    """Before training the server has the same weights, so the tail behind a body is the whole model again."""
    strategy = start(small(METHOD, **IMAGES))
    pair = strategy.measure()[PAIR]
    own = strategy.evaluate_clients(strategy.server.federation.eligible, on="global")
    assert pair == own and pair["clients"] == 6
    with torch.no_grad():
        strategy.tail.head.weight.neg_()
    assert strategy.measure()[PAIR]["accuracy"] != own["accuracy"]  # it is the tail that is measured
    assert not strategy.server.traffic["down"]  # and that does not count as traffic


def test_clients_are_measured_on_their_own_data_with_the_tail(start, small):
    strategy = start(small(METHOD, **IMAGES, partition__test=0.3, run__evaluate_clients="all"))
    everybody = strategy.server.federation.eligible
    own = strategy.evaluate_clients(everybody, "local")
    with torch.no_grad():
        strategy.tail.head.weight.neg_()
    measured = strategy.evaluate()["predictors"]["clients-local"]
    assert measured == strategy.evaluate_clients(everybody, "local", strategy.deployed()) != own


@pytest.mark.parametrize("order", ["by-client", "mixed"])
def test_the_returned_logits_are_those_of_the_last_epoch_for_every_sample(start, small, order):
    scenario = small({**METHOD, "server_order": order, "server_epochs": 3}, **IMAGES)
    strategy = start(scenario)
    strategy.round, strategy.selected, strategy.distilled = 1, [0, 1, 4], {}
    said = []
    original, strategy.server_loss = strategy.server_loss, lambda *a: (said.append(a), original(*a))[1]

    strategy.train(strategy.selected, keep=False)
    uploaded, store = strategy.uploaded, strategy.store
    steps = strategy.order(np.random.default_rng(0))
    strategy.distill()

    sizes = {p: int(strategy.server.federation.sizes[p]) for p in strategy.selected}
    total = sum(sizes.values())
    assert sorted(np.concatenate(steps).tolist()) == sorted(list(range(total)) * 3)
    owners = [{next(p for p, (rows, _) in uploaded.items() if row in rows) for row in step} for step in steps]
    if order == "by-client":
        assert all(len(owner) == 1 for owner in owners)
        per_epoch = [next(iter(owner)) for owner in owners[: len(steps) // 3]]
        assert per_epoch == sorted(per_epoch)
    else:
        assert any(len(owner) > 1 for owner in owners)
    last = torch.cat([logits.detach() for logits, *_ in said[-len(said) // 3 :]])
    labels = torch.cat([y for *_, y in said[-len(said) // 3 :]])
    given = torch.cat([strategy.taught[p].logits for p in strategy.selected])
    assert torch.equal(last.sum(1).sort().values, given.sum(1).sort().values)
    for p, size in sizes.items():
        assert sorted(strategy.taught[p].ids.tolist()) == sorted(strategy.server.federation.shards[p].train.tolist())
        assert len(strategy.taught[p].ids) == size
    data = strategy.server.federation.train
    everything = torch.cat([own.ids for _, own in uploaded.values()])
    assert sorted(labels.tolist()) == sorted(np.asarray(data.labels)[everything.numpy()].tolist())
    assert len(store) == total


@pytest.mark.parametrize(("order", "norm"), [("by-client", "none"), ("mixed", "none"), ("by-client", "batch")])
def test_the_server_trains_and_tells_every_sample_as_in_plain_pytorch(start, small, order, norm):
    """With BatchNorm, batches of 7 leave out one of a client's 29 samples, another one in each epoch."""
    method = METHOD | {"alpha": 0.5, "temperature": 2.0, "server_weight_decay": 0.1}
    method |= {"server_order": order, "server_batch_size": 7, "server_epochs": 3}
    strategy = start(small(method, **IMAGES, models__norm=norm))
    strategy.round, strategy.selected, strategy.distilled = 1, [0, 1, 4], {}
    uploads, fuse = {}, strategy.fuse

    def noted(each):
        uploads[each.partition_id] = copy.deepcopy(each.knowledge.get(FeatureMaps))
        return each

    strategy.fuse = lambda received: fuse(map(noted, received))
    with one_thread():
        strategy.train(strategy.selected, keep=False)
        steps = strategy.order(np.random.default_rng(0))
        strategy.order = lambda rng: steps
        tail = copy.deepcopy(strategy.tail).train()
        strategy.distill()

        names = ("ids", "features", "logits", "labels")
        ids, x, taught, y = (torch.cat([getattr(maps, name) for maps in uploads.values()]) for name in names)
        optimizer = torch.optim.Adam(tail.parameters(), lr=0.01, weight_decay=0.1, amsgrad=True)
        said = {}
        for rows in map(torch.from_numpy, steps):
            z = tail(x[rows]).logits
            said |= dict(zip(ids[rows].tolist(), z.detach(), strict=True))
            log_p, log_q = (z / 2).log_softmax(1), (taught[rows] / 2).log_softmax(1)
            kl = (log_q.exp() * (log_q - log_p)).sum(1).mean()
            optimizer.zero_grad()
            (2**2 * kl + 0.5 * F.cross_entropy(z, y[rows])).backward()
            optimizer.step()

    last = ids[np.concatenate(steps[-len(steps) // 3 :])]
    assert len(ids) - len(last.unique()) == (norm == "batch")  # and that one has the logits of an epoch before
    assert sorted(uploads) == sorted(strategy.taught) == [0, 1, 4]
    for p, maps in uploads.items():
        told = strategy.taught[p]
        assert sorted(told.ids.tolist()) == sorted(maps.ids.tolist())
        torch.testing.assert_close(told.logits, torch.stack([said[i] for i in told.ids.tolist()]), rtol=1e-3, atol=1e-3)
    for name, tensor in strategy.tail.state_dict().items():
        torch.testing.assert_close(tensor, tail.state_dict()[name], rtol=1e-3, atol=1e-3)


def test_feature_maps_logits_and_labels_are_those_of_the_samples_they_are_said_to_be_of(small, federate, tap_of):
    """One image at a time through the client's model as it was after training, without augmentation."""
    scenario, tap = small(METHOD, **IMAGES, models__norm="batch", data__augment="flip", run__rounds=1), tap_of()
    federate(scenario, mods=[tap])
    federation = build_federation(scenario)
    passed = tap.of(1)[0]
    model, maps = build_student(scenario, federation.dataset, "cnn").eval(), passed.up.get(FeatureMaps)
    model.load_state_dict(passed.after)

    assert sorted(maps.ids.tolist()) == sorted(federation.shards[passed.client].train.tolist())
    with one_thread(), torch.no_grad():
        for i, features, logits, label in zip(maps.ids.tolist(), maps.features, maps.logits, maps.labels, strict=True):
            x = federation.train.gather([i]).x
            torch.testing.assert_close(features, model.body.stages[0](x)[0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(logits, model(x).logits[0], rtol=1e-4, atol=1e-5)
            assert label == federation.train.labels[i]


def test_measured_bytes_are_the_formulas(small, federate):
    _, events = federate(small(METHOD, **IMAGES, run__rounds=2, run__participation=1.0))
    one, two = rounds_of(events)
    samples = 200 - 20
    assert one["bytes_up"] == two["bytes_up"] == {"feature-maps": samples * (4 * MAP + 4 * 4 + 8)}
    assert one["bytes_down"] == {}
    assert two["bytes_down"] == {"sample-knowledge": samples * (4 * 4 + 4)}
    assert one["whose"] == PAIR and one["accuracy"] == one["predictors"][PAIR]["accuracy"]
    assert one["train"]["kd"] == 0 < two["train"]["kd"]


def test_with_alpha_zero_clients_train_alone(small, federate, tap_of):
    def models(strategy):
        tap = tap_of()
        federate(small(strategy, **IMAGES, client__steps=2), mods=[tap])
        return tap.models()

    method = {**METHOD, "server_epochs": 1}
    alone, zero, slight = models("local"), models({**method, "alpha": 0.0}), models({**method, "alpha": 1e-3})
    assert zero == alone != slight
    assert len(alone) == 3 * 4  # rounds, clients in each


@pytest.mark.parametrize("order", ["by-client", "mixed"])
def test_one_tail_serves_clients_of_different_models_on_digits(small, federate, order):
    scenario = small(
        {**METHOD, "server_order": order, "server_batch_size": 64},
        data__source="digits",
        data__options={},
        data__train_samples=300,
        data__test_samples=60,
        models__student=["mlp", "cnn", "resnet8"],
        models__server="resnet20",
        models__options={},
        client__steps=2,
        run__rounds=2,
    )
    strategy, events = federate(scenario)
    assert sorted(strategy.tail.adapters) == ["16x4x4", "200"]  # resnet8's maps are what resnet20 expects
    assert rounds_of(events)[-1]["received"] == 4


def test_batch_norm_leaves_out_a_batch_of_one(small, federate):
    method = {**METHOD, "server_batch_size": 7, "server_epochs": 1}
    strategy, _ = federate(small(method, **IMAGES, models__norm="batch", run__rounds=1, run__participation=1.0))
    sizes = strategy.server.federation.sizes
    for p, taught in strategy.taught.items():
        assert len(taught.ids) == sizes[p] - (sizes[p] % 7 == 1)


def spoiled(change):
    """Return a Flower mod that changes client 1's feature maps."""

    def mod(message, context, call_next):
        reply = call_next(message, context)
        if context.node_config["partition-id"] == 1 and message.metadata.message_type == "train":
            arrays = {k: a.numpy().copy() for k, a in reply.content["feature-maps"].items()}
            change(arrays)
            reply.content["feature-maps"] = ArrayRecord({k: Array(a) for k, a in arrays.items()})
        return reply

    return mod


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda a: a["features"].__setitem__(0, math.nan), "NaN"),
        (lambda a: a.update(features=a["features"][:, :2]), "wrong shape"),
        (lambda a: a.update(labels=a["labels"] + 4), "no classes"),
        (lambda a: a.update({k: v[:-1] for k, v in a.items()}), "counts"),
    ],
)
def test_uploads_that_cannot_be_used_are_refused_and_the_round_goes_on(small, federate, change, reason):
    scenario = small(METHOD, **IMAGES, run__rounds=1, run__participation=1.0)
    strategy, events = federate(scenario, [spoiled(change)])
    [refused] = [e for e in events if e["event"] == "refused"]
    assert refused["partition_id"] == 1 and reason in refused["reason"]
    assert rounds_of(events)[0]["received"] == 5 and 1 not in strategy.taught


class StopAfter(run.Listener):
    """Presses Ctrl-C in the middle of round 3."""

    def event(self, event):
        if event["event"] == "reply" and event["round"] == 3:
            raise KeyboardInterrupt


def test_a_resumed_run_has_the_same_metrics(small, tmp_path):
    scenario = small(METHOD, **IMAGES)
    whole = run.execute(scenario, out=tmp_path / "whole")
    with pytest.raises(run.RunInterrupted) as stopped:
        run.execute(scenario, out=tmp_path / "halves", listener=StopAfter())
    resumed = run.resume(stopped.value.folder)
    one, two = (rounds_of(run.read_metrics(result.folder)) for result in (whole, resumed))
    assert one == two and len(one) == 3
