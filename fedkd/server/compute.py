"""Outputs of models, computed where clients are: divided by rows, streamed in order, kept for a round.

A job is one model on one shard of samples. The model is named by the reply that brought it, so that weights go from the
object store to a worker without passing the driver. Shards and batches are the same everywhere and every job has one
torch thread, so the bits do not depend on who computes.
"""

from __future__ import annotations

import hashlib
import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from torch import Tensor, nn

from fedkd.caches import cached
from fedkd.data.batches import ArrayData
from fedkd.data.federation import Federation, build_federation
from fedkd.errors import KnowledgeError
from fedkd.payloads import Knowledge, Weights
from fedkd.scenario import Scenario
from fedkd.server.members import Member, check_fit
from fedkd.students import SHARD, build_student, complete, pick_device, predict
from fedkd.threads import one_thread

KEPT = 64 << 20  # bytes of outputs that are kept for whoever asks again

Source = Message | RecordDict
"""Where a model's weights are: the reply that brought them, or records of them."""


class Compute:
    """Computes models' logits on the workers of a grid, or here if the grid has none.

    Parameters
    ----------
    scenario : Scenario
        The resolved scenario: data and architectures.
    grid : Grid
        One of `fedkd.engine`, or a foreign one.
    federation : Federation
        The scenario's; its proxy set, test set and training data do not travel.
    kept : int
        Bytes of outputs that are kept, as long as the replies that brought the models are. Once they are full, what
        is new is not kept.

    Attributes
    ----------
    computed : int
        Models that were run, each time on all the samples asked for.
    """

    def __init__(self, scenario: Scenario, grid: Grid, federation: Federation, *, kept: int = KEPT) -> None:
        self.scenario, self.grid = scenario, grid
        self.computed = 0
        self._json = scenario.model_dump_json()
        proxy = federation.proxy
        self._named = {id(federation.test): "test", id(federation.train): "train"}
        self._named |= {} if proxy is None else {id(proxy.data): "proxy"}
        self._kept: dict[int, dict[bytes, Tensor]] = {}  # by identity of a source, then by samples
        self._room = kept

    def member(self, source: Source | Weights, weight: float = 1.0) -> ComputedMember:
        """Return a model as a member of an ensemble.

        Parameters
        ----------
        source : Message or Weights
            The reply that brought the model, or its weights.
        weight : float
            Its weight in the ensemble.
        """
        records = Knowledge.of(source).to_records() if isinstance(source, Weights) else source
        return ComputedMember(self, records, weight)

    def logits(self, sources: Sequence[Source], data: ArrayData, ids: Tensor | None = None) -> Iterator[Tensor]:
        """Yield the logits of one model after the other, float32 [n, C]; the workers are a few shards ahead.

        Parameters
        ----------
        sources : sequence of Message or RecordDict
            Where the models are.
        data : ArrayData
            The samples. Those of the federation do not travel; outputs for others, such as augmented ones, are not
            kept.
        ids : Tensor, optional
            Sample ids, at least one, int64 [n]; default: all.
        """
        name = self._named.get(id(data), "")
        rows = np.arange(len(data)) if ids is None else ids.cpu().numpy()
        key = hashlib.sha256(name.encode() + rows.tobytes()).digest()
        # Statistics that stayed at home are estimated anew in every job.
        size = SHARD if self.scenario.models.buffers == "all" else len(rows)
        shards = [(start, start + size) for start in range(0, len(rows), size)]
        # What is measured stays float32; the proxy set, and whatever else is not the task's own, is for distillation.
        precision = "fp32" if name in ("test", "train") else self.scenario.system.server_precision
        kept = [self._kept.get(id(source), {}).get(key) if name else None for source in sources]
        missing = [source for source, found in zip(sources, kept) if found is None]
        jobs = [
            (self._json, source, name or data, rows, start, stop, precision)
            for source in missing
            for start, stop in shards
        ]
        self.computed += len(missing)
        results = self._run(logits_of, jobs)
        for source, found in zip(sources, kept):
            if found is None:
                found = torch.from_numpy(np.concatenate([next(results) for _ in shards]))
                if name:
                    self._keep(source, key, found)
            yield found
            del found

    def _run(self, function: Callable[..., Any], jobs: list[tuple[Any, ...]]) -> Iterator[Any]:
        grid: Any = self.grid
        return grid.compute(function, jobs) if hasattr(grid, "compute") else _here(function, jobs)

    def _keep(self, source: Source, key: bytes, logits: Tensor) -> None:
        """Keep outputs if there is room, until their source is gone."""
        if logits.nbytes > self._room or key in self._kept.get(id(source), {}):
            return
        if id(source) not in self._kept:
            self._kept[id(source)] = {}
            weakref.finalize(source, self._forget, id(source)).atexit = False
        self._kept[id(source)][key] = logits
        self._room -= logits.nbytes

    def _forget(self, source: int) -> None:
        self._room += sum(logits.nbytes for logits in self._kept.pop(source).values())


