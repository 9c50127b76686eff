"""Ensembles: spaces and weights by hand; reduces and transforms in them; masks; streaming; untouched models."""

import gc
import math
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedkd.data.batches import ArrayData
from fedkd.data.proxy import ProxySet
from fedkd.errors import KnowledgeError, ScenarioError
from fedkd.models import Outputs, build
from fedkd.server import ensemble as module
from fedkd.server.ensemble import Ensemble
from fedkd.server.members import Member, ModelMember, StoredMember
from fedkd.server.reduces import spectral, trimmed
from fedkd.server.targets import Targets
from fedkd.server.transforms import Argmax, Era, Power, Softmax
from fedkd.server.weighting import by_class, by_entropy
from fedkd.students import predict


def stored(*rows: list[float], ids: list[int] | None = None, space: str = "logits", weight: float = 1.0):
    return StoredMember(ids or list(range(len(rows))), torch.tensor(rows), space, weight)


def values(members: list, **options) -> Tensor:
    return Ensemble(members, **options).targets().values


def vectors(n: int, d: int = 3, seed: int = 0) -> ArrayData:
    return ArrayData(np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32), kind="vector")


class Linear(nn.Module):
    """Logits are a linear map of the input."""

    def __init__(self, d: int = 3, classes: int = 4, seed: int = 0) -> None:
        super().__init__()
        self.head = nn.Linear(d, classes)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator))

    def forward(self, x: Tensor) -> Outputs:
        return Outputs(self.head(x), x)


# --- spaces -------------------------------------------------------------------------------------------------


def test_mean_of_logits() -> None:
    targets = Ensemble([stored([2.0, 0.0]), stored([4.0, -1.0])]).targets()
    assert targets.values.tolist() == [[3.0, -0.5]]
    assert targets.space == "logits" and targets.values.dtype == torch.float32


def test_mean_of_probabilities_is_another_target() -> None:
    # softmax(0, log 3) = (1/4, 3/4); softmax(0, 0) = (1/2, 1/2); mean (3/8, 5/8).
    # Mean of logits (0, log 3 / 2) would give odds √3 instead of 5/3.
    members = [stored([0.0, math.log(3)]), stored([0.0, 0.0])]
    targets = Ensemble(members, space="probs").targets()
    assert targets.values.flatten().tolist() == pytest.approx([3 / 8, 5 / 8])
    assert targets.space == "probs"
    logits = Ensemble(members, transform=Softmax()).targets()
    assert (logits.values[0, 1] / logits.values[0, 0]).item() == pytest.approx(math.sqrt(3))
    assert logits.space == "probs"


def test_votes() -> None:
    # Votes 0, 2, 2 of weights 1, 1, 2; a tie goes to the lowest class
    members = [stored([3.0, 3.0, 0.0]), stored([0.0, 1.0, 5.0]), stored([0.0, 1.0, 9.0], weight=2.0)]
    targets = Ensemble(members, space="votes").targets()
    assert targets.values.tolist() == [[0.25, 0.0, 0.75]] and targets.space == "probs"


def test_stored_probabilities_are_taken_as_they_are() -> None:
    members = [stored([0.5, 0.5], space="probs"), stored([0.0, math.log(3)])]
    assert values(members, space="probs").flatten().tolist() == pytest.approx([3 / 8, 5 / 8])
    with pytest.raises(ScenarioError, match="probabilities"):
        Ensemble(members, space="logits")


# --- weights ------------------------------------------------------------------------------------------------


def test_weights_of_members() -> None:
    members = [stored([0.0, 8.0], weight=3.0), stored([4.0, 0.0])]
    assert values(members).tolist() == [[1.0, 6.0]]  # (3·0 + 4)/4, (3·8 + 0)/4
    assert values(members, weights=[1, 3]).tolist() == [[3.0, 2.0]]


def test_weights_of_classes() -> None:
    members = [stored([0.0, 8.0, 1.0]), stored([4.0, 0.0, 2.0])]
    weights = by_class(torch.tensor([[1, 1, 0], [1, 3, 1]]))
    # class 0: (0 + 4)/2; class 1: 8/4; class 2: second member alone
    assert values(members, weights=weights, per="class").tolist() == [[2.0, 2.0, 2.0]]


