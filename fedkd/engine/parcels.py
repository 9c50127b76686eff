"""Sums that come home in the reply of a task.

Ray puts an object of more than 100 KiB into the object store, where it costs the raylet and the driver milliseconds of
a core: a good part of a round of small models. Sums that fit into a few packets are returned as so many objects, which
travel in the reply itself. How many objects a task returns is settled when it is handed out, so the caller goes by what
the last one would have taken.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

PACKET = 96 << 10
"""Bytes of a packet; Ray's limit is for an object with all that it adds."""

MOST = 24
"""Packets of a value; what takes more is no slower through the object store."""

ALIGN = 64
"""Arrays begin at multiples of so many bytes."""


class Parcel(NamedTuple):
    """A value whose arrays travel in packets."""

    head: bytes
    sizes: list[int]  # bytes of each array


def pack(value: Any, packets: int) -> list[Any]:
    """Return a value as a `Parcel` and so many packets, or as it is, with empty ones, if it takes more.

    Examples
    --------
    >>> import numpy as np
    >>> sums = {"w": np.arange(15_000.0)}
    >>> first, *packets = pack(sums, 2)
    >>> [len(packet) for packet in packets]
    [98304, 21696]
    >>> value, wanted = unpack(first, packets)
    >>> bool((value["w"] == sums["w"]).all()), wanted
    (True, 2)
    >>> unpack(*pack("small", 0))
    ('small', 0)
    """
    if not packets:
        return [value]
    head, arrays = _split(value)
    sizes = [len(array) for array in arrays]
    if _packets(sizes) > packets:
        return [value, *[b""] * packets]
    numbers = b"".join(part for array in arrays for part in (array, bytes(-len(array) % ALIGN)))
    return [Parcel(head, sizes), *(numbers[at : at + PACKET] for at in range(0, packets * PACKET, PACKET))]


def unpack(first: Any, packets: Sequence[bytes] = ()) -> tuple[Any, int]:
    """Return a value and how many packets it should travel in next time.

    Parameters
    ----------
    first : Parcel or Any
        The first object that `pack` returned.
    packets : sequence of bytes
        The others; default: none.

    Returns
    -------
    tuple of Any and int
        The value, whose arrays may be changed if they came in packets; 0 packets for one that fits into a single object
        of a reply, and for one that takes more than `MOST`.
    """
    if isinstance(first, Parcel):
        sizes, numbers = first.sizes, memoryview(bytearray().join(packets))
        starts = accumulate((_padded(size) for size in sizes), initial=0)
        value = pickle.loads(first.head, buffers=[numbers[at : at + size] for at, size in zip(starts, sizes)])
    else:
        value, sizes = first, [len(array) for array in _split(first)[1]]
    wanted = _packets(sizes)
    return value, wanted if 1 < wanted <= MOST else 0


def _split(value: Any) -> tuple[bytes, list[memoryview]]:
    from ray import cloudpickle  # by which a worker knows classes of the driver's __main__

    buffers: list[pickle.PickleBuffer] = []
    head = cloudpickle.dumps(value, protocol=5, buffer_callback=buffers.append)  # pyright: ignore[reportPrivateImportUsage]
    return head, [buffer.raw() for buffer in buffers]


def _padded(size: int) -> int:
    return size + -size % ALIGN


def _packets(sizes: Sequence[int]) -> int:
    return -(-sum(map(_padded, sizes)) // PACKET)
