"""Cohorts: which clients are handed to a worker together, and which cohort goes first.

Composition depends on the selection alone, never on the number of workers or on measured time, so whatever is
computed for a cohort as a whole has the same bits wherever the cohort runs.
"""

from collections.abc import Sequence

COHORTS = 16
"""Cohorts that a selection of one architecture is cut into: enough to balance a machine's workers."""


def compose(partitions: Sequence[int], archs: Sequence[str]) -> list[list[int]]:
    """Divide the selected clients into cohorts of one architecture each.

    Parameters
    ----------
    partitions : sequence of int
        Partition ids of the selected clients, in any order, without repetition.
    archs : sequence of str
        Architecture of each of them.

    Returns
    -------
    list of list of int
        Positions into `partitions`, sorted by partition id within a cohort. A cohort is ``ceil(n / 16)``
        wide, n being the number of selected clients; the last of an architecture may be narrower.

    Examples
    --------
    >>> compose([5, 1, 3], ["mlp", "cnn", "mlp"])
    [[1], [2], [0]]
    >>> [len(cohort) for cohort in compose(range(34), ["cnn"] * 33 + ["mlp"])]
    [3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 1]
    """
    width = max(1, -(-len(partitions) // COHORTS))
    groups: dict[str, list[int]] = {}
    for position in sorted(range(len(partitions)), key=partitions.__getitem__):
        groups.setdefault(archs[position], []).append(position)
    return [group[start : start + width] for group in groups.values() for start in range(0, len(group), width)]


def longest_first(cohorts: Sequence[Sequence[int]], num_examples: Sequence[int]) -> list[int]:
    """Order cohorts for dispatch so that no worker is left with a long one at the end.

    Parameters
    ----------
    cohorts : sequence of sequence of int
        Positions, as `compose` returns them.
    num_examples : sequence of int
        Training samples of the client at each position.

    Returns
    -------
    list of int
        Indices into `cohorts`, most samples first, ties in the order given.

    Examples
    --------
    >>> longest_first([[0, 1], [2], [3]], [10, 10, 50, 20])
    [1, 0, 2]
    """
    samples = [sum(int(num_examples[position]) for position in cohort) for cohort in cohorts]
    return sorted(range(len(cohorts)), key=lambda index: -samples[index])