def test_weights_of_classes_give_distributions() -> None:
    members = [stored([1.0, 0.0], space="probs"), stored([0.5, 0.5], space="probs")]
    # (1·1 + 0·0.5, 0·0 + 1·0.5) = (1, 0.5), scaled by 2/3
    weights = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    result = values(members, space="probs", weights=weights, per="class")
    assert result.flatten().tolist() == pytest.approx([2 / 3, 1 / 3])


def test_weights_of_samples_follow_ids() -> None:
    members = [stored([0.0, 0.0], [0.0, 0.0], [0.0, 0.0]), stored([4.0, 8.0], [4.0, 8.0], [4.0, 8.0])]
    weights = torch.tensor([[1.0, 3.0, 0.0], [1.0, 1.0, 1.0]])  # FedAUX scores
    together = Ensemble(members, weights=weights)
    assert together.targets().values.tolist() == [[2.0, 4.0], [1.0, 2.0], [4.0, 8.0]]
    assert together.targets(ids=[2, 1]).values.tolist() == [[4.0, 8.0], [1.0, 2.0]]


def test_weights_that_fit_classes_and_samples_need_a_word() -> None:
    data = vectors(2)
    members = [ModelMember(Linear(classes=2)), ModelMember(Linear(classes=2, seed=1))]
    weights = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    with pytest.raises(ScenarioError, match="per="):
        Ensemble(members, weights=weights).targets(data)
    logits = [member.outputs(data, torch.arange(2)) for member in members]
    by_sample = Ensemble(members, weights=weights, per="sample").targets(data).values
    assert torch.equal(by_sample, torch.stack([logits[0][0], logits[1][1]]))
    classes = Ensemble(members, weights=weights, per="class").targets(data).values
    assert torch.equal(classes, torch.stack([logits[0][:, 0], logits[1][:, 1]], dim=1))


@pytest.mark.parametrize("rule", ["softmax", "inverse"])
def test_streamed_entropy_weights_equal_the_table(rule: str) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 7, 3, generator=generator) * torch.tensor([0.1, 1, 4, 30, 2]).view(5, 1, 1)
    members = [StoredMember(range(7), z) for z in logits]
    weights = by_entropy(logits.double().softmax(2), rule)  # type: ignore[arg-type]
    table = (weights.unsqueeze(2) * logits.double()).sum(0)
    name = {"softmax": "entropy", "inverse": "inverse-entropy"}[rule]
    assert torch.allclose(values(members, weights=name).double(), table, atol=1e-5)
    backwards = values(members[::-1], weights=name)
    assert torch.allclose(backwards.double(), table, atol=1e-5)


def test_own_score() -> None:
    # log-weights 0 and log 3: the second member counts three times as much where it is sure of class 0
    members = [stored([0.5, 0.5], space="probs"), stored([0.9, 0.1], space="probs")]
    result = values(members, space="probs", weights=lambda p: (p[:, 0] > 0.6).double() * math.log(3))
    assert result.flatten().tolist() == pytest.approx([0.8, 0.2])


# --- reduces ------------------------------------------------------------------------------------------------

FIVE = [stored([x, -x]) for x in (1.0, 2.0, 3.0, 4.0, 100.0)]


def test_any_reduce() -> None:
    def largest(values: Tensor, weights: Tensor) -> Tensor:
        assert values.shape == (5, 1, 2) and weights.shape == (5, 1)
        return values.amax(0)

    assert values(FIVE, reduce=largest).tolist() == [[100.0, -1.0]]


@pytest.mark.parametrize("reduce", ["median", "trimmed", "geometric", "spectral"])
def test_chunks_do_not_change_targets(reduce, monkeypatch: pytest.MonkeyPatch) -> None:
    data, members = vectors(37), [ModelMember(Linear(seed=s)) for s in range(5)]
    whole = Ensemble(members, reduce=reduce).targets(data, batch_size=4)
    monkeypatch.setattr(module, "JOINT_ROWS", 5 * 8)
    chunked = Ensemble(members, reduce=reduce).targets(data, batch_size=4)
    assert torch.equal(chunked.values, whole.values)


# --- transforms ---------------------------------------------------------------------------------------------


