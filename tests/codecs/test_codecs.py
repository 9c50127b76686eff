"""The quantiser against every vector of the grid; symbols and coder lossless, and as short as entropy lets them be."""

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkd.codecs import from_symbols, quantise, symbols
from fedkd.codecs.entropy import decode, encode, library
from fedkd.codecs.quantise import shapes
from fedkd.errors import KnowledgeError, ScenarioError


def grid(classes, bits):
    """Every vector of levels that sums to 2^bits - 1, one by one."""
    top = 2**bits - 1
    return np.array([levels for levels in product(range(top + 1), repeat=classes) if sum(levels) == top])


@pytest.mark.parametrize(("classes", "bits"), [(2, 1), (2, 4), (3, 1), (3, 2), (3, 3), (4, 2), (5, 2)])
def test_no_vector_of_the_grid_is_closer(classes, bits):
    every = grid(classes, bits)
    probs = np.random.default_rng(classes + bits).dirichlet(np.full(classes, 0.7), size=200)

    found = quantise(torch.from_numpy(probs), bits).numpy()

    assert found.dtype == np.int32 and (found.sum(1) == 2**bits - 1).all() and (found >= 0).all()
    distances = np.abs(probs[:, None] - every / (2**bits - 1))  # [200, vectors, classes]
    mine = np.abs(probs - found / (2**bits - 1))
    for norm in (lambda d: d.sum(-1), lambda d: np.sqrt((d**2).sum(-1)), lambda d: d.max(-1)):
        np.testing.assert_allclose(norm(mine), norm(distances).min(1), rtol=0, atol=1e-12)


def test_one_bit_is_the_largest_entry_and_ties_go_to_the_lowest_class():
    probs = torch.tensor([[0.2, 0.5, 0.3], [0.4, 0.2, 0.4], [0.25, 0.25, 0.5], [0.0, 0.0, 1.0]])
    assert quantise(probs, 1).argmax(1).tolist() == [1, 0, 2, 2]
    assert quantise(probs, 1).sum(1).tolist() == [1, 1, 1, 1]


def test_more_bits_by_hand():
    # (0.5, 0.3, 0.2) · 3 = (1.5, 0.9, 0.6): down to (1, 0, 0); two steps are missing, for 0.9 and 0.6.
    assert quantise(torch.tensor([[0.5, 0.3, 0.2]]), 2).tolist() == [[1, 1, 1]]
    # · 7 = (3.5, 2.1, 1.4): down to (3, 2, 1); one step is missing, for 0.5.
    assert quantise(torch.tensor([[0.5, 0.3, 0.2]]), 3).tolist() == [[4, 2, 1]]
    # What is on the grid stays; sums that are off by rounding do not matter.
    assert quantise(torch.tensor([[1 / 3, 2 / 3, 0.0]]) * 1.00001, 2).tolist() == [[1, 2, 0]]
    error = (quantise(torch.tensor([[0.123, 0.456, 0.421]]), 16) / 65535 - torch.tensor([[0.123, 0.456, 0.421]])).abs()
    assert float(error.max()) < 1 / 65535


@pytest.mark.parametrize("bits", [0, 17, -1])
def test_other_numbers_of_bits_are_refused(bits):
    with pytest.raises(ValueError, match="bits must be from 1 to 16"):
        quantise(torch.tensor([[1.0]]), bits)


def test_changes_by_hand():
    before, now = torch.tensor([[3, 0, 0], [0, 1, 2]]), torch.tensor([[2, 1, 0], [0, 1, 2]])
    [(values, alphabet)] = symbols(now, 2, before)
    assert alphabet == 4 and values.tolist() == [[3, 0], [1, 0]]  # -1 and +1 around a circle of 4; the last follows
    [(values, alphabet)] = symbols(now, 2)
    assert values.tolist() == [[2, 0], [1, 1]]
    # Twelve bits: 0x123 is 1 and 0x23.
    levels = torch.tensor([[0x123, 0xFFF - 0x123]])
    assert [(v.tolist(), a) for v, a in symbols(levels, 12)] == [([[1]], 16), ([[0x23]], 256)]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    samples=st.sampled_from([0, 1, 2, 9, 130]),
    classes=st.integers(2, 12),
    bits=st.integers(1, 16),
    delta=st.booleans(),
)
def test_decoding_gives_back_what_was_encoded(seed, samples, classes, bits, delta):
    draw = np.random.default_rng(seed)
    now, before = (quantise(torch.from_numpy(draw.dirichlet(np.full(classes, 0.3), samples)), bits) for _ in range(2))
    reference = before if delta else None

    words = encode(symbols(now, bits, reference))
    planes = decode(words, shapes(samples, classes, bits))

    assert words.dtype == np.uint32
    assert torch.equal(from_symbols(planes, classes, bits, reference), now)


