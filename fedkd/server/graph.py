"""Communication graphs: who talks to whom where clients exchange knowledge with neighbours, and with which weight."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import numpy as np

from fedkd.errors import ScenarioError

Graph = dict[int, list[int]]
"""Neighbours of every client, ascending; whoever is a neighbour of another has that one as its own."""

Kind = Literal["ring", "complete", "star", "erdos-renyi", "regular"]
DRAWS = 100


def make_graph(
    kind: Kind, clients: Sequence[int], rng: np.random.Generator, *, degree: int = 4, probability: float = 0.5
) -> Graph:
    """Return a connected, undirected graph.

    Parameters
    ----------
    kind : str
        ``ring``; ``complete``; ``star`` around the first client; ``erdos-renyi``, in which every edge is there with
        `probability`; ``regular``, drawn among all graphs in which every client has `degree` neighbours. Random ones
        are drawn again until they are connected.
    clients : sequence of int
        Partition ids.
    rng : np.random.Generator
        Of the random graphs.
    degree : int
        Neighbours of each client in a regular graph; all others where there are fewer. An odd number of clients
        cannot have an odd degree each: then it is one more.
    probability : float
        Of an edge, in (0, 1].

    Raises
    ------
    ScenarioError
        No connected graph was found.

    Examples
    --------
    >>> make_graph("ring", [3, 5, 8, 9], np.random.default_rng(0))
    {3: [5, 9], 5: [3, 8], 8: [5, 9], 9: [3, 8]}
    >>> make_graph("star", [3, 5, 8], np.random.default_rng(0))
    {3: [5, 8], 5: [3], 8: [3]}
    """
    import networkx as nx  # takes a tenth of a second, so only where it is needed

    count = len(clients)
    if count < 3:  # all of them are the same, and networkx gives one client a loop
        return {client: [other for other in sorted(clients) if other != client] for client in clients}
    degree = min(degree, count - 1)
    draw = {
        "ring": lambda: nx.cycle_graph(count),
        "complete": lambda: nx.complete_graph(count),
        "star": lambda: nx.star_graph(count - 1),
        "erdos-renyi": lambda: nx.gnp_random_graph(count, probability, seed=rng),
        "regular": lambda: nx.random_regular_graph(degree + count * degree % 2, count, seed=rng),
    }
    for _ in range(DRAWS):
        graph = draw[kind]()
        if nx.is_connected(graph):
            return {clients[node]: sorted(clients[other] for other in graph[node]) for node in range(count)}
    raise ScenarioError(
        f"no graph of {DRAWS} drawn among {count} clients was connected",
        key="strategy.graph",
        hint="raise strategy.probability or strategy.degree, or take a ring",
    )


def among(graph: Graph, clients: Iterable[int]) -> Graph:
    """Return the part of a graph between some clients.

    Examples
    --------
    >>> among({0: [1, 2], 1: [0, 2], 2: [0, 1]}, [0, 2])
    {0: [2], 2: [0]}
    """
    present = set(clients)
    return {client: [other for other in graph[client] if other in present] for client in sorted(present)}


def metropolis(graph: Mapping[int, Sequence[int]]) -> dict[int, list[float]]:
    """Return the weight of each neighbour, 1 / (1 + the larger of the two degrees); the rest is a client's own.

    The matrix of weights is symmetric and its rows sum to one, so repeated averaging ends, on a connected graph, at the
    mean of all clients.

    Notes
    -----
    Xiao, Boyd, Lall, A Scheme for Robust Distributed Sensor Fusion Based on Average Consensus, IPSN 2005.

    Examples
    --------
    >>> metropolis({0: [1], 1: [0, 2], 2: [1]})
    {0: [0.3333333333333333], 1: [0.3333333333333333, 0.3333333333333333], 2: [0.3333333333333333]}
    """
    degree = {client: len(others) for client, others in graph.items()}
    return {
        client: [1 / (1 + max(degree[client], degree[other])) for other in others] for client, others in graph.items()
    }
