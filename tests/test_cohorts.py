import math

from hypothesis import given
from hypothesis import strategies as st

from fedkd.cohorts import compose, longest_first


def test_cohorts_are_sorted_and_of_one_architecture():
    # 5 clients: ceil(5 / 16) = 1 each
    assert compose([9, 2, 7, 4, 5], ["a", "b", "a", "b", "a"]) == [[1], [3], [4], [2], [0]]


def test_width_is_a_sixteenth_rounded_up():
    cohorts = compose(list(range(100)), ["a"] * 100)

    assert [len(cohort) for cohort in cohorts] == [7] * 14 + [2]
    assert cohorts[0] == [0, 1, 2, 3, 4, 5, 6]


def test_nobody_selected():
    assert compose([], []) == []
    assert longest_first([]) == []


@given(st.lists(st.tuples(st.integers(0, 10_000), st.sampled_from("abc")), unique_by=lambda c: c[0], max_size=200))
def test_every_client_is_in_one_cohort_whatever_the_order(clients):
    cohorts = compose([p for p, _ in clients], [a for _, a in clients])

    as_partitions = [[clients[i][0] for i in cohort] for cohort in cohorts]
    assert sorted(p for cohort in as_partitions for p in cohort) == sorted(p for p, _ in clients)
    assert all(len({clients[i][1] for i in cohort}) == 1 for cohort in cohorts)
    assert all(len(cohort) <= max(1, math.ceil(len(clients) / 16)) for cohort in cohorts)

    backwards = clients[::-1]
    again = compose([p for p, _ in backwards], [a for _, a in backwards])
    assert [[backwards[i][0] for i in cohort] for cohort in again] == as_partitions


def test_longest_cohort_goes_first():
    assert longest_first([5, 7, 5]) == [1, 0, 2]


def test_width_can_be_set():
    assert compose([3, 1, 2], ["a", "a", "a"], width=2) == [[1, 2], [0]]
