"""Cohorts: which clients are handed to a worker together, and which cohort goes first.

Composition depends on the selection alone, never on the number of workers or on measured time, so whatever is
computed for a cohort as a whole has the same bits wherever the cohort runs. Measured time decides only who goes first.
"""

import itertools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

COHORTS = 16
"""Cohorts that a selection of one architecture is cut into: enough to balance a machine's workers."""


TASK_SECONDS = 0.1, 0.5
"""Neighbouring cohorts are put together in a task as long as they are expected to take no more than the first, so that
handing tasks out and taking in what comes of them, some milliseconds each, costs little; and while there is much left
to do, no more than the second."""


def compose(partitions: Sequence[int], archs: Sequence[str], width: int = 0) -> list[list[int]]:
    """Divide the selected clients into cohorts of one architecture each.

    Parameters
    ----------
    partitions : sequence of int
        Partition ids of the selected clients, in any order, without repetition.
    archs : sequence of str
        Architecture of each of them.
    width : int
        Most clients in a cohort; 0 (default) = ``ceil(n / 16)``, n being the number of selected clients: as many
        cohorts as that takes.

    Returns
    -------
    list of list of int
        Positions into `partitions`, sorted by partition id within a cohort; the cohorts of an architecture differ by
        at most one client.

    Examples
    --------
    >>> compose([5, 1, 3], ["mlp", "cnn", "mlp"])
    [[1], [2], [0]]
    >>> [len(cohort) for cohort in compose(range(40), ["cnn"] * 36 + ["mlp"] * 4)]
    [2, 2, 3, 2, 3, 2, 2, 3, 2, 3, 2, 2, 3, 2, 3, 2, 2]
    """
    groups: dict[str, list[int]] = {}
    for position in sorted(range(len(partitions)), key=partitions.__getitem__):
        groups.setdefault(archs[position], []).append(position)
    cohorts = []
    for group in groups.values():
        count = -(-len(group) // width) if width else -(-len(group) * COHORTS // max(COHORTS, len(partitions)))
        ends = [number * len(group) // count for number in range(count + 1)]
        cohorts += [group[start:end] for start, end in itertools.pairwise(ends)]
    return cohorts


def in_tasks(costs: Sequence[float], workers: int) -> list[range]:
    """Put cohorts together in tasks: long ones first, short ones at the end, so that no worker is left with a long one.

    Parameters
    ----------
    costs : sequence of float
        Expected seconds of each cohort.
    workers : int
        Worker processes.

    Returns
    -------
    list of range
        Neighbouring cohorts of each task, blocks of `Parts`, in the order of dispatch.

    Examples
    --------
    >>> in_tasks([1.0, 3.0, 2.0], workers=2)
    [range(1, 2), range(2, 3), range(0, 1)]
    >>> in_tasks([0.1] * 7, workers=2)
    [range(0, 2), range(2, 3), range(3, 4), range(4, 5), range(5, 6), range(6, 7)]
    """
    tasks: list[range] = []
    start, left = 0, sum(costs)
    least, most = TASK_SECONDS
    least = min(least, 1.1 * left / workers)  # every worker gets something, and about as much
    while start < len(costs):
        limit = max(least, min(most, left / (1.5 * workers)))
        width = 1
        while (
            start % (2 * width) == 0 and start + width < len(costs) and sum(costs[start : start + 2 * width]) <= limit
        ):
            width *= 2
        tasks.append(range(start, min(start + width, len(costs))))
        left -= sum(costs[start : start + width])
        start += width
    return sorted(tasks, key=lambda task: -sum(costs[number] for number in task))


class Parts:
    """Partial results of cohorts, merged pairwise: neighbours first, then neighbouring pairs, and so on.

    What is merged with what depends on the numbers of the cohorts alone, not on who merges, nor in which order parts
    arrive; so a sum has the same bits whoever made which part of it.

    Parameters
    ----------
    merge : callable
        From a part and that of later cohorts to the part of both; may change the first, and keep either.

    Examples
    --------
    >>> parts = Parts(lambda a, b: f"({a}{b})")
    >>> for number in (4, 0, 3, 2, 1):
    ...     parts.add(number, str(number))
    >>> sorted(parts.loose())
    [(0, 4, '4'), (2, 0, '((01)(23))')]
    >>> parts.result()
    '(((01)(23))4)'
    """

    def __init__(self, merge: Callable[[Any, Any], Any]) -> None:
        self._merge = merge
        self._parts: dict[tuple[int, int], Any] = {}

    def add(self, number: int, part: Any, level: int = 0) -> None:
        """Add the part of the cohorts ``number * 2**level``, …, ``(number + 1) * 2**level - 1``."""
        while (level, number ^ 1) in self._parts:
            other = self._parts.pop((level, number ^ 1))
            part = self._merge(other, part) if number & 1 else self._merge(part, other)
            level, number = level + 1, number >> 1
        assert (level, number) not in self._parts, "a cohort was summed twice"
        self._parts[level, number] = part

    def loose(self) -> list[tuple[int, int, Any]]:
        """Return level, number and part of what has not found its neighbour yet."""
        return [(*place, part) for place, part in self._parts.items()]

    def result(self) -> Any:
        """Return the part of all cohorts; those of which there is none count as empty. None if there are no parts."""
        level = 0
        while len(self._parts) > 1:
            for place in sorted(place for place in self._parts if place[0] == level):
                self.add(place[1] >> 1, self._parts.pop(place), level + 1)
            level += 1
        return next(iter(self._parts.values()), None)


class Costs:
    """Seconds per sample of each kind of work, as measured; they decide in which order cohorts start, nothing else.

    A kind is what clients are asked for, and their architecture.

    Examples
    --------
    >>> costs = Costs()
    >>> costs.of("cnn", 10) == costs.of("mlp", 10)
    True
    >>> costs.learn("cnn", samples=100, seconds=2.0)
    >>> costs.learn("mlp", samples=100, seconds=1.0)
    >>> costs.of("cnn", 10), costs.of("mlp", 10)
    (0.2, 0.1)
    >>> costs.of("mlp", 0) > 0
    True
    """

    def __init__(self) -> None:
        self._rates: dict[Hashable, float] = {}

    def of(self, kind: Hashable, samples: int) -> float:
        """Return the expected seconds of a cohort; a kind not seen yet costs as much as the dearest."""
        return max(samples, 1) * self._rates.get(kind, max(self._rates.values(), default=1.0))

    def learn(self, kind: Hashable, samples: int, seconds: float) -> None:
        """Take in what a cohort took; recent cohorts count most, since load changes."""
        rate = seconds / max(samples, 1)
        self._rates[kind] = 0.5 * (self._rates.get(kind, rate) + rate)
