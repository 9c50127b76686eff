"""What methods that exchange outputs share on the server: draws of proxy samples, further exchanges, reduces."""

import numpy as np
import pytest
import torch

from fedkd.errors import RunError
from fedkd.server.exchange import stratified


def test_a_stratified_subset_has_the_shares_of_the_whole():
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2, 5], [50, 30, 15, 5]))
    chosen = stratified(labels, 20, np.random.default_rng(1))
    assert np.bincount(labels[chosen]).tolist() == [10, 6, 3, 0, 0, 1]
    assert (np.diff(chosen) > 0).all()
    # 7 of 100: 3.5, 2.1, 1.05, 0.35. Rounded down 3, 2, 1, 0; the one that is missing goes to the largest remainder.
    seven = labels[stratified(labels, 7, np.random.default_rng(1))]
    assert np.bincount(seven, minlength=6).tolist() == [4, 2, 1, 0, 0, 0]
    assert np.array_equal(stratified(labels, 1_000, np.random.default_rng(1)), np.arange(100))


def test_a_stratified_subset_is_random_within_classes():
    labels = np.zeros(100, dtype=int)
    draws = {tuple(stratified(labels, 10, np.random.default_rng(seed))) for seed in range(20)}
    assert len(draws) == 20
    seen = np.bincount(np.concatenate([stratified(labels, 10, np.random.default_rng(s)) for s in range(2_000)]))
    assert seen.min() > 140 and seen.max() < 260  # 200 expected, sd 13


def test_subsets_change_with_the_round_and_ask_by_id(small, federate):
    asked = []

    def tap(message, context, call_next):
        if message.metadata.message_type == "train" and context.node_config["partition-id"] == 0:
            records = message.content.array_records
            asked.append(records["request"]["ids"].numpy().tolist() if "request" in records else None)
        return call_next(message, context)

    scenario = small({"name": "mhat", "public_size": 20}, run__participation=1.0)
    federate(scenario, mods=[tap])
    assert len(asked) == 3 and all(len(ids) == 20 == len(set(ids)) and ids == sorted(ids) for ids in asked)
    assert asked[0] != asked[1] != asked[2]

    asked.clear()
    federate(small({"name": "mhat", "public_size": 1_000}, run__participation=1.0), mods=[tap])
    assert asked == [None] * 3  # all 60: no ids need to travel


def test_too_few_answers_end_the_run_with_a_reason(small, federate):
    def deaf(message, context, call_next):
        if message.metadata.message_type == "query.logits":
            raise RuntimeError("no")
        return call_next(message, context)

    with pytest.raises(RunError, match=r"round 1: 0 usable answers to query.logits, at least 1 are needed"):
        federate(small(FEDMD, proxy__labelled=True), mods=[deaf])


FEDMD = {"name": "fedmd", "align": 20, "public_epochs": 1, "transfer_epochs": 1}
FURTHER = [(FEDMD, "train.pretrain", 0), ("fedaux", "query.score", 0), ("distributed", "query.gossip", 1)]
FURTHER += [({"name": "fedgems", "selective": False}, "query.logits", 1)]


@pytest.mark.parametrize(("hyper", "action", "at"), FURTHER, ids=[action for _, action, _ in FURTHER])
def test_every_exchange_needs_enough_answers(small, federate, hyper, action, at):
    def deaf(message, context, call_next):
        if message.metadata.message_type == action and context.node_config["partition-id"] > 1:
            raise RuntimeError("no")
        return call_next(message, context)

    scenario = small(hyper, proxy__labelled=True, run__participation=1.0, system__min_replies=3)
    with pytest.raises(RunError, match=rf"round {at}: 2 usable answers to {action}, at least 3 are needed"):
        federate(scenario, mods=[deaf])


def test_answers_are_summed_alike_wherever_that_happens(small, federate, monkeypatch):
    from fedkd.server.runtime import ServerRuntime

    scenario = small(FEDMD, proxy__labelled=True, system__cohort=2)
    on_workers, _ = federate(scenario, rounds=1)
    monkeypatch.setattr(ServerRuntime, "sums_on_workers", False)
    one_by_one, _ = federate(scenario, rounds=1)
    assert torch.equal(on_workers.labels.values, one_by_one.labels.values)
