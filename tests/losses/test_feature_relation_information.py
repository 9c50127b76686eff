import math

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from torch.func import grad, vmap

from fedkd.losses import feature, information, relation

RELATIONS = {
    "rkd_distance": relation.rkd_distance,
    "rkd_angle": relation.rkd_angle,
    "similarity_preserving": relation.similarity_preserving,
    "correlation_congruence": relation.correlation_congruence,
    "probabilistic_transfer": information.probabilistic_transfer,
}


def pair(n: int = 6) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    return rng.normal(size=(n, 4)), rng.normal(size=(n, 7))  # widths differ


def huber(a: float, b: float) -> float:
    return 0.5 * (a - b) ** 2 if abs(a - b) <= 1 else abs(a - b) - 0.5


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def rkd_distance(s, t):
    s, t = (d / d[d > 0].mean() for d in (cdist(s, s), cdist(t, t)))
    n = len(s)
    return np.mean([huber(s[i, j], t[i, j]) for i in range(n) for j in range(n) if i != j])


def rkd_angle(s, t):
    def cosine(x, i, j, k):
        return unit(x[i] - x[j]) @ unit(x[k] - x[j])

    n = range(len(s))
    triples = [(i, j, k) for i in n for j in n for k in n if len({i, j, k}) == 3]
    return np.mean([huber(cosine(s, *triple), cosine(t, *triple)) for triple in triples])


def similarity_preserving(s, t):
    return np.linalg.norm(unit(s @ s.T) - unit(t @ t.T)) ** 2 / len(s) ** 2


def correlation_congruence(s, t):
    def kernel(x):
        cosine = unit(x) @ unit(x).T
        return math.exp(-0.8) * (1 + 0.8 * cosine + 0.32 * cosine**2)  # gamma 0.4, order 2

    return ((kernel(s) - kernel(t)) ** 2).sum() / len(s) ** 2


def probabilistic_transfer(s, t):
    def neighbours(x, j):
        k = np.array([(unit(x[i]) @ unit(x[j]) + 1) / 2 for i in range(len(x)) if i != j])
        return k / k.sum()

    pairs = [(neighbours(t, j), neighbours(s, j)) for j in range(len(s))]
    return np.mean([(p * np.log(p / q)).sum() for p, q in pairs])


@pytest.mark.parametrize("name", RELATIONS)
def test_relation_losses_against_plain_loops(name):
    s, t = pair()
    loss = RELATIONS[name](torch.from_numpy(s), torch.from_numpy(t))
    assert loss.shape == ()
    assert loss.item() == pytest.approx(globals()[name](s, t), rel=1e-10)
    assert loss.item() > 1e-3


@pytest.mark.parametrize("name", RELATIONS)
def test_relation_losses_are_zero_for_equal_embeddings_with_finite_gradient(name):
    x = torch.from_numpy(pair()[1]).requires_grad_()
    loss = RELATIONS[name](x, x.detach())
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-15)
    assert x.grad is not None and x.grad.isfinite().all() and x.grad.abs().max() < 1e-7


@pytest.mark.parametrize("name", RELATIONS)
@pytest.mark.parametrize("rows", [torch.zeros(4, 3), torch.ones(4, 3), torch.ones(1, 3), torch.eye(2)])
def test_relation_losses_of_degenerate_batches_are_finite(name, rows):
    student = rows.clone().requires_grad_()
    teacher = torch.arange(float(len(rows) * 2)).reshape(len(rows), 2)
    loss = RELATIONS[name](student, teacher)
    loss.backward()
    assert loss.isfinite()
    assert student.grad is not None and student.grad.isfinite().all()


@pytest.mark.parametrize("name", RELATIONS)
def test_relation_losses_under_vmap(name):
    generator = torch.Generator().manual_seed(0)
    students, teachers = torch.randn(3, 5, 4, generator=generator), torch.randn(3, 5, 6, generator=generator)
    loss = RELATIONS[name]
    together = vmap(loss)(students, teachers)
    gradients = vmap(grad(loss))(students, teachers)
    for i in range(3):
        torch.testing.assert_close(together[i], loss(students[i], teachers[i]))
        torch.testing.assert_close(gradients[i], grad(loss)(students[i], teachers[i]))


