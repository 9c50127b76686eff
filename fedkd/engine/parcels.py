"""Sums that come home in the reply of a task.

Ray puts an object of more than 100 KiB into the object store, where it costs the raylet and the driver milliseconds of
a core: a good part of a round of small models. Sums that fit into a few packets are returned as so many objects, which
travel in the reply itself. How many objects a task returns is settled when it is handed out, so the caller goes by what
the last one would have taken.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

PACKET = 96 << 10
"""Bytes of a packet; Ray's limit is for an object with all that it adds."""

MOST = 24
"""Packets of a value; what takes more is no slower through the object store."""

ALIGN = 64
"""Arrays begin at multiples of so many bytes."""


_PLAIN = torch.float64, torch.float32, torch.int64, torch.int32, torch.uint8, torch.bool  # that NumPy has too


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

    Tensors in CPU memory travel as arrays:

    >>> import torch
    >>> first, *packets = pack({"w": torch.ones(3)}, 1)
    >>> first.sizes, unpack(first, packets)[0]
    ([12], {'w': tensor([1., 1., 1.])})
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
        (head, sizes), numbers = first, memoryview(bytearray().join(packets))
        starts = accumulate((_padded(size) for size in sizes), initial=0)
        value = pickle.loads(head, buffers=[numbers[at : at + size] for at, size in zip(starts, sizes)])
    else:
        value, (head, arrays) = first, _split(first)
        sizes = [len(array) for array in arrays]
    wanted = _packets(sizes)
    return value, wanted if wanted <= MOST and len(head) + sum(sizes) > PACKET else 0


def _split(value: Any) -> tuple[bytes, list[memoryview]]:
    buffers: list[pickle.PickleBuffer] = []
    file = io.BytesIO()
    _pickler()(file, protocol=5, buffer_callback=buffers.append).dump(value)
    return file.getvalue(), [buffer.raw() for buffer in buffers]


@cache
def _pickler() -> Any:
    """Return the class of a pickler by which a worker knows classes of the driver's ``__main__``."""
    from ray import cloudpickle  # Ray costs half a second; who runs inline does not pay for it

    class Pickler(cloudpickle.CloudPickler):  # pyright: ignore[reportPrivateImportUsage]
        def reducer_override(self, obj: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
            if type(obj) is Tensor and obj.device.type == "cpu" and obj.dtype in _PLAIN and not obj.requires_grad:
                return torch.from_numpy, (obj.numpy(),)  # tensors would be copied into the pickle
            return super().reducer_override(obj)

    return Pickler


def _padded(size: int) -> int:
    return size + -size % ALIGN


def _packets(sizes: Sequence[int]) -> int:
    return -(-sum(map(_padded, sizes)) // PACKET)
