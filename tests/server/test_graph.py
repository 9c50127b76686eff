"""Communication graphs and Metropolis weights against NumPy."""

import numpy as np
import pytest

from fedkd.errors import ScenarioError
from fedkd.server.graph import among, make_graph, metropolis

CLIENTS = [2, 3, 5, 7, 11, 13, 17]


def matrix(graph):
    """Return clients, adjacency and weights as dense matrices."""
    clients = sorted(graph)
    place = {client: i for i, client in enumerate(clients)}
    edges, weights = np.zeros((len(clients),) * 2), np.zeros((len(clients),) * 2)
    for client, others in graph.items():
        for other, weight in zip(others, metropolis(graph)[client], strict=True):
            edges[place[client], place[other]] = 1
            weights[place[client], place[other]] = weight
    np.fill_diagonal(weights, 1 - weights.sum(1))
    return edges, weights


def draw(kind, clients=CLIENTS, seed=0, **options):
    return make_graph(kind, clients, np.random.default_rng(seed), **options)


@pytest.mark.parametrize(
    ("kind", "options", "degrees"),
    [
        ("ring", {}, [2] * 7),
        ("complete", {}, [6] * 7),
        ("star", {}, [6, 1, 1, 1, 1, 1, 1]),
        ("regular", {"degree": 4}, [4] * 7),
        ("regular", {"degree": 3}, [4] * 7),  # seven clients cannot have three each
        ("regular", {"degree": 99}, [6] * 7),
        ("erdos-renyi", {"probability": 1.0}, [6] * 7),
    ],
)
def test_degrees(kind, options, degrees):
    edges, _ = matrix(draw(kind, **options))
    assert edges.sum(1).tolist() == degrees
    assert (edges == edges.T).all() and not edges.diagonal().any()


@pytest.mark.parametrize(
    ("kind", "options"),
    [("ring", {}), ("complete", {}), ("star", {}), ("regular", {"degree": 4}), ("erdos-renyi", {"probability": 0.4})],
)
def test_metropolis_weights_are_doubly_stochastic_and_lead_to_the_mean(kind, options):
    edges, weights = matrix(draw(kind, **options))
    degree = edges.sum(1)
    for i in range(7):
        for j in range(7):
            if edges[i, j]:
                assert weights[i, j] == pytest.approx(1 / (1 + max(degree[i], degree[j])))
            elif i != j:
                assert weights[i, j] == 0
    assert (weights == weights.T).all() and (weights >= 0).all()
    np.testing.assert_allclose(weights.sum(0), 1)
    np.testing.assert_allclose(np.linalg.matrix_power(weights, 500), np.full((7, 7), 1 / 7), atol=1e-9)
    if kind == "complete":
        np.testing.assert_allclose(weights, 1 / 7)


def test_an_edge_is_drawn_with_its_probability():
    graphs = [draw("erdos-renyi", list(range(12)), seed, probability=0.6) for seed in range(200)]
    edges = np.array([matrix(graph)[0].sum() / 2 for graph in graphs])
    assert edges.mean() == pytest.approx(0.6 * 66, abs=4 * np.sqrt(66 * 0.24 / 200))


def test_graphs_are_seeded_and_connected():
    assert draw("regular", seed=1) == draw("regular", seed=1) != draw("regular", seed=2)
    for seed in range(30):
        edges, _ = matrix(draw("erdos-renyi", seed=seed, probability=0.3))
        assert (np.linalg.matrix_power(edges + np.eye(7), 6) > 0).all()
    with pytest.raises(ScenarioError, match=r"raise strategy\.probability"):
        draw("erdos-renyi", list(range(50)), probability=0.01)


@pytest.mark.parametrize("kind", ["ring", "complete", "star", "erdos-renyi", "regular"])
def test_one_or_two_clients(kind):
    assert draw(kind, [4]) == {4: []}
    assert draw(kind, [9, 4]) == {9: [4], 4: [9]}
    assert metropolis({4: []}) == {4: []}


def test_those_who_are_away_are_nobodys_neighbours():
    ring = draw("ring", [0, 1, 2, 3])
    assert among(ring, [3, 0, 1]) == {0: [1, 3], 1: [0], 3: [0]}
    assert metropolis(among(ring, [0, 2])) == {0: [], 2: []}
