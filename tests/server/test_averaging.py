"""Averages of weights: numbers by hand, exact bits, groups, buffers, refusals."""

import pickle
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedkd.errors import KnowledgeError, ScenarioError
from fedkd.server import averaging
from fedkd.server.averaging import StateMean, average, mean_state


@dataclass
class Upload:
    state: dict[str, Tensor]
    num_examples: int = 1
    arch: str = "cnn"
    others: dict = field(default_factory=dict)


def vector(*numbers: float, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {"w": torch.tensor(numbers, dtype=dtype)}


def test_weighted_by_examples() -> None:
    # (1·[2, 0] + 3·[6, 4]) / 4 = [20, 12] / 4
    uploads = [Upload(vector(2.0, 0.0), 1), Upload(vector(6.0, 4.0), 3)]
    assert average(uploads)["cnn"]["w"].tolist() == [5.0, 3.0]


def test_uniform_and_own_weights() -> None:
    uploads = [Upload(vector(2.0), 1), Upload(vector(6.0), 3)]
    assert average(uploads, weights="uniform")["cnn"]["w"].tolist() == [4.0]
    # (3·2 + 1·6) / 4
    assert average(uploads, weights=lambda u: 4.0 - u.num_examples)["cnn"]["w"].tolist() == [3.0]


def test_groups_keep_order_of_appearance() -> None:
    uploads = [
        Upload(vector(1.0), arch="mlp"),
        Upload({"other": torch.zeros(2)}, arch="cnn"),
        Upload(vector(3.0), arch="mlp"),
    ]
    averaged = average(uploads)
    assert list(averaged) == ["mlp", "cnn"]
    assert averaged["mlp"]["w"].tolist() == [2.0]
    assert averaged["cnn"]["other"].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("weight", [1.0, 0.3, 7.0, 1e-9])
def test_one_upload_gives_its_own_bits(dtype: torch.dtype, weight: float) -> None:
    w = torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    w[0] = -0.0
    result = average([Upload({"w": w})], weights=lambda u: weight)["cnn"]["w"]
    assert result.dtype == dtype
    assert torch.equal(result.view(torch.uint8), w.view(torch.uint8))
    assert result.data_ptr() != w.data_ptr()


def test_float64_accumulation() -> None:
    # (2^24 + 1 + 1 + 2) / 4 = 2^22 + 1; in float32, 2^24 + 1 = 2^24: a sum would lose both ones
    uploads = [Upload(vector(x)) for x in (2.0**24, 1.0, 1.0, 2.0)]
    assert average(uploads)["cnn"]["w"].item() == 2**22 + 1


def test_integer_buffers_are_rounded_and_keep_their_type() -> None:
    # (1·10 + 3·20) / 4 = 17.5 rounds to even 18; (1·1 + 3·2) / 4 = 1.75 to 2; flags: 3/4 to True
    uploads = [
        Upload({"n": torch.tensor([10, 1]), "flag": torch.tensor(False)}, 1),
        Upload({"n": torch.tensor([20, 2]), "flag": torch.tensor(True)}, 3),
    ]
    averaged = average(uploads)["cnn"]
    assert averaged["n"].dtype == torch.int64 and averaged["n"].tolist() == [18, 2]
    assert averaged["flag"].dtype == torch.bool and averaged["flag"].item() is True


def test_uploads_are_streamed_and_not_changed() -> None:
    alive: list[int] = []

    def uploads():
        for k in range(5):
            alive.append(k)
            yield Upload(vector(float(k)))

    given_first = Upload(vector(1.0))
    assert average(uploads())["cnn"]["w"].item() == 2.0  # (0+1+2+3+4)/5
    assert alive == [0, 1, 2, 3, 4]
    average([given_first, Upload(vector(5.0))])
    assert given_first.state["w"].item() == 1.0


def test_weight_zero_is_left_out_even_if_not_finite() -> None:
    uploads = [Upload(vector(float("nan")), 0), Upload(vector(0.1), 5), Upload(vector(9.0), 0)]
    assert average(uploads)["cnn"]["w"].item() == torch.tensor(0.1).item()


@pytest.mark.parametrize(
    ("uploads", "reason"),
    [
        ([], "no uploads"),
        ([Upload(vector(1.0), 0)], "sum to 0"),
        ([Upload(vector(1.0), -1)], "weight -1"),
        ([Upload(vector(1.0)), Upload({"v": torch.zeros(1)})], "different entries"),
        ([Upload(vector(1.0)), Upload(vector(1.0, 2.0))], "differ in shape"),
        ([Upload(vector(1.0)), Upload(vector(float("inf")))], "not finite"),
    ],
)
def test_refusals(uploads: list[Upload], reason: str) -> None:
    with pytest.raises(KnowledgeError, match=reason):
        average(uploads)


def test_unknown_options() -> None:
    one = [Upload(vector(1.0))]
    with pytest.raises(ScenarioError, match="sizes"):
        average(one, weights="sizes")  # type: ignore[arg-type]


def test_mean_state() -> None:
    assert mean_state(vector(x) for x in (1.0, 2.0, 6.0))["w"].item() == 3.0
    with pytest.raises(KnowledgeError):
        mean_state([])


finite = st.floats(-1e6, 1e6, width=32)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(finite, st.integers(1, 1000)), min_size=1, max_size=8))
def test_equals_a_slow_loop_and_order_hardly_matters(pairs: list[tuple[float, int]]) -> None:
    uploads = [Upload(vector(x), n) for x, n in pairs]
    slow = sum(x * n for x, n in pairs) / sum(n for _, n in pairs)
    assert average(uploads)["cnn"]["w"].item() == pytest.approx(slow, rel=1e-6, abs=1e-6)
    assert average(uploads[::-1])["cnn"]["w"].item() == pytest.approx(slow, rel=1e-6, abs=1e-6)