def test_transforms_in_an_ensemble() -> None:
    members = [stored([0.8, 0.2], space="probs"), stored([0.4, 0.6], space="probs")]  # mean 0.6, 0.4
    assert values(members, space="probs", transform=Era()).flatten().tolist() == pytest.approx(
        [1 / (1 + math.exp(-2)), 1 / (1 + math.exp(2))]
    )
    assert values(members, space="probs", transform=Power(2)).flatten().tolist() == pytest.approx([36 / 52, 16 / 52])
    assert values(members, space="probs", transform=Power(1)).flatten().tolist() == pytest.approx([0.6, 0.4])
    assert values(members, space="probs", transform=[Power(2), Argmax()]).tolist() == [[1.0, 0.0]]
    # softmax((0, 2 log 3) / 2) = (1/4, 3/4)
    assert values([stored([0.0, 2 * math.log(3)])], transform=Softmax(2.0)).flatten().tolist() == (
        pytest.approx([0.25, 0.75])
    )


# --- missing samples ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduce", ["mean", "median", "trimmed", "geometric"])
def test_missing_samples_are_masked(reduce) -> None:
    members = [stored([2.0, 0.0], [6.0, 0.0], ids=[5, 1]), stored([4.0, 8.0], ids=[5])]
    targets = Ensemble(members, reduce=reduce).targets(ids=[5, 3, 1])
    assert targets.ids.tolist() == [5, 1]  # 3 is nobody's; 1 is not averaged with a zero
    assert torch.allclose(targets.values, torch.tensor([[3.0, 4.0], [6.0, 0.0]]), atol=1e-5)


def test_entropy_weights_with_missing_samples() -> None:
    members = [stored([9.0, 0.0], ids=[0]), stored([1.0, 1.0], [0.0, 3.0], ids=[0, 1])]
    targets = Ensemble(members, weights="entropy").targets()
    assert targets.values[1].tolist() == [0.0, 3.0]
    assert targets.values[0].tolist() == pytest.approx([9.0, 0.0], abs=1e-4)  # 1/H is 811 against 1.4


def test_nobody_covers_anything() -> None:
    with pytest.raises(KnowledgeError, match="no member"):
        Ensemble([stored([1.0, 2.0])]).targets(ids=[7])
    with pytest.raises(KnowledgeError, match="not stored"):
        stored([1.0, 2.0]).outputs(None, torch.tensor([7]))


def test_sample_of_weight_zero_is_left_out() -> None:
    members = [stored([1.0, 2.0, 0.0], [3.0, 4.0, 0.0])]
    assert Ensemble(members, weights=torch.tensor([[0.0, 1.0]])).targets().ids.tolist() == [1]


# --- refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"space": "probabilities"}, "space 'probabilities'"),
        ({"reduce": "medain"}, "did you mean 'median'"),
        ({"per": "client"}, "per 'client'"),
        ({"weights": "entropie"}, "did you mean 'entropy'"),
        ({"weights": [1.0]}, "2 members"),
        ({"weights": [1.0, float("nan")]}, "finite"),
        ({"weights": [1.0, -1.0]}, "not negative"),
        ({"weights": [0.0, 0.0]}, "not all 0"),
        ({"weights": "entropy", "space": "votes"}, "no entropy"),
        ({"transform": Era()}, "Era cannot be applied to logits"),
        ({"transform": Softmax(), "space": "probs"}, "Softmax cannot be applied to probs"),
        ({"transform": [Softmax(), Softmax()]}, "Softmax cannot be applied to probs"),
    ],
)
def test_options_are_checked_at_construction(options: dict, reason: str) -> None:
    with pytest.raises(ScenarioError, match=reason):
        Ensemble([stored([1.0, 2.0]), stored([1.0, 2.0])], **options)


@pytest.mark.parametrize("make", [lambda: Era(0.0), lambda: Softmax(-1), lambda: Power(float("nan"))])
def test_transform_parameters(make) -> None:
    with pytest.raises(ScenarioError, match="must be > 0"):
        make()


def test_other_refusals() -> None:
    one = stored([1.0, 2.0])
    with pytest.raises(KnowledgeError, match="at least one"):
        Ensemble([])
    with pytest.raises(ScenarioError, match="0"):
        Ensemble([stored([1.0, 2.0], weight=0.0)])
    with pytest.raises(ScenarioError, match="trimmed share"):
        trimmed(0.5)
    with pytest.raises(ScenarioError, match="corrupted share"):
        spectral(0.5)
    with pytest.raises(ScenarioError, match="each class go with"):
        Ensemble([one], reduce="geometric", weights=torch.ones(1, 2), per="class").targets()
    with pytest.raises(ScenarioError, match="3 columns for 2 classes and 5 samples"):
        Ensemble([ModelMember(Linear(classes=2))], weights=torch.ones(1, 3)).targets(vectors(5))
    with pytest.raises(KnowledgeError, match="classes"):
        Ensemble([one, stored([1.0, 2.0, 3.0])]).targets()
    with pytest.raises(KnowledgeError, match="needs data"):
        Ensemble([one, ModelMember(Linear())]).targets()
    with pytest.raises(KnowledgeError, match="twice"):
        StoredMember([1, 1], torch.zeros(2, 2))


