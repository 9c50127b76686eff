"""Placement: numbers worked out by hand, refusals with advice, and that what is chosen really fits."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkd.engine.placement import Cost, Node, place
from fedkd.errors import RunError

GB = 10**9
CNN = Cost("cnn", 32, 0.5, host_bytes=GB, gpu_bytes=2 * GB)


# --- CPUs ---------------------------------------------------------------------------------------------------


def test_one_worker_for_each_cpu():
    placement = place([Node(4)], [CNN])
    assert (placement.workers, placement.gpu_fraction, placement.cohort) == (4, 0.0, 0)
    assert str(placement) == "fits 1 client per CPU, 4 workers; round ≈ 4 s"  # 32 clients of 0.5 s


def test_no_more_workers_than_memory_holds():
    assert place([Node(4, memory=9 * GB)], [CNN], host_bytes=2 * GB).workers == 3
    assert place([Node(4, memory=9 * GB), Node(4, memory=4 * GB), Node(1)], [CNN], host_bytes=2 * GB).workers == 5


def test_a_cohort_that_is_computed_as_one_needs_its_memory_at_once():
    # 32 selected clients make cohorts of two.
    placement = place([Node(4, memory=9 * GB)], [CNN], batched=True, host_bytes=GB)
    assert (placement.workers, placement.together, placement.cohort) == (3, 2, 0)
    assert place([Node(4, memory=9 * GB)], [CNN], batched=True, host_bytes=GB, cohort=8).workers == 1


def test_width_on_cpus_does_not_depend_on_the_machine():
    widths = {place([Node(n)], [CNN], batched=True, workers=w).together for n in (2, 8) for w in (0, 1, 2)}
    assert widths == {2}


def test_one_cohort_cannot_be_divided():
    # Two clients, one in each cohort: eight CPUs do not make them faster than one client.
    assert place([Node(8)], [Cost("cnn", 2, 3.0)]).seconds == 3.0


def test_nothing_measured_is_no_obstacle():
    assert str(place([Node(2, memory=GB)], [])) == "fits 1 client per CPU, 2 workers"
    assert place([Node(2, 1, 8 * GB)], []).workers == 2


# --- GPUs ---------------------------------------------------------------------------------------------------


def test_a_gpu_is_shared_by_workers_with_cohorts_as_wide_as_memory_allows():
    # 0.9 * 20 GB = 18 GB; two workers with 9 GB, of which 1 GB is taken before the first client: 8 / 2 = 4 clients.
    placement = place([Node(8, 1, 20 * GB)], [CNN], batched=True, gpu_bytes=GB)
    assert (placement.workers, placement.gpu_fraction, placement.cohort) == (2, 0.5, 4)
    assert str(placement) == "fits 8 clients per GPU, 2 workers per GPU; round ≈ 16 s"


def test_cohorts_are_no_wider_than_the_selection_needs():
    assert place([Node(8, 1, 800 * GB)], [CNN], batched=True).cohort == 16
    assert place([Node(8, 1)], [CNN], batched=True).cohort == 16  # a logical GPU has no memory that we know
    assert place([Node(8, 3)], [CNN], batched=True).cohort == 6  # 32 clients for six workers


def test_the_widest_architecture_in_memory_bounds_the_width_of_all():
    costs = [Cost("mlp", 50, 0.1, gpu_bytes=GB // 10), Cost("resnet", 50, 1.0, gpu_bytes=3 * GB)]
    assert place([Node(8, 1, 20 * GB)], costs, batched=True).cohort == 3


def test_one_after_another_leaves_the_width_alone():
    placement = place([Node(8, 1, 80 * GB)], [CNN])
    assert (placement.workers, placement.gpu_fraction, placement.cohort, placement.per_gpu) == (4, 0.25, 0, 4)


def test_fewer_workers_share_a_small_gpu():
    assert place([Node(8, 1, 10 * GB)], [CNN], gpu_bytes=GB).per_gpu == 3  # 9 GB, three for each
    assert place([Node(8, 1, 4 * GB)], [CNN], gpu_bytes=GB).per_gpu == 1
    assert place([Node(8, 1, 10 * GB)], [CNN], batched=True, cohort=4).per_gpu == 1


def test_three_workers_are_packed_by_ray():
    assert place([Node(8, 1)], [CNN], workers=3).gpu_fraction == 0.3333


def test_several_gpus_and_few_cpus():
    assert place([Node(16, 3)], [CNN]).workers == 12
    assert place([Node(3, 3)], [CNN]).workers == 3
    assert place([Node(2, 3)], [CNN]).workers == 2


def test_the_smallest_gpu_bounds_the_width_and_nodes_without_gpu_get_no_workers():
    nodes = [Node(8, 1, 80 * GB), Node(8, 1, 20 * GB), Node(64)]
    placement = place(nodes, [CNN], batched=True, gpu_bytes=GB)
    assert (placement.workers, placement.cohort) == (4, 4)


def test_what_the_user_asks_for_is_kept():
    node = Node(8, 2, 20 * GB)
    assert place([node], [CNN], workers=4).gpu_fraction == 0.5
    assert place([node], [CNN], gpu_fraction=0.4).workers == 4
    assert place([node], [CNN], gpu_fraction=0.3, workers=1, cohort=5, batched=False).cohort == 5
    placement = place([node], [CNN], batched=True, cohort=3)
    assert (placement.workers, placement.cohort) == (4, 3)


def test_workers_go_where_cpus_are():
    placement = place([Node(1, 1), Node(8, 1)], [CNN], workers=4)
    assert placement.per_gpu == 3  # one beside the first GPU, three beside the second


# --- what cannot fit ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nodes", "wishes", "said"),
    [
        (
            [Node(4, memory=GB)],
            {},
            ["1 worker with 1 client of cnn", "needs 1.5 GB", "1.0 GB can be had", "batch_size"],
        ),
        ([Node(4, memory=4 * GB)], {"workers": 4}, ["4 workers", "set system.workers to 2"]),
        ([Node(4, memory=2 * GB)], {"batched": True}, ["2 clients of cnn", "smaller system.cohort"]),
        ([Node(2)], {"workers": 3}, ["3 workers need a CPU each", "room for 2", "fewer workers"]),
        ([Node(4, 1, 2 * GB)], {}, ["a client of cnn does not fit on a GPU", "needs 2.5 GB", 'device = "cpu"', "bf16"]),
        ([Node(8, 1, 8 * GB)], {"workers": 4}, ["a worker has 1.8 GB", "4 workers on 8.0 GB", "system.workers to 2"]),
        ([Node(8, 1, 8 * GB)], {"gpu_fraction": 0.2}, ["5 workers on 8.0 GB", "system.workers to 2"]),
        ([Node(8, 1, 20 * GB)], {"batched": True, "cohort": 9}, ["9 clients", "need 18 GB", "system.cohort to 8"]),
        ([Node(8, 2)], {"workers": 3, "gpu_fraction": 0.6}, ["3 workers with 0.6", "1 can share", "are 2 GPUs"]),
    ],
)
def test_what_cannot_fit_is_refused_with_advice(nodes, wishes, said):
    with pytest.raises(RunError) as refused:
        place(nodes, [CNN], host_bytes=GB // 2, gpu_bytes=GB // 2, **wishes)
    assert all(words in str(refused.value) for words in said), refused.value


# --- whatever is chosen fits --------------------------------------------------------------------------------

NODES = st.builds(
    Node,
    cpus=st.integers(0, 12),
    gpus=st.integers(0, 4),
    gpu_bytes=st.sampled_from([0, 4 * GB, 10 * GB, 80 * GB]),
    memory=st.sampled_from([0, 3 * GB, 16 * GB]),
)
COSTS = st.builds(
    Cost,
    arch=st.sampled_from(["mlp", "cnn"]),
    clients=st.integers(1, 200),
    seconds=st.floats(0, 10),
    host_bytes=st.integers(0, 2 * GB),
    gpu_bytes=st.integers(0, 5 * GB),
)


def pack(nodes, placement):
    """Put workers where there is room, as Ray does; return how many found none."""
    left = placement.workers
    for node in nodes:
        cpus, memory = int(node.cpus), node.memory or 10**15
        for _ in range(int(node.gpus) if placement.gpu_fraction else 1):
            gpu = 10_000
            while left and cpus and memory >= placement.worker_bytes and gpu >= round(placement.gpu_fraction * 10_000):
                gpu -= round(placement.gpu_fraction * 10_000)
                cpus, memory, left = cpus - 1, memory - placement.worker_bytes, left - 1
    return left


@settings(max_examples=300, deadline=None)
@given(
    nodes=st.lists(NODES, min_size=1, max_size=4),
    costs=st.lists(COSTS, max_size=2),
    batched=st.booleans(),
    workers=st.integers(0, 6),
    gpu_fraction=st.sampled_from([0.0, 0.0, 0.1, 0.3333, 0.4, 0.5, 0.6, 1.0]),
    cohort=st.integers(0, 40),
    gpu_bytes=st.sampled_from([0, GB]),
)
def test_what_is_chosen_fits(nodes, costs, batched, workers, gpu_fraction, cohort, gpu_bytes):
    wishes = {"batched": batched, "workers": workers, "gpu_fraction": gpu_fraction, "cohort": cohort}
    try:
        placement = place(nodes, costs, gpu_bytes=gpu_bytes, host_bytes=GB // 4, **wishes)
    except RunError as refused:
        assert "\n" in str(refused)  # the second line says what to do
        return
    assert placement.workers >= 1 and (not workers or placement.workers == workers)
    assert not cohort or placement.cohort == cohort
    assert pack(nodes, placement) == 0
    for node in nodes:
        if placement.gpu_fraction and node.gpus and node.gpu_bytes:
            client = max((cost.gpu_bytes for cost in costs), default=0)
            assert placement.per_gpu * (gpu_bytes + placement.together * client) <= node.gpu_bytes
