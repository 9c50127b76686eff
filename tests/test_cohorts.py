import math
import operator

from hypothesis import given
from hypothesis import strategies as st

from fedkd.cohorts import Parts, compose, in_tasks


def test_cohorts_are_sorted_and_of_one_architecture():
    # 5 clients: ceil(5 / 16) = 1 each
    assert compose([9, 2, 7, 4, 5], ["a", "b", "a", "b", "a"]) == [[1], [3], [4], [2], [0]]


def test_there_are_sixteen_cohorts_of_almost_equal_size():
    cohorts = compose(list(range(100)), ["a"] * 100)

    assert [len(cohort) for cohort in cohorts] == [6, 6, 6, 7] * 4
    assert cohorts[0] == [0, 1, 2, 3, 4, 5]
    assert [len(cohort) for cohort in compose(range(40), ["a"] * 20 + ["b"] * 20)] == [2, 3] * 8


def test_nobody_selected():
    assert compose([], []) == []
    assert in_tasks([], 2) == []


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


@given(st.lists(st.floats(1e-4, 10), max_size=40), st.integers(1, 5))
def test_tasks_hold_every_cohort_once_and_long_ones_go_first(costs, workers):
    tasks = in_tasks(costs, workers)

    assert sorted(number for task in tasks for number in task) == list(range(len(costs)))
    seconds = [sum(costs[number] for number in task) for task in tasks]
    assert seconds == sorted(seconds, reverse=True)
    assert all(len(task) == 1 or total <= 0.5 for task, total in zip(tasks, seconds))
    assert all(task.start % (1 << (len(task) - 1).bit_length()) == 0 for task in tasks)  # each is one block of the tree


@given(st.data(), st.integers(1, 40))
def test_parts_are_merged_alike_whoever_merges_what(data, count):
    there = data.draw(st.sets(st.integers(0, count - 1), min_size=1))
    alone = Parts(lambda a, b: f"({a} {b})")
    for number in sorted(there):
        alone.add(number, str(number))

    whole = Parts(lambda a, b: f"({a} {b})")
    for task in data.draw(st.permutations(in_tasks([0.02] * count, 2))):
        part = Parts(lambda a, b: f"({a} {b})")
        for number in data.draw(st.permutations(sorted(there.intersection(task)))):
            part.add(number, str(number))
        for level, index, value in part.loose():
            whole.add(index, value, level)
    assert whole.result() == alone.result()


@given(st.lists(st.tuples(st.floats(-1e6, 1e6), st.floats(1e-4, 1)), min_size=1, max_size=40), st.data())
def test_sums_of_one_two_and_eight_workers_have_the_same_bits(cohorts, data):
    values, costs = zip(*cohorts)

    def total(workers):
        whole = Parts(operator.add)
        for task in data.draw(st.permutations(in_tasks(costs, workers))):  # in the order in which they end
            part = Parts(operator.add)
            for number in task:
                part.add(number, values[number])
            for level, index, value in part.loose():
                whole.add(index, value, level)
        return whole.result().hex()

    assert total(1) == total(2) == total(8)


def test_nothing_to_merge():
    assert Parts(max).result() is None


def test_width_can_be_set():
    assert compose([3, 1, 2], ["a", "a", "a"], width=2) == [[1], [2, 0]]
