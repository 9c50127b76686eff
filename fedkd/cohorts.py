"""Cohorts: which clients are handed to a worker together, and which cohort goes first.

Composition depends on the selection alone, never on the number of workers or on measured time, so whatever is
computed for a cohort as a whole has the same bits wherever the cohort runs. Measured time decides only who goes first.
"""

from collections.abc import Sequence

COHORTS = 16
"""Cohorts that a selection of one architecture is cut into: enough to balance a machine's workers."""


TASK_SECONDS = 0.02
"""Cohorts are put together in a task as long as they are expected to take no more than this."""


def compose(partitions: Sequence[int], archs: Sequence[str], width: int = 0) -> list[list[int]]:
    """Divide the selected clients into cohorts of one architecture each.

    Parameters
    ----------
    partitions : sequence of int
        Partition ids of the selected clients, in any order, without repetition.
    archs : sequence of str
        Architecture of each of them.
    width : int
        Most clients in a cohort; 0 (default) = ``ceil(n / 16)``, n being the number of selected clients.

    Returns
    -------
    list of list of int
        Positions into `partitions`, sorted by partition id within a cohort; the last cohort of an architecture may
        be narrower than the others.

    Examples
    --------
    >>> compose([5, 1, 3], ["mlp", "cnn", "mlp"])
    [[1], [2], [0]]
    >>> [len(cohort) for cohort in compose(range(34), ["cnn"] * 33 + ["mlp"])]
    [3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 1]
    """
    width = width or max(1, -(-len(partitions) // COHORTS))
    groups: dict[str, list[int]] = {}
    for position in sorted(range(len(partitions)), key=partitions.__getitem__):
        groups.setdefault(archs[position], []).append(position)
    return [group[start : start + width] for group in groups.values() for start in range(0, len(group), width)]


def longest_first(costs: Sequence[float]) -> list[int]:
    """Order cohorts for dispatch so that no worker is left with a long one at the end.

    Parameters
    ----------
    costs : sequence of float
        Expected seconds of each cohort, or anything that grows with them.

    Returns
    -------
    list of int
        Indices of the cohorts, longest first, ties in the order given.

    Examples
    --------
    >>> longest_first([20.0, 50.0, 20.0])
    [1, 0, 2]
    """
    return sorted(range(len(costs)), key=lambda index: -costs[index])


def in_tasks(order: Sequence[int], costs: Sequence[float], workers: int) -> list[list[int]]:
    """Put short cohorts together: handing out a task costs about a millisecond, whatever is in it.

    Parameters
    ----------
    order : sequence of int
        Cohorts, longest first.
    costs : sequence of float
        Expected seconds of each cohort.
    workers : int
        Worker processes; each gets at least two tasks if there are as many cohorts.

    Returns
    -------
    list of list of int
        Cohorts of each task, in the order of dispatch.

    Examples
    --------
    >>> in_tasks([0, 1, 2, 3, 4], [1.0, 1.0, 0.001, 0.001, 0.001], workers=1)
    [[0], [1], [2, 3, 4]]
    """
    most = -(-len(order) // (2 * workers))
    tasks: list[list[int]] = []
    seconds = 0.0
    for number in order:
        if not tasks or len(tasks[-1]) == most or seconds + costs[number] > TASK_SECONDS:
            tasks.append([])
            seconds = 0.0
        tasks[-1].append(number)
        seconds += costs[number]
    return tasks


class Costs:
    """Seconds per sample of each architecture, as measured; they decide in which order cohorts start, nothing else.

    Examples
    --------
    >>> costs = Costs()
    >>> costs.of("cnn", 10) == costs.of("mlp", 10)
    True
    >>> costs.learn("cnn", samples=100, seconds=2.0)
    >>> costs.learn("mlp", samples=100, seconds=1.0)
    >>> costs.of("cnn", 10), costs.of("mlp", 10)
    (0.2, 0.1)
    """

    def __init__(self) -> None:
        self._rates: dict[str, float] = {}

    def of(self, arch: str, samples: int) -> float:
        """Return the expected seconds of a cohort; an architecture not seen yet costs as much as the dearest."""
        return samples * self._rates.get(arch, max(self._rates.values(), default=1.0))

    def learn(self, arch: str, samples: int, seconds: float) -> None:
        """Take in what a cohort took; recent cohorts count most, since load changes."""
        rate = seconds / max(samples, 1)
        self._rates[arch] = 0.5 * (self._rates.get(arch, rate) + rate)