def test_rkd_distance_by_hand():
    # Distances 1, 1, 2 (mean 4/3) and 1, 2, 3 (mean 2), so 3/4, 3/4, 3/2 and 1/2, 1, 3/2.
    student, teacher = torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[0.0], [1.0], [3.0]])
    assert relation.rkd_distance(student, teacher).item() == pytest.approx((0.03125 + 0.03125 + 0) / 3)


def test_rkd_angle_by_hand():
    # A right isosceles triangle has cosines 0, √½, √½ at its corners, an equilateral one 1/2 everywhere.
    student = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    teacher = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, math.sqrt(0.75)]])
    expected = (0.5 * 0.25 + 2 * 0.5 * (math.sqrt(0.5) - 0.5) ** 2) / 3
    assert relation.rkd_angle(student, teacher).item() == pytest.approx(expected, rel=1e-5)


def test_similarity_preserving_by_hand():
    # G of orthogonal rows is the identity, of equal rows of two it is √½ everywhere.
    loss = relation.similarity_preserving(torch.eye(2), torch.ones(2, 3))
    assert loss.item() == pytest.approx((2 * (1 - math.sqrt(0.5)) ** 2 + 2 * 0.5) / 4)


def test_probabilistic_transfer_by_hand():
    # Teacher: samples 0 and 1 equal, 2 opposite, so K01 = 1, K02 = K12 = 0. Student: all equal, K = 1.
    teacher, student = torch.tensor([[1.0], [1.0], [-1.0]]), torch.ones(3, 1)
    # Sample 0 and 1: p = (1, 0) against (1/2, 1/2); sample 2: p = (1/2, 1/2), because both are floored alike.
    loss = information.probabilistic_transfer(student, teacher)
    assert loss.item() == pytest.approx(2 * math.log(2) / 3, abs=1e-4)


def test_hint_by_hand():
    student, teacher = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[1.0, 5.0], [1.0, 2.0]])
    assert feature.hint(student, teacher, reduction="batchmean").item() == pytest.approx(0.5 * (9 + 5) / 2)
    assert feature.hint(student, teacher, reduction="mean_all").item() == pytest.approx(0.5 * (9 + 5) / 4)
    with pytest.raises(ValueError, match="differ in shape"):
        feature.hint(student, teacher[:, :1], reduction="batchmean")
    with pytest.raises(ValueError, match="reduction"):
        feature.hint(student, teacher, reduction="mean")  # type: ignore[arg-type]


def test_attention_by_hand():
    # Two pixels. Sums of squares are (4 + 5, 0), so (1, 0) at unit length, and (9, 12), so (3, 4) / 5.
    student = torch.tensor([[[[2.0, 0.0]], [[math.sqrt(5), 0.0]]]])
    teacher = torch.tensor([[[[3.0, math.sqrt(12)]]]])
    distance = math.sqrt((1 - 0.6) ** 2 + 0.8**2)
    assert feature.attention([student], [teacher]).item() == pytest.approx(0.5 * distance)
    both = feature.attention([student, student], [teacher, student])
    assert both.item() == pytest.approx(0.5 * distance)


def test_attention_of_equal_and_of_dead_maps_has_finite_gradient():
    maps = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    for start, other in ((maps, maps), (torch.zeros_like(maps), maps)):
        student = start.clone().requires_grad_()
        loss = feature.attention([student], [other])
        loss.backward()
        assert student.grad is not None and student.grad.isfinite().all()
    assert feature.attention([maps], [maps]).item() == 0
    losses = vmap(lambda s: feature.attention([s], [maps]))(torch.stack([maps, 2 * maps, maps.flip(2)]))
    assert losses[:2].abs().max() < 1e-6 and losses[2] > 0


def test_attention_refuses_what_has_no_maps():
    with pytest.raises(ValueError, match="no maps"):
        feature.attention([torch.zeros(2, 3)], [torch.zeros(2, 3)])
    with pytest.raises(ValueError, match="same number"):
        feature.attention([], [])
