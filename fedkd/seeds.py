"""Randomness: one generator for each (run seed, purpose, round, partition id), so that no draw disturbs another.

Resuming needs no stored generator state, and the number of workers cannot change a result.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum

import numpy as np
import torch


class Purpose(IntEnum):
    """What a random draw is for. The numbers are part of every result: never renumber, only append."""

    DATA = 1  # synthetic data, subsets
    PARTITION = 2
    LOCAL_SPLIT = 3
    PROXY = 4
    SERVER_LABELS = 5
    ARCHITECTURE = 6  # which client has which model
    MODEL_INIT = 7
    SELECTION = 8
    BATCHES = 9  # order of a client's private samples
    AUGMENTATION = 10
    DROPOUT = 11
    DIGEST = 12  # order of proxy samples on a client
    DISTILLATION = 13  # order of proxy samples on the server
    PROXY_SUBSET = 14  # which proxy samples a round uses
    METHOD_CLIENT = 15  # anything private to a method, on a client
    METHOD_SERVER = 16  # the same on the server
    DEVICE = 17  # how fast a client is, and the hours of its day
    AVAILABILITY = 18  # whether a client can be reached in a round
    CLIENT_DROPOUT = 19  # whether it drops out in the middle of one
    FAULT = 20  # injected faults of clients, stragglers
    ATTACKERS = 21  # which clients attack
    ATTACK = 22  # what they send where it is random


def _sequence(seed: int, purpose: Purpose, round: int, partition: int) -> np.random.SeedSequence:
    return np.random.SeedSequence([seed, int(purpose), round, partition])


def rng(seed: int, purpose: Purpose, round: int = 0, partition: int = 0) -> np.random.Generator:
    """Return the NumPy generator of one purpose.

    Parameters
    ----------
    seed : int
        The run's seed, non-negative.
    purpose : Purpose
        What the draws are for.
    round : int
        Communication round, from 1; 0 for what happens once.
    partition : int
        Partition id of the client; 0 for the server.

    Examples
    --------
    >>> a = rng(0, Purpose.BATCHES, round=3, partition=7).permutation(5)
    >>> b = rng(0, Purpose.BATCHES, round=3, partition=7).permutation(5)
    >>> (a == b).all()
    np.True_
    """
    return np.random.default_rng(_sequence(seed, purpose, round, partition))


def torch_seed(seed: int, purpose: Purpose, round: int = 0, partition: int = 0) -> int:
    """Return a 63-bit seed for PyTorch, with the parameters of `rng`."""
    return int(_sequence(seed, purpose, round, partition).generate_state(1, np.uint64)[0] >> 1)


def torch_rng(
    seed: int, purpose: Purpose, round: int = 0, partition: int = 0, device: str | torch.device = "cpu"
) -> torch.Generator:
    """Return the PyTorch generator of one purpose on `device`, with the parameters of `rng`."""
    return torch.Generator(device=device).manual_seed(torch_seed(seed, purpose, round, partition))


@contextmanager
def seeded(seed: int, device: str | torch.device = "cpu") -> Iterator[None]:
    """Let torch's global generators, of which dropout draws, begin at a seed; afterwards they are as they were."""
    on_gpu = torch.device(device).type == "cuda"
    with torch.random.fork_rng(devices=[torch.device(device)] if on_gpu else []):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would set those of all devices
        if on_gpu:
            torch.cuda.manual_seed_all(seed)
        yield
