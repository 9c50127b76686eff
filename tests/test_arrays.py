import pickle

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedkd.arrays import BufferArray, buffered, view

NUMBERS = hnp.arrays(
    st.sampled_from([np.float32, np.float64, np.int64, np.int8, np.bool_]),
    hnp.array_shapes(min_dims=0, max_dims=3, min_side=0),
    elements={"allow_nan": False},
)


@given(NUMBERS)
def test_a_buffer_array_is_flowers_array_in_all_but_its_copies(values):
    ours, theirs = BufferArray(values), Array(values)

    assert ours == theirs and theirs == ours
    assert (ours.dtype, ours.shape, ours.stype) == (theirs.dtype, theirs.shape, theirs.stype)
    assert np.array_equal(ours.numpy(), theirs.numpy()) and ours.numpy().dtype == theirs.numpy().dtype
    assert np.array_equal(view(theirs), values) and np.array_equal(view(ours), values)
    assert (
        RecordDict({"a": ArrayRecord({"w": ours})}).object_id == RecordDict({"a": ArrayRecord({"w": theirs})}).object_id
    )


def test_copies_may_be_changed_and_views_may_not():
    ours = BufferArray(np.arange(3.0))

    ours.numpy()[0] = 5.0
    assert ours.numpy().tolist() == [0.0, 1.0, 2.0]
    with pytest.raises(ValueError, match="read-only"):
        ours.view()[0] = 5.0
    with pytest.raises(ValueError, match="read-only"):
        view(Array(np.arange(3.0)))[0] = 5.0


def test_the_numbers_travel_as_a_buffer():
    array, buffers = BufferArray(np.zeros(10_000)), []
    stream = pickle.dumps(array, protocol=5, buffer_callback=buffers.append)

    assert len(stream) < 1_000
    assert sum(buffer.raw().nbytes for buffer in buffers) == 80_000
    assert pickle.loads(stream, buffers=buffers) == array


def test_fortran_order_is_read_without_a_copy():
    values = np.asfortranarray(np.arange(6).reshape(2, 3))

    assert np.array_equal(view(Array(values)), values)


@pytest.mark.parametrize(
    ("stype", "data"), [("numpy.ndarray", b"no npy file"), ("numpy.ndarray", b"\x93NUMPY\x01\x00"), ("torch", b"")]
)
def test_what_is_no_npy_file_is_refused_and_travels_as_it_is(stype, data):
    broken = Array("float32", (2,), stype, data)

    with pytest.raises((ValueError, TypeError)):
        view(broken)
    assert buffered(ArrayRecord({"w": broken}))["w"] == broken


def test_a_header_that_promises_more_than_there_is_is_refused():
    data = Array(np.zeros(4)).data[:-8]

    with pytest.raises(ValueError):
        view(Array("float64", (4,), "numpy.ndarray", data))


def test_objects_are_never_unpickled():
    header = Array(np.zeros(1)).data.replace(b"<f8", b"|O8")

    with pytest.raises(ValueError):
        view(Array("object", (1,), "numpy.ndarray", header))
