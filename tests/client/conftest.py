"""A cohort of clients that answers messages as a worker of the engine would let it."""

from collections import Counter

import numpy as np
import pytest
from flwr.app import Metadata, RecordDict
from flwr.app.message import make_message

from fedkd.client import sequential, vectorised
from fedkd.client.handlers import make_app
from fedkd.data.federation import build_federation
from fedkd.engine.worker import CohortRunner
from fedkd.payloads import Knowledge, Weights
from fedkd.students import build_student, snapshot, travelling


class Cohort:
    """Some clients of a scenario, and what they keep from message to message."""

    def __init__(self, scenario, partitions=None, mods=()):
        self.scenario, self.federation = scenario, build_federation(scenario)
        self.partitions = list(range(self.federation.num_clients) if partitions is None else partitions)
        self.states = [None] * len(self.partitions)
        self.runner = CohortRunner(make_app(scenario, mods), self.federation.num_clients, {})

    def weights(self, arch="", noise=0):
        """Return weights that a server might send."""
        arch = arch or self.federation.archs[self.partitions[0]]
        model = build_student(self.scenario, self.federation.dataset, arch)
        state = snapshot(travelling(model, self.scenario.models.buffers))
        if noise:
            draw = np.random.default_rng(noise)
            for tensor in state.values():
                if tensor.is_floating_point():
                    tensor += 0.05 * draw.normal(size=tensor.shape).astype(np.float32)
        return Weights(state, arch)

    def ask(self, knowledge, round=1, kind="train", **config):
        """Send knowledge, one for all or one for each client, and return the replies."""
        each = knowledge if isinstance(knowledge, list) else [knowledge] * len(self.partitions)
        messages = []
        for number, (partition, one) in enumerate(zip(self.partitions, each, strict=True)):
            records = one.to_records({"server-round": round, **config})
            metadata = Metadata(1, f"{number}", 1, 1_000_001 + partition, "", "1", 0.0, 1e9, kind)
            messages.append(make_message(metadata, records))
        answers = self.runner.run(messages, self.partitions, self.states)
        self.states = [old if a.state is None else a.state for old, a in zip(self.states, answers, strict=True)]
        return [answer.reply for answer in answers]

    def train(self, rounds=1, **config):
        """Train for some rounds from weights that do not depend on the replies; return all there is to compare."""
        kinds = Knowledge.of() if self.scenario.strategy.name == "fd" else None
        seen = []
        for round in range(1, rounds + 1):
            knowledge = kinds or Knowledge.of(self.weights(noise=round))
            seen.append([facts(reply) for reply in self.ask(knowledge, round, **config)])
        return seen, [memory_of(state) for state in self.states]


def facts(reply):
    """Return numbers of a reply by name, or the reason of an error."""
    if reply.has_error():
        return reply.error.reason
    arrays = {
        f"{kind}/{name}": array.numpy()
        for kind, record in reply.content.array_records.items()
        for name, array in record.items()
    }
    return arrays | {name: np.array(value) for name, value in reply.content["metrics"].items()}


def memory_of(state: RecordDict | None):
    records = state.array_records.items() if state else ()
    return {f"{kind}/{name}": array.numpy() for kind, record in records for name, array in record.items()}


@pytest.fixture
def cohort():
    """Return the class of cohorts."""
    return Cohort


@pytest.fixture
def close():
    """Return an assertion that nested lists and dicts hold nearly the same numbers, or the same text."""

    def check(one, two, tolerance=1e-5, place=""):
        assert type(one) is type(two), place
        if isinstance(one, dict):
            assert one.keys() == two.keys(), place
            for key in one:
                check(one[key], two[key], tolerance, f"{place}/{key}")
        elif isinstance(one, list | tuple):
            assert len(one) == len(two), place
            for number, pair in enumerate(zip(one, two, strict=True)):
                check(*pair, tolerance, f"{place}/{number}")
        elif isinstance(one, np.ndarray):
            np.testing.assert_allclose(one, two, rtol=tolerance, atol=tolerance, err_msg=place)
        else:
            assert one == two, place

    return check


@pytest.fixture
def trained(monkeypatch):
    """Count the students that are trained ``together`` and ``alone``."""
    count = Counter()
    alone, together = sequential.train, vectorised._Cohort.train

    def count_alone(task):
        alone(task)
        count["alone"] += 1

    def count_together(self):
        together(self)
        count["together"] += len(self.tasks)

    monkeypatch.setattr(sequential, "train", count_alone)
    monkeypatch.setattr(vectorised._Cohort, "train", count_together)
    return count