class ComputedMember(Member):
    """A model whose outputs are computed on the workers, in evaluation mode; made by `Compute.member`.

    Parameters
    ----------
    compute : Compute
        Computes them, ahead for all members in a row that have the same.
    source : Message or RecordDict
        Where its weights are.
    weight : float
        Weight in the ensemble.
    """

    def __init__(self, compute: Compute, source: Source, weight: float = 1.0) -> None:
        self.compute, self.source, self.weight = compute, source, weight

    def outputs(self, data: ArrayData | None, ids: Tensor, batch_size: int = 0) -> Tensor:
        """Return logits, float32; the batch size is the same for all, whatever is asked for."""
        return next(self.stream([self], data, ids))[1]

    @classmethod
    def stream(
        cls, members: Sequence[Any], data: ArrayData | None, ids: Tensor, batch_size: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield all rows and their logits, member after member, while workers compute the next ones."""
        if data is None:
            raise KnowledgeError("a model cannot give targets without data")
        if not len(ids):
            yield from ((ids, torch.empty(0, 0)) for _ in members)
            return
        rows = torch.arange(len(ids))
        for compute, group in itertools.groupby(members, key=lambda member: member.compute):
            sources = [member.source for member in group]
            yield from map(lambda logits: (rows, logits), compute.logits(sources, data, ids))


class Site:
    """What a process needs to run models: the scenario's data, and a module of each architecture.

    Parameters
    ----------
    scenario : Scenario
        The resolved scenario.
    """

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.federation = build_federation(scenario)
        self.device = pick_device(scenario.system.device)
        self.channels_last = scenario.client.channels_last and self.federation.dataset.kind == "image"
        self._models: dict[str, nn.Module] = {}

    def data(self, name: str) -> ArrayData:
        """Return data of the federation: ``proxy``, ``test`` or ``train``."""
        if name == "proxy":
            assert self.federation.proxy is not None
            return self.federation.proxy.data
        return self.federation.test if name == "test" else self.federation.train

    def logits(self, weights: Weights, data: ArrayData, ids: np.ndarray, precision: str) -> Tensor:
        """Return the logits of a model with these weights, float32 [n, C], on the CPU."""
        model, state = self._model(weights.arch), weights.state
        check_fit(model, state)
        layout: dict[str, Any] = {"device": self.device, "channels_last": self.channels_last}
        if self.scenario.models.buffers == "params_only":
            proxy = self.federation.proxy
            state = complete(model, state, None if proxy is None else proxy.data, **layout)
        return predict(model, data, ids, state=state, precision=precision, **layout)

    def _model(self, arch: str) -> nn.Module:
        if arch not in self._models:
            model = build_student(self.scenario, self.federation.dataset, arch).to(self.device).requires_grad_(False)
            if self.channels_last:
                model = model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
            self._models[arch] = model
        return self._models[arch]


@cached(maxsize=4)
def site_of(scenario_json: str) -> Site:
    """Return this process's site for a scenario in JSON, built once."""
    return Site(Scenario.model_validate_json(scenario_json))


def logits_of(
    scenario_json: str, source: Source, data: str | ArrayData, rows: np.ndarray, start: int, stop: int, precision: str
) -> np.ndarray:
    """Return the logits of one model on one shard, float32 [stop - start, C].

    Parameters
    ----------
    scenario_json : str
        The resolved scenario.
    source : Message or RecordDict
        Holds the weights.
    data : str or ArrayData
        Name of data of the federation, or data that travelled.
    rows : np.ndarray
        All sample ids, int64 [n].
    start, stop : int
        The shard.
    precision : str
        ``fp32`` or ``bf16``.
    """
    site = site_of(scenario_json)
    records = source.content if isinstance(source, Message) else source
    weights = Knowledge.from_records(records).get(Weights)
    samples = site.data(data) if isinstance(data, str) else data
    return site.logits(weights, samples, rows[start:stop].copy(), precision).numpy()


def _here(function: Callable[..., Any], jobs: list[tuple[Any, ...]]) -> Iterator[Any]:
    for job in jobs:
        with one_thread():
            result = function(*job)
        yield result