class Table(nn.Module):
    """Logits of each sample by its first feature, whatever they are."""

    def __init__(self, *rows: list[float]) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.tensor(rows))

    def forward(self, x: Tensor) -> Outputs:
        return Outputs(self.rows[x[:, 0].long()], x)


@pytest.mark.parametrize("reduce", ["mean", "median"])
def test_a_member_does_not_count_where_its_outputs_are_not_finite(reduce, caplog) -> None:
    inf = float("inf")
    tables = [[1.0, 0.0], [4.0, 2.0]], [[3.0, 0.0], [0.0, inf]], [[8.0, -inf], [2.0, 4.0]]
    data = ArrayData(np.array([[0.0], [1.0]], np.float32), kind="vector")
    targets = Ensemble([ModelMember(Table(*rows)) for rows in tables], reduce=reduce).targets(data)
    torch.testing.assert_close(targets.values, torch.tensor([[2.0, 0.0], [3.0, 3.0]]))
    assert "member 1 are not finite for 1 of 2 samples" in caplog.text


def test_not_finite_outputs_are_refused() -> None:
    broken = Linear()
    with torch.no_grad():
        broken.head.bias[1] = float("nan")
    with pytest.raises(KnowledgeError, match="with finite outputs"):
        Ensemble([ModelMember(broken), ModelMember(broken)]).targets(vectors(3))
    with pytest.raises(KnowledgeError, match="not finite, first 4"):
        Targets(torch.tensor([[0.0], [float("inf")]]), "logits", torch.tensor([3, 4]))
    with pytest.raises(KnowledgeError, match="do not fit"):
        Targets(torch.zeros(2, 3), "logits", torch.tensor([1]))
    with pytest.raises(KnowledgeError, match="unknown space"):
        Targets(torch.zeros(1, 3), "votes", torch.tensor([1]))


def test_weights_that_do_not_fit_a_model() -> None:
    model = Linear()
    with pytest.raises(KnowledgeError, match=r"missing \['head.bias'\]"):
        ModelMember(model, {"head.weight": torch.zeros(4, 3)})
    with pytest.raises(KnowledgeError, match="unexpected"):
        ModelMember(model, {**model.state_dict(), "tail": torch.zeros(1)})
    with pytest.raises(KnowledgeError, match=r"\(5, 3\)"):
        ModelMember(model, {**model.state_dict(), "head.weight": torch.zeros(5, 3)})


# --- models -------------------------------------------------------------------------------------------------


def test_members_share_a_module_and_leave_it_alone() -> None:
    data, scaffold, first, second = vectors(9), Linear(seed=7), Linear(seed=1), Linear(seed=2)
    before = {k: v.clone() for k, v in scaffold.state_dict().items()}
    members = [ModelMember(scaffold, m.state_dict()) for m in (first, second)]
    targets = Ensemble(members).targets(data, batch_size=4)
    with torch.no_grad():
        x = torch.from_numpy(data.x)
        expected = (first(x).logits + second(x).logits) / 2
    assert torch.allclose(targets.values, expected, atol=1e-6)
    assert all(torch.equal(before[k], v) for k, v in scaffold.state_dict().items())
    assert not targets.values.is_inference()


def test_evaluation_mode_and_modes_come_back() -> None:
    norm, drop = nn.BatchNorm1d(3), nn.Dropout(0.5)
    model = Linear()
    model.norm, model.drop = norm, drop  # type: ignore[assignment]
    model.forward = lambda x: Outputs(model.head(drop(norm(x))), x)  # type: ignore[method-assign]
    model.train()
    drop.eval()
    data = vectors(6)
    assert torch.allclose(predict(model, data, range(6)), predict(model, data, range(6), batch_size=2))
    assert model.training and norm.training and not drop.training
    assert norm.running_mean is not None and norm.running_mean.tolist() == [0.0, 0.0, 0.0]
    assert norm.num_batches_tracked is not None and norm.num_batches_tracked.item() == 0


