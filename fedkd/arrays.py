"""Flower arrays that keep their numbers as they are, instead of as bytes of an .npy file.

`flwr.app.Array` writes every array with `numpy.save` and reads it back with `numpy.load`, once per client, message
and direction. Between processes of one machine neither is needed: a `BufferArray` is pickled as a buffer, which Ray
maps into the memory of every process, and makes the bytes only for whoever asks for them.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord
from flwr.common.constant import SType

_MAGIC = b"\x93NUMPY"


class BufferArray(Array):
    """A Flower array over an ndarray; a drop-in for ``Array(ndarray)``.

    Parameters
    ----------
    values : np.ndarray
        The numbers; shared, not copied, so nobody may change them afterwards.

    Examples
    --------
    >>> array = BufferArray(np.arange(3.0))
    >>> array == Array(np.arange(3.0)), array.shape, array.numpy()
    (True, (3,), array([0., 1., 2.]))
    """

    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def __init__(self, values: np.ndarray) -> None:
        if values.flags.writeable:
            values = values.view()
            values.flags.writeable = False
        self.__dict__.update(dtype=_name(values.dtype), shape=values.shape, stype=SType.NUMPY, _values=values)

    @property
    def data(self) -> bytes:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The array as bytes of an .npy file, as Flower keeps it."""
        buffer = io.BytesIO()
        np.save(buffer, self._values, allow_pickle=False)
        return buffer.getvalue()

    @property
    def _values(self) -> np.ndarray:
        return self.__dict__["_values"]

    def numpy(self) -> np.ndarray:
        """Return a copy that may be changed."""
        return self._values.copy()

    def view(self) -> np.ndarray:
        """Return the numbers themselves, which must not be changed."""
        return self._values

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Array):
            return NotImplemented
        ours = (self.dtype, tuple(self.shape), self.stype, self.data)
        return ours == (other.dtype, tuple(other.shape), other.stype, other.data)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._values,)


def array_record(arrays: Mapping[str, np.ndarray]) -> ArrayRecord:
    """Return arrays as a Flower record of `BufferArray`; of a dict, ``ArrayRecord`` itself would make bytes.

    Examples
    --------
    >>> array_record({"w": np.ones(2)})["w"].view()
    array([1., 1.])
    """
    made = ArrayRecord()
    for name, values in arrays.items():
        made[name] = BufferArray(values)
    return made


@cache
def _name(dtype: np.dtype) -> str:
    return str(dtype)


def view(array: Array) -> np.ndarray:
    """Return the numbers of any Flower array without copying them; they must not be changed.

    Raises
    ------
    ValueError, TypeError
        The array does not hold the bytes of an .npy file.

    Examples
    --------
    >>> view(Array(np.ones((1, 2), np.float32)))
    array([[1., 1.]], dtype=float32)
    """
    if isinstance(array, BufferArray):
        return array.view()
    if array.stype != SType.NUMPY or not array.data.startswith(_MAGIC):
        return array.numpy()  # says what is wrong
    file = io.BytesIO(array.data)
    version = np.lib.format.read_magic(file)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read_header(file)
    if dtype.hasobject:
        return array.numpy()
    count = int(np.prod(shape, dtype=np.int64))
    flat = np.frombuffer(array.data, dtype, count, offset=file.tell())
    return flat.reshape(shape, order="F" if fortran else "C")


def buffered(record: ArrayRecord) -> ArrayRecord:
    """Return a record of the same numbers in `BufferArray` form; arrays that cannot be read stay as they are."""
    if all(isinstance(array, BufferArray) for array in record.values()):
        return record
    twin = ArrayRecord()
    for name, array in record.items():
        try:
            twin[name] = array if isinstance(array, BufferArray) else BufferArray(view(array))
        except (TypeError, ValueError):
            twin[name] = array
    return twin
