"""Before round 1: what clients take is measured, and where and how they are computed is chosen and said.

One client of each architecture, the one of median size, takes a few steps; what the others take follows from their
numbers of steps. Where ``system.trainer`` is ``auto``, a cohort is trained both ways. Clients that are measured start
from nothing and are forgotten: traffic, states and random streams of the run know nothing of them.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from flwr.app import ConfigRecord, Message, RecordDict

from fedkd.client.vectorised import obstacle, schedule_in_parts
from fedkd.cohorts import COHORTS
from fedkd.data.batches import epoch_order, step_order
from fedkd.engine.measure import Measured, median
from fedkd.engine.placement import SMALLER, Cost, Placement, place, size, span
from fedkd.errors import RunError
from fedkd.payloads import CONFIG

if TYPE_CHECKING:
    from fedkd.engine import SimulationGrid
    from fedkd.scenario import Client, Scenario
    from fedkd.server.runtime import ServerRuntime
    from fedkd.server.strategy import DistillationStrategy


FEW, MORE = 1, 4
"""Steps of the two runs from which follows what a step takes, and what a client takes beside its steps."""

WHOLE = 0.25
"""Seconds that cohorts may take for more steps than that, at best for all of them: then nothing has to follow."""

MARGIN = 1.1
"""How many times as fast the vectorised trainer must be to be chosen: bits depend on it, and noise must not decide."""

AGAIN, SECONDS, UNCLEAR = 3, 0.3, (0.6, 1.25)
"""Trainers are compared so often while it takes less than so many seconds, and the sequential one takes neither less
nor more times as long as the vectorised one; the median counts. On CPUs all workers do it at once: what a trainer gains
differs where they share caches and memory."""

WIDTH = 16
"""Clients in the cohort from which follows what a vectorised client takes of a GPU's memory; on CPUs, most clients with
which trainers are compared."""

WIDEST = 32
"""Clients in a cohort beyond which those that are computed as one on a CPU gain little."""

GPU_CONTEXT = 600 << 20
"""Memory that a process takes of a GPU before it allocates any (kernels, handles of libraries)."""

SAMPLED = 10_000
"""Clients that stand for a large federation."""

_OUT_OF_MEMORY = re.compile(r"out ?of ?memory|allocate memory|MemoryError", re.IGNORECASE)


@dataclass(frozen=True)
class Report:
    """What a preflight found, and chose.

    Parameters
    ----------
    scenario : Scenario
        The scenario with what was chosen in its ``[system]``.
    placement : Placement
        Workers, GPU share, width of cohorts.
    rows : dict of str to str
        What to tell people, by topic.
    notes : tuple of str
        What went wrong and stopped nobody.
    facts : dict
        What to record; can be written as JSON.
    """

    scenario: Scenario
    placement: Placement
    rows: Mapping[str, str]
    notes: tuple[str, ...]
    facts: Mapping[str, Any]


def preflight(server: ServerRuntime, strategy: DistillationStrategy) -> Report:
    """Measure clients on the server's grid, and choose trainer, width of cohorts, workers and GPU share.

    What the scenario sets is kept. A client that fails is noted, and what it would have told is done without.

    Parameters
    ----------
    server : ServerRuntime
        With a grid of ours, before the first round.
    strategy : DistillationStrategy
        Bound to the server; says what clients get in round 1.

    Raises
    ------
    RunError
        Something cannot fit into memory; the message says what to change.
    """
    return _Preflight(server, strategy).report()


@dataclass
class _Group:
    """The clients of one architecture."""

    arch: str
    ids: np.ndarray  # partition ids of eligible clients, by size
    samples: np.ndarray  # of each of them
    steps: np.ndarray  # of each of them in a round
    clients: int  # in a round
    obstacle: str  # why they cannot be trained as one
    weight_bytes: int  # of one of them
    took: dict[str, _Took] = field(default_factory=dict)  # by trainer

    def cohort(self, width: int) -> np.ndarray:
        """Return the places of so many clients that stand for all: of every size alike."""
        return ((np.arange(width) + 0.5) / width * len(self.ids)).astype(int)


class _Took(NamedTuple):
    """What a client takes, on average."""

    seconds: float
    host_bytes: int
    gpu_bytes: int


class _Preflight:
    def __init__(self, server: ServerRuntime, strategy: DistillationStrategy) -> None:
        self.server, self.scenario = server, server.scenario
        self.grid: SimulationGrid = server.grid  # pyright: ignore[reportAttributeAccessIssue]
        self.strategy = strategy
        self.nodes = self.grid.machines(gpus=self.scenario.system.device != "cpu")
        self.on_gpu = any(node.whole_gpus for node in self.nodes)
        self.notes: list[str] = []
        self.held_host = self.held_gpu = 0  # what a worker takes before the first client comes
        self.groups = _groups(server)
        self.selected = sum(group.clients for group in self.groups)

    def report(self) -> Report:
        system = self.scenario.system
        for group in self.groups:
            self._measure_one(group)
        trainer, why = self._choose_trainer()
        placement = self._place(trainer)
        chosen: dict[str, Any] = {"trainer": trainer, "cohort": placement.cohort}
        if self.grid.workers and (self.on_gpu or placement.workers < sum(int(node.cpus) for node in self.nodes)):
            chosen |= {"workers": placement.workers, "gpu_fraction": placement.gpu_fraction}
        rows = {
            group.arch: f"{span(group.took['sequential'].seconds)} and {self._memory(group)} per client "
            f"(on average {group.samples.mean():.0f} samples, {_plural(group.steps.mean(), 'step')})"
            for group in self.groups
            if "sequential" in group.took
        }
        facts = {
            "architectures": {
                group.arch: {name: took._asdict() for name, took in group.took.items()} for group in self.groups
            },
            "worker": {
                "host_bytes": self.held_host,
                "gpu_bytes": self.held_gpu,
                "planned_bytes": placement.worker_bytes,
            },
            "seconds_per_sample": {
                group.arch: group.took.get(trainer, group.took["sequential"]).seconds / float(group.samples.mean())
                for group in self.groups
                if group.took
            },
            "round_seconds": placement.seconds,
            "notes": self.notes,
        }
        return Report(
            scenario=self.scenario.model_copy(update={"system": system.model_copy(update=chosen)}),
            placement=placement,
            rows={**rows, "trainer": f"{trainer}{why}", "placement": str(placement)},
            notes=tuple(self.notes),
            facts=facts,
        )

    # --- measuring -----------------------------------------------------------------------------------------

    def _measure_one(self, group: _Group) -> None:
        """Let the client of median size train alone."""
        place = (len(group.ids) - 1) // 2
        few, more = ((np.array([place]), steps, "sequential") for steps in (FEW, MORE))
        peak = self._run(group, [more], memory=True)
        runs = self._run(group, [few, more]) if peak else []
        if not runs:
            return
        steps = int(group.steps[place])
        short, long = (min(number, steps) for number in (FEW, MORE))
        seconds = _whole(runs[0].seconds, short, runs[1].seconds, long, float(group.steps.mean()))
        group.took["sequential"] = _Took(seconds, peak[0].host_bytes, peak[0].gpu_bytes)
        self.held_host = max(self.held_host, peak[0].held_host_bytes)
        self.held_gpu = max(self.held_gpu, peak[0].held_gpu_bytes)

    def _measure_cohort(
        self, group: _Group, width: int, trainers: Sequence[str], *, again: int = 1, everywhere: bool = False
    ) -> None:
        """Let a cohort train in several ways; the vectorised one is among them."""
        places = group.cohort(width)
        batches = [_batches(int(samples), self.scenario.client) for samples in group.samples[places]]
        alone = group.took["sequential"]
        most = max(MORE, int(WHOLE / (width * alone.seconds / group.steps.mean())))
        # The shorter runs are long enough to get to what is replayed, see `fedkd.tapes`.
        lengths = (most,) if most >= max(map(len, batches)) else (max(FEW, most // 2), most)
        peak = self._run(group, [(places, MORE, "vectorised")], memory=True, everywhere=everywhere)
        plan = [(places, steps, trainer) for trainer in trainers for steps in lengths]
        passes = self._passes(group, plan, again, everywhere) if peak else []
        if not passes:
            group.took.pop("vectorised", None)
            return
        times = iter(median(runs).seconds for runs in zip(*passes))
        for trainer in trainers:
            took = [next(times) for _ in lengths]
            bytes_each = 0 if self.on_gpu else group.weight_bytes
            *steps, whole = (
                _taken(trainer, [each[:length] for each in batches], bytes_each) for length in (*lengths, None)
            )
            seconds = _whole(took[0], steps[0], took[-1], steps[-1], whole) / width
            group.took[trainer] = alone._replace(seconds=seconds)
        graphs = 2 if self.scenario.system.graphs else 1  # with memory of their own
        group.took["vectorised"] = group.took["vectorised"]._replace(
            host_bytes=peak[0].host_bytes // width, gpu_bytes=graphs * peak[0].gpu_bytes // width
        )

    def _passes(
        self, group: _Group, plan: Sequence[tuple[np.ndarray, int, str]], again: int, everywhere: bool
    ) -> list[list[Measured]]:
        """Run a plan until it is clear which way is the faster one; nothing where something failed."""
        passes: list[list[Measured]] = []
        for _ in range(again):
            passes.append(self._run(group, plan, everywhere=everywhere))
            if not passes[-1]:
                return []
            spent = {"sequential": 0.0, "vectorised": 0.0}
            for (*_, trainer), run in zip(plan, passes[-1], strict=True):
                spent[trainer] += run.seconds
            least, most = (bound * spent["vectorised"] for bound in UNCLEAR)
            enough = sum(run.seconds for runs in passes for run in runs) > SECONDS
            if enough or not least < spent["sequential"] < most:
                break
        return passes

    def _run(
        self,
        group: _Group,
        plan: Sequence[tuple[np.ndarray, int, str]],
        *,
        memory: bool = False,
        everywhere: bool = False,
    ) -> list[Measured]:
        """Run cohorts of a group; return what they took, or nothing where one of them failed."""
        try:
            runs = self.grid.measure(self._messages(group, plan), memory=memory, everywhere=everywhere)
            reason = next((error for run in runs for error in run.errors), "")
        except Exception as error:  # whatever a method does: the run itself will tell
            reason = str(error) if isinstance(error, RunError) else f"{type(error).__name__}: {error}"
            runs = []
        if not reason:
            return runs
        if _OUT_OF_MEMORY.search(reason) and all(len(places) == 1 for places, *_ in plan):
            raise RunError(
                f"a client of {group.arch} does not fit into memory: {reason}\n  {SMALLER}"
                + ('; or system.device = "cpu"' if self.on_gpu else "")
            )
        as_one = " as one" if any(trainer == "vectorised" for *_, trainer in plan) else ""
        self.notes.append(f"{group.arch} could not be measured{as_one}: {reason}")
        return []

    def _messages(self, group: _Group, plan: Sequence[tuple[np.ndarray, int, str]]) -> list[list[Message]]:
        """Return the train messages of round 1 for each cohort; nobody counts their bytes."""
        strategy = copy.copy(self.strategy)  # what a broadcast leaves behind is not for the run
        strategy.round = 1
        cohorts = [sorted(group.ids[places].tolist()) for places, *_ in plan]
        knowledge = strategy.broadcast(sorted({partition for cohort in cohorts for partition in cohort}))
        records = {id(item): item.to_records() for item in knowledge.values()}

        def message(partition: int, steps: int, trainer: str) -> Message:
            config = ConfigRecord({"server-round": 1, "max-steps": steps, "trainer": trainer})
            content = RecordDict({**records[id(knowledge[partition])], CONFIG: config})
            return Message(content, self.server.node_of(partition), "train", group_id="1")

        return [
            [message(partition, steps, trainer) for partition in cohort]
            for cohort, (_, steps, trainer) in zip(cohorts, plan, strict=True)
        ]

    # --- choosing ------------------------------------------------------------------------------------------

    def _choose_trainer(self) -> tuple[str, str]:
        """Return the trainer and why."""
        asked = self.scenario.system.trainer
        able = [group for group in self.groups if "sequential" in group.took and not group.obstacle]
        why = "".join(f"; {g.arch} is trained one by one: {g.obstacle}" for g in self.groups if g.obstacle)
        if asked == "sequential":
            return "sequential", ""
        if not able:
            return "sequential" if asked == "auto" else asked, why
        width = self.scenario.system.cohort or (WIDTH if self.on_gpu else min(WIDTH, self._wide() or self._usual()))
        if self.on_gpu or asked == "vectorised":  # memory must be known before the width can be chosen
            for group in able:
                self._measure_cohort(group, min(width, group.clients), ["vectorised"])
        if asked == "vectorised":
            return "vectorised", why
        try:
            plan = self._place("vectorised", untried=not self.on_gpu)
            width = plan.cohort if self.on_gpu else width
            everywhere = not self.on_gpu and plan.workers >= self.grid.workers  # if not, memory is short
            for group in able:
                if min(width, group.clients) > 1:
                    ways = "vectorised", "sequential"
                    self._measure_cohort(group, min(width, group.clients), ways, again=AGAIN, everywhere=everywhere)
            self._place("vectorised")
        except RunError as error:
            return "sequential", f": {str(error).splitlines()[0]}"
        if not any("vectorised" in group.took for group in able):
            reason = "cohorts could not be measured as one" if width > 1 else "a cohort holds one client"
            return "sequential", f": {reason}"
        one_by_one, together = (
            sum(cost.clients * cost.seconds for cost in self._costs(trainer))
            for trainer in ("sequential", "vectorised")
        )
        if one_by_one > MARGIN * together:
            return "vectorised", f": {span(together)} of work in a round, sequential {span(one_by_one)}"
        return "sequential", f": {span(one_by_one)} of work in a round, vectorised {span(together)}"

    def _place(self, trainer: str, *, untried: bool = False) -> Placement:
        """Place workers; `untried` cohorts are taken to need the memory of as many clients one by one."""
        system, inline = self.scenario.system, not self.grid.workers
        return place(
            self.nodes,
            self._costs(trainer),
            batched=trainer == "vectorised" and (untried or any("vectorised" in group.took for group in self.groups)),
            workers=1 if inline else system.workers,
            gpu_fraction=0.0 if inline else system.gpu_fraction,
            cohort=system.cohort or (self._wide() if trainer == "vectorised" else 0),
            host_bytes=self.held_host,
            gpu_bytes=self.held_gpu + (GPU_CONTEXT if self.on_gpu else 0),
        )

    def _usual(self) -> int:
        """Return the width that cohorts have if nobody sets it: it depends on the selection alone."""
        return -(-self.selected // COHORTS)

    def _wide(self) -> int:
        """Return the width of cohorts on CPUs if the vectorised trainer is chosen here; 0 = the usual one.

        Computed as one, many clients take less than a few; but each worker must get two cohorts of a round. Whoever
        asks for that trainer gets the usual width, and the same bits with any number of workers.
        """
        usual, system = self._usual(), self.scenario.system
        if self.on_gpu or system.trainer != "auto" or usual == 1:
            return 0
        workers = (system.workers or sum(int(node.cpus) for node in self.nodes)) if self.grid.workers else 1
        width = min(WIDEST, -(-self.selected // (2 * workers)))
        return width if width > usual else 0

    def _costs(self, trainer: str) -> list[Cost]:
        """Return what clients take with a trainer; those it cannot train are trained one by one."""
        measured = [group for group in self.groups if group.took]
        return [Cost(g.arch, g.clients, *g.took.get(trainer, g.took["sequential"])) for g in measured]

    def _memory(self, group: _Group) -> str:
        took = group.took["sequential"]
        return f"{size(took.gpu_bytes)} on the GPU" if self.on_gpu else size(took.host_bytes)


def _groups(server: ServerRuntime) -> list[_Group]:
    """Return the eligible clients by architecture; of very many, a sample."""
    federation, run, client = server.federation, server.scenario.run, server.scenario.client
    eligible = federation.eligible
    asked = max(1, int(run.participation * federation.num_clients + 0.5)) * server.scenario.clock.over_selection
    selected = min(asked, len(eligible))
    if len(eligible) > SAMPLED:
        eligible = eligible[np.unique(np.random.default_rng(0).integers(len(eligible), size=SAMPLED))]
    samples = federation.sizes[eligible]
    archs = np.array([federation.archs[partition] for partition in eligible.tolist()])
    steps = np.maximum(1, client.epochs * -(-samples // client.batch_size))
    groups = []
    for arch in dict.fromkeys(archs.tolist()):
        mine = np.flatnonzero(archs == arch)
        mine = mine[np.argsort(samples[mine], kind="stable")]
        groups.append(
            _Group(
                arch=arch,
                ids=eligible[mine],
                samples=samples[mine],
                steps=np.full(len(mine), client.steps) if client.steps else steps[mine],
                clients=max(1, round(selected * len(mine) / len(eligible))),
                obstacle=obstacle(model := server.model(arch)),
                weight_bytes=sum(parameter.nbytes for parameter in model.parameters()),
            )
        )
    return groups


def _batches(samples: int, client: Client) -> list[int]:
    """Return the size of each batch of a client with so many samples."""
    ids, rng = np.arange(samples), np.random.default_rng(0)
    if client.steps:
        return [len(batch) for batch in step_order(ids, client.batch_size, client.steps, rng)]
    return [len(batch) for batch in epoch_order(ids, client.batch_size, rng)] * client.epochs


def _taken(trainer: str, batches: list[list[int]], weight_bytes: int) -> int:
    """Return the steps that a cohort takes: those of all clients one after another, or as they are taken together."""
    if trainer == "sequential":
        return sum(map(len, batches))
    longest_first = sorted(batches, key=len, reverse=True)
    return sum(1 for _ in schedule_in_parts(longest_first, weight_bytes))


def _whole(few: float, short: int, more: float, long: int, steps: float) -> float:
    """Return the seconds of so many steps, where `short` ones took `few` seconds and `long` ones `more`."""
    rate = max(0.0, more - few) / (long - short) if long > short else 0.0
    return few + max(0.0, steps - short) * rate


def _plural(number: float, noun: str) -> str:
    return f"{number:.0f} {noun}" + ("" if f"{number:.0f}" == "1" else "s")