@pytest.mark.parametrize("share", [0.5, 0.1, 0.01, 0.0])
def test_bytes_are_those_of_the_entropy(share):
    """Of 20,000 symbols, 0 or one of nine others."""
    draw = np.random.default_rng(1)
    values = np.where(draw.random(20_000) < share, draw.integers(1, 10, 20_000), 0)
    frequencies = np.bincount(values, minlength=10) / len(values)
    bits = -len(values) * sum(p * np.log2(p) for p in frequencies if p)

    nbytes = encode([(values[None], 10)]).nbytes

    assert bits / 8 <= nbytes <= 1.01 * bits / 8 + 40  # no coder is below; learning the frequencies costs some bytes


def test_one_bit_of_even_labels_takes_the_logarithm_of_the_classes():
    levels = torch.nn.functional.one_hot(torch.arange(5_000) % 10, 10).int()
    bits = encode(symbols(levels, 1)).nbytes * 8
    assert 5_000 * np.log2(10) <= bits < 1.01 * 5_000 * np.log2(10)


@pytest.mark.parametrize(("bits", "streams"), [(1, 1), (2, 9), (4, 9), (12, 9)])
def test_bytes_of_outputs_are_those_of_one_class_or_of_all_levels_but_one(bits, streams):
    """|X|·H/8 with one bit, |X|·(C - 1)·H/8 with more; beyond eight bits the high and the low ones by themselves."""

    def entropy(values):
        shares = np.unique(values, return_counts=True)[1] / len(values)
        return -(shares * np.log2(shares)).sum()

    probs = np.random.default_rng(3).dirichlet(np.full(10, 0.3), size=5_000)
    levels = quantise(torch.from_numpy(probs), bits)
    table = levels.argmax(1, keepdim=True).numpy() if bits == 1 else levels.numpy()[:, :-1]
    parts = [table] if bits <= 8 else [table // 256, table % 256]
    per_symbol = np.mean([sum(entropy(part[:, k]) for part in parts) for k in range(streams)])

    nbytes = encode(symbols(levels, bits)).nbytes

    assert table.shape[1] == streams
    assert nbytes == pytest.approx(5_000 * streams * per_symbol / 8, rel=0.05)


def test_few_changes_take_few_bytes():
    draw = np.random.default_rng(2)
    before = torch.nn.functional.one_hot(torch.from_numpy(draw.integers(0, 10, 2_000)), 10).int()
    now = before.clone()
    now[::50] = now[::50].roll(1, 1)  # one in fifty moves by a class
    plain, changes = encode(symbols(now, 1)).nbytes, encode(symbols(now, 1, before)).nbytes
    assert plain > 800 and changes < 60
    for bits in (2, 8):
        same = quantise(torch.from_numpy(draw.dirichlet(np.ones(10), 500)), bits)
        assert encode(symbols(same, bits, same)).nbytes < 0.02 * encode(symbols(same, bits)).nbytes + 60


def test_words_that_nobody_encoded_are_refused():
    levels = quantise(torch.from_numpy(np.random.default_rng(0).dirichlet(np.ones(4), 300)), 3)
    words, form = encode(symbols(levels, 3)), shapes(300, 4, 3)
    flipped = words.copy()
    flipped[3] ^= 1 << 7
    for bad in (flipped, words[:-1], np.append(words, np.uint32(0)), words[:0], words[::-1]):
        with pytest.raises(KnowledgeError, match="coded outputs"):
            from_symbols(decode(bad, form), 4, 3)
    draw = np.random.default_rng(1)
    for length in range(1, 40):
        with pytest.raises(KnowledgeError, match=r"coded outputs|sum to more than one"):
            from_symbols(decode(draw.integers(0, 2**32, length, dtype=np.uint32), form), 4, 3)


def test_levels_that_sum_to_too_much_are_refused():
    with pytest.raises(KnowledgeError, match="more than one"):
        from_symbols([np.array([[3], [1]])], 3, 2)


def test_a_missing_library_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "constriction", None)
    with pytest.raises(ScenarioError, match=r"(?s)constriction, which is not installed.*pip install"):
        library()