def test_proxy_set_and_real_model() -> None:
    images = np.random.default_rng(0).integers(0, 256, (10, 8, 8), dtype=np.uint8)
    data = ArrayData(images, kind="image", mean=(0.5,), std=(0.25,))
    model = build("cnn", num_classes=3, input_shape=(1, 8, 8), kind="image", norm="batch")
    members = [ModelMember(model, weight=2.0, channels_last=True), ModelMember(model, model.state_dict())]
    targets = Ensemble(members).targets(ProxySet(data, False, True, "test"), batch_size=4)
    with torch.no_grad():
        expected = model.eval()(data.gather(range(10)).x).logits  # type: ignore[arg-type]
    assert torch.allclose(targets.values, expected, atol=1e-5)
    assert targets.ids.tolist() == list(range(10)) and len(targets) == 10


def test_log_probs() -> None:
    logits = Targets(torch.tensor([[0.0, math.log(3)]]), "logits", torch.tensor([0]))
    assert logits.log_probs().exp().flatten().tolist() == pytest.approx([0.25, 0.75])
    probs = Targets(torch.tensor([[0.0, 1.0]]), "probs", torch.tensor([0]))
    assert probs.log_probs().flatten().tolist() == pytest.approx([-87.3, 0.0], abs=0.1)


def test_means_hold_one_member_at_a_time() -> None:
    held: list[weakref.ref] = []

    class Counting(Member):
        calls = 0
        most = 0

        def outputs(self, data, ids, batch_size=512) -> Tensor:
            gc.collect()
            Counting.calls += 1
            Counting.most = max(Counting.most, sum(ref() is not None for ref in held))
            out = torch.full((len(ids), 2), float(Counting.calls), dtype=torch.double)
            held.append(weakref.ref(out))
            return out

    for options in ({}, {"weights": "entropy"}, {"space": "votes"}):
        held.clear()
        Counting.calls = Counting.most = 0
        Ensemble([Counting() for _ in range(6)], **options).targets(vectors(4))
        assert Counting.calls == 6  # each member once
        assert Counting.most == 0  # all earlier outputs are gone when the next member is asked


# --- properties ---------------------------------------------------------------------------------------------

KINDS = [
    {},
    {"space": "probs"},
    {"space": "votes"},
    {"reduce": "median"},
    {"reduce": "trimmed"},
    {"reduce": "geometric"},
    {"reduce": "spectral"},
    {"weights": "entropy"},
    {"space": "probs", "weights": "inverse-entropy"},
    {"space": "probs", "transform": Era()},
]


@pytest.mark.parametrize("options", KINDS)
@settings(max_examples=15, deadline=None)
@given(members=st.integers(1, 6), seed=st.integers(0, 10**6))
def test_order_of_members_does_not_matter(options: dict, members: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(members, 4, 3, generator=generator) * 3
    order = torch.randperm(members, generator=generator)
    forward = values([StoredMember(range(4), z) for z in logits], **options)
    permuted = values([StoredMember(range(4), z) for z in logits[order]], **options)
    assert torch.allclose(forward, permuted, atol=1e-4)


@pytest.mark.parametrize("options", KINDS[:2] + KINDS[3:9])
@settings(max_examples=15, deadline=None)
@given(members=st.integers(1, 6), seed=st.integers(0, 10**6))
def test_ensemble_of_equal_members_is_the_member(options: dict, members: int, seed: int) -> None:
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed)) * 3
    one = logits.softmax(1) if options.get("space") == "probs" else logits
    result = values([StoredMember(range(4), logits) for _ in range(members)], **options)
    assert torch.allclose(result, one, atol=1e-6)
    if options == {}:
        assert torch.equal(result, logits)  # the mean is exact


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_order_of_samples_does_not_matter(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 6, 4, generator=generator)
    order = torch.randperm(6, generator=generator)
    members = [StoredMember(order, z[order]) for z in logits]
    targets = Ensemble(members).targets(ids=order)
    assert torch.equal(targets.values, values([StoredMember(range(6), z) for z in logits])[order])


@pytest.mark.gpu
def test_models_run_on_the_gpu_and_come_back() -> None:
    model, data = Linear(), vectors(5)
    on_cpu = predict(model, data, range(5))
    on_gpu = predict(model, data, range(5), state=model.state_dict(), device="cuda")
    assert on_gpu.device.type == "cpu" and torch.allclose(on_cpu, on_gpu, atol=1e-5)
    assert next(model.parameters()).device.type == "cpu"