@settings(max_examples=50, deadline=None)
@given(finite, st.lists(st.integers(1, 10**6), min_size=1, max_size=8))
def test_mean_of_equal_states_is_that_state(x: float, counts: list[int]) -> None:
    assert average([Upload(vector(x), n) for n in counts])["cnn"]["w"].item() == x


@pytest.mark.parametrize("chunk", [8, 1 << 18])
def test_pieces_of_a_large_tensor_have_the_bits_of_adding_one_by_one(chunk: int, monkeypatch) -> None:
    monkeypatch.setattr(averaging, "CHUNK", chunk)
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(4, 3, 2, 2, generator=generator) for _ in range(3)]
    tensors[1] = torch.nn.Parameter(tensors[1].to(memory_format=torch.channels_last))
    weights = [0.3, 2.0, 5.0]

    mean = average([Upload({"w": tensor}) for tensor in tensors], weights=lambda u: weights.pop(0))["cnn"]["w"]
    total = tensors[0].double() * 0.3
    for tensor, weight in zip(tensors[1:], (2.0, 5.0)):
        total = torch.add(total, tensor.detach().double(), alpha=weight)
    assert torch.equal(mean, (total / (0.3 + 2.0 + 5.0)).float())
    assert not mean.requires_grad


def test_sums_in_memory_that_others_may_read_are_not_changed() -> None:
    def received(*numbers: float) -> tuple[StateMean, bytes]:
        mean, arrays = StateMean("cnn"), []
        for number in numbers:
            mean.add(vector(number), 2.0)
        head = pickle.dumps(mean, protocol=5, buffer_callback=arrays.append)
        memory = bytes(arrays[0].raw())
        return pickle.loads(head, buffers=[memory]), memory

    for numbers in ((1.0,), (1.0, 2.0)):
        (mean, memory), (other, _) = received(*numbers), received(4.0, 5.0)
        before = bytes(bytearray(memory))
        mean.merge(other)
        assert mean.result()["w"].item() == pytest.approx((sum(numbers) + 9.0) / (len(numbers) + 2))
        assert memory == before
