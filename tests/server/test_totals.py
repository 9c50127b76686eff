"""Sums of uploads: made in parts on workers or in one go on the server, the bits and the accounts are the same."""

import copy
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from flwr.app import Array
from hypothesis import given
from hypothesis import strategies as st

from fedkd.cohorts import Parts
from fedkd.engine import InlineGrid
from fedkd.errors import KnowledgeError
from fedkd.payloads import Knowledge, LabelCounts, ProxyOutputs, Weights
from fedkd.server.averaging import Averages, StateMean
from fedkd.server.runtime import ServerRuntime
from fedkd.server.totals import LabelTable, OutputMeans, Several
from fedkd.server.uploads import ALONE, Place, Upload, sum_up


def upload(partition, value, examples=1, cohort=ALONE, arch="mlp"):
    state = {"w": torch.tensor([value], dtype=torch.float32), "n": torch.tensor(partition)}
    return SimpleNamespace(partition_id=partition, state=state, num_examples=examples, cohort=cohort, arch=arch)


def merged(part, other):
    part.merge(other)
    return part


def test_cohorts_are_summed_by_themselves_and_merged_in_order():
    # Two architectures whose clients alternate.
    values = [0.1, 0.7, 0.3, 0.9, 0.11, 0.13, 0.17, 0.19]
    places = [Place(0, 2), Place(1, 6), Place(2, 3), Place(3, 7)]
    cohort = {p: places[2 * (p % 2) + p // 4] for p in range(8)}
    uploads = [upload(p, v, p + 1, cohort[p], "a" if p % 2 == 0 else "b") for p, v in enumerate(values)]

    averages = sum_up(iter(uploads), Averages()).result()
    for arch, mine in (("a", (0, 2, 4, 6)), ("b", (1, 3, 5, 7))):
        x = {p: float(np.float32(values[p])) for p in mine}
        first = x[mine[0]] * (mine[0] + 1) + x[mine[1]] * (mine[1] + 1)
        second = x[mine[2]] * (mine[2] + 1) + x[mine[3]] * (mine[3] + 1)
        expected = (first + second) / sum(p + 1 for p in mine)
        assert averages[arch]["w"].item() == np.float32(expected)


@given(st.lists(st.tuples(st.floats(-1e3, 1e3, width=32), st.integers(1, 50)), min_size=1, max_size=12), st.data())
def test_parts_that_travelled_give_the_bits_of_the_sum_at_home(clients, data):
    ends = sorted(data.draw(st.sets(st.integers(0, len(clients) - 1))) | {len(clients) - 1})
    places = [Place(number, end) for number, end in enumerate(ends)]
    cohorts = [next(place for place in places if place.end >= p) for p in range(len(clients))]
    uploads = [upload(p, v, n, cohorts[p]) for p, (v, n) in enumerate(clients)]

    at_home = sum_up(iter(uploads), Averages())
    parts = Parts(merged)
    for place in data.draw(st.permutations(places)):
        part = Averages()
        part.add_all([one for one in uploads if one.cohort == place])
        parts.add(place.number, pickle.loads(pickle.dumps(part)))
    travelled = parts.result()
    assert torch.equal(travelled.result()["mlp"]["w"], at_home.result()["mlp"]["w"])
    if len(clients) == 1:
        assert travelled.result()["mlp"]["w"].item() == clients[0][0]  # a mean of one keeps its bits


def test_merging_nothing_changes_nothing():
    mean, empty = StateMean("m"), StateMean("m")
    mean.add({"w": torch.tensor([2.0])}, 3.0)
    mean.merge(empty)
    empty.merge(mean)
    assert empty.result()["w"].item() == mean.result()["w"].item() == 2.0


def test_states_that_do_not_fit_are_refused_when_merged():
    one, other = StateMean("m"), StateMean("m")
    one.add({"w": torch.zeros(1)})
    other.add({"v": torch.zeros(1)})
    with pytest.raises(KnowledgeError, match="different entries"):
        one.merge(other)


def test_means_of_outputs_are_checked_and_exact():
    ids = torch.tensor([4, 7])
    total = OutputMeans(ids, 2, "probs")

    def sent(values, ids=ids):
        knowledge = Knowledge.of(ProxyOutputs(ids, torch.tensor(values), "probs"), num_examples=1)
        return Upload(0, "mlp", knowledge, None)  # type: ignore[arg-type]

    total.check(sent([[0.5, 0.5], [1.0, 0.0]]))
    with pytest.raises(KnowledgeError):
        total.check(sent([[0.5, 0.5], [1.0, 0.0]], torch.tensor([4, 8])))
    other = copy.deepcopy(total)
    total.add(sent([[0.5, 0.5], [1.0, 0.0]]))
    other.add(sent([[0.25, 0.75], [0.0, 1.0]]))
    other.add(sent([[0.0, 1.0], [0.5, 0.5]]))
    total.merge(other)
    assert total.result().tolist() == [[0.25, 0.75], [0.5, 0.5]]
    with pytest.raises(KnowledgeError, match="no uploads"):
        OutputMeans(ids, 2, "probs").result()


def nan_of(partition):
    """Mod: one client uploads a NaN, another one claims more examples than it has."""

    def mod(message, context, call_next):
        reply = call_next(message, context)
        if context.node_config["partition-id"] == partition:
            for record in reply.content.array_records.values():
                name, array = list(record.items())[-1]
                record[name] = Array(np.full(array.shape, np.nan, np.float32))
        if context.node_config["partition-id"] == partition + 2:
            reply.content["metrics"]["num-examples"] = 10**6
        return reply

    return mod


STRATEGIES = [
    "fd",
    "fedavg",
    "fedprox",
    "fedgkd",
    "fedntd",
    {"name": "feddf", "steps": 3},
    {"name": "dsfl", "open_size": 20},
]


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda s: s if isinstance(s, str) else s["name"])
@pytest.mark.parametrize("mods", [(), (nan_of(1),)], ids=["sound", "faulty"])
def test_sums_on_workers_change_nothing(small, federate, monkeypatch, strategy, mods):
    scenario = small(strategy, partition__clients=24, run__participation=1.0, partition__alpha=5.0)

    def observed(events):
        rounds = [{k: v for k, v in e.items() if k != "seconds"} for e in events if e["event"] == "round"]
        refused = sorted((e["round"], e["partition_id"], e["reason"]) for e in events if e["event"] == "refused")
        return rounds, refused

    summed = observed(federate(scenario, mods)[1])
    monkeypatch.setattr(ServerRuntime, "sums_on_workers", False)
    one_by_one = observed(federate(scenario, mods)[1])

    assert summed == one_by_one
    assert len(summed[1]) == (6 if mods else 0)  # two clients, three rounds


def test_sums_of_several_architectures(small, federate, monkeypatch):
    images = {"classes": 4, "train": 400, "test": 40, "shape": [8, 8]}
    changes = {"data__options": images, "models__student": ["mlp", "cnn"], "models__options": {}}
    scenario = small("fedavg", partition__clients=24, client__steps=2, **changes)
    strategy, _ = federate(scenario)
    monkeypatch.setattr(ServerRuntime, "sums_on_workers", False)
    again, _ = federate(scenario)

    assert set(strategy.students) == {"mlp", "cnn"}
    for arch, state in strategy.students.items():
        assert all(torch.equal(tensor, again.students[arch][name]) for name, tensor in state.items())


@pytest.mark.parametrize("strategy", ["fedavg", {"name": "dsfl", "open_size": 300}], ids=["fedavg", "dsfl"])
def test_uploads_do_not_reach_the_server_where_sums_do(small, federate, monkeypatch, strategy):
    """What the server gets passes the grid: of each client a note, and of all of them one sum."""
    notes, kept, parts, whole = [], [], [], []
    send_and_fold, send_and_receive = InlineGrid.send_and_fold, InlineGrid.send_and_receive

    def folding(grid, messages, fold, *, keep=False):
        for folded in send_and_fold(grid, messages, fold, keep=keep):
            notes.extend(len(pickle.dumps(result)) for result in folded.results)
            kept.extend(folded.kept)
            if folded.part is not None:
                parts.append(len(pickle.dumps(folded.part)))
            yield folded

    def receiving(grid, messages, **more):
        messages = list(messages)
        whole.extend(message.metadata.message_type for message in messages)
        return send_and_receive(grid, messages, **more)

    monkeypatch.setattr(InlineGrid, "send_and_fold", folding)
    monkeypatch.setattr(InlineGrid, "send_and_receive", receiving)
    clients = {"partition__clients": 24, "run__participation": 1.0, "partition__alpha": 5.0, "proxy__size": 300}
    data = {"classes": 4, "dimensions": 12, "train": 1_000, "test": 100}
    wide = {"models__options": {"hidden": [128]}, "run__evaluate_ensemble": False}
    _, events = federate(small(strategy, **clients, **wide, data__options=data), rounds=1)

    [uploaded] = [sum(event["bytes_up"].values()) / 24 for event in events if event["event"] == "round"]
    assert "train" not in whole and kept == [None] * 24
    assert len(notes) == 24 and max(notes) < uploaded / 4
    assert len(parts) == 1 and parts[0] < 3 * uploaded  # in float64, and what pickle adds


def counted(partition, counts, examples, values=(1.0,)):
    state = {"w": torch.tensor(values)}
    knowledge = Knowledge.of(Weights(state, "mlp"), LabelCounts(torch.tensor(counts)), num_examples=examples)
    return Upload(partition, "mlp", knowledge, None)  # type: ignore[arg-type]


def test_several_sums_are_made_of_the_same_uploads():
    total = Several(weights=Averages({"mlp": {"w": torch.zeros(1)}}), labels=LabelTable(2))
    one, other = total.empty(), total.empty()
    for part, upload in ((one, counted(0, [1, 0], 1, (4.0,))), (other, counted(3, [1, 2], 3, (8.0,)))):
        part.check(upload)
        part.add(upload)
    total.merge(pickle.loads(pickle.dumps(one)))
    total.merge(other)
    assert total.parts["weights"].result()["mlp"]["w"].item() == 7.0
    assert {p: row.tolist() for p, row in total.parts["labels"].rows.items()} == {0: [1, 0], 3: [1, 2]}

    for bad, reason in ((counted(1, [1, 1], 3), "2 samples"), (counted(1, [1, 2], 3, (float("nan"),)), "NaN")):
        with pytest.raises(KnowledgeError, match=reason):
            total.check(bad)
