"""Losses as terms of a scenario: ``term(out, teacher_out, batch, *, temperature, **options)``.

Annotations of options are objects, not strings, because scenarios are checked against them before training.
"""

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field
from torch import Tensor

from fedkd.errors import ScenarioError
from fedkd.losses import feature, information, relation, response
from fedkd.losses.response import Direction, Reduction

if TYPE_CHECKING:
    from fedkd.data.batches import Batch
    from fedkd.models import Outputs

Layer = Literal["features"] | int
Weight = Annotated[float, Field(ge=0)]


def kd(
    out: "Outputs",
    teacher_out: "Outputs",
    batch: "Batch",
    *,
    temperature: float,
    reduction: Reduction = "batchmean",
    t_squared: bool = True,
    direction: Direction = "forward",
) -> Tensor:
    """KL divergence of softened outputs, times T²; options reduction, t_squared, direction."""
    return response.kd(
        out.logits,
        teacher_out.logits,
        temperature=temperature,
        reduction=reduction,
        t_squared=t_squared,
        direction=direction,
    )


def ntd(
    out: "Outputs",
    teacher_out: "Outputs",
    batch: "Batch",
    *,
    temperature: float,
    reduction: Reduction = "batchmean",
    t_squared: bool = True,
) -> Tensor:
    """KL divergence over the classes that are not the label (FedNTD); options reduction, t_squared."""
    return response.kd(
        out.logits,
        teacher_out.logits,
        temperature=temperature,
        reduction=reduction,
        t_squared=t_squared,
        class_mask=response.not_true_mask(batch.y, out.logits.shape[-1]),
    )


def mse(
    out: "Outputs",
    teacher_out: "Outputs",
    batch: "Batch",
    *,
    temperature: float,
    reduction: Reduction = "mean_all",
) -> Tensor:
    """Squared differences of logits, without temperature; option reduction."""
    return response.kd(
        out.logits,
        teacher_out.logits,
        temperature=temperature,
        reduction=reduction,
        t_squared=False,
        kind="mse",
    )


def mae(
    out: "Outputs",
    teacher_out: "Outputs",
    batch: "Batch",
    *,
    temperature: float,
    reduction: Reduction = "mean_all",
) -> Tensor:
    """Absolute differences of logits (FedMD), without temperature; option reduction."""
    return response.kd(
        out.logits,
        teacher_out.logits,
        temperature=temperature,
        reduction=reduction,
        t_squared=False,
        kind="mae",
    )


def dkd(
    out: "Outputs",
    teacher_out: "Outputs",
    batch: "Batch",
    *,
    temperature: float,
    alpha: Weight = 1.0,
    beta: Weight = 8.0,
    t_squared: bool = True,
) -> Tensor:
    """Decoupled distillation: label against rest, and among the rest; options alpha, beta, t_squared."""
    return response.decoupled_kd(
        out.logits,
        teacher_out.logits,
        batch.y,
        temperature=temperature,
        t_squared=t_squared,
        alpha=alpha,
        beta=beta,
    )


def dist(
    out: "Outputs",
    teacher_out: "Outputs",
    batch: "Batch",
    *,
    temperature: float,
    beta: Weight = 2.0,
    gamma: Weight = 2.0,
    t_squared: bool = True,
) -> Tensor:
    """Pearson correlation of probabilities by sample and by class (DIST); options beta, gamma, t_squared."""
    return response.correlation(
        out.logits,
        teacher_out.logits,
        temperature=temperature,
        t_squared=t_squared,
        beta=beta,
        gamma=gamma,
    )


def hint(
    out: "Outputs",
    teacher_out: "Outputs",
    batch: "Batch",
    *,
    temperature: float,
    layer: Layer = "features",
    reduction: Reduction = "mean_all",
) -> Tensor:
    """Squared differences of features (FitNets); options layer ("features" or a tap's index), reduction."""
    student, teacher = _layer(out, layer), _layer(teacher_out, layer)
    if student.shape != teacher.shape:
        raise ScenarioError(
            f"hint: layer {layer!r} is {tuple(student.shape[1:])} for the student and "
            f"{tuple(teacher.shape[1:])} for the teacher",
            key="client.terms",
            hint="use a loss that compares relations: sp, pkt, rkd, cc",
        )
    return feature.hint(student, teacher, reduction=reduction)


def attention(out: "Outputs", teacher_out: "Outputs", batch: "Batch", *, temperature: float) -> Tensor:
    """Spatial attention maps of all taps (attention transfer); image models alone."""
    try:
        return feature.attention(out.taps, teacher_out.taps)
    except ValueError as error:
        raise ScenarioError(
            f"attention: {error}",
            key="client.terms",
            hint="use cnn, fedavg_cnn, resnet8/20/32 or vgg9 as student and teacher, or another loss",
        ) from None


def rkd(
    out: "Outputs",
    teacher_out: "Outputs",
    batch: "Batch",
    *,
    temperature: float,
    distance: Weight = 1.0,
    angle: Weight = 2.0,
    layer: Layer = "features",
) -> Tensor:
    """Distances and angles between samples (RKD); options distance and angle (weights), layer."""
    student, teacher = _layer(out, layer), _layer(teacher_out, layer)
    loss = distance * relation.rkd_distance(student, teacher)
    return loss + angle * relation.rkd_angle(student, teacher) if angle else loss


def sp(
    out: "Outputs", teacher_out: "Outputs", batch: "Batch", *, temperature: float, layer: Layer = "features"
) -> Tensor:
    """Similarities between samples (similarity-preserving); option layer."""
    return relation.similarity_preserving(_layer(out, layer), _layer(teacher_out, layer))


def cc(
    out: "Outputs",
    teacher_out: "Outputs",
    batch: "Batch",
    *,
    temperature: float,
    layer: Layer = "features",
    gamma: Annotated[float, Field(gt=0)] = 0.4,
    order: Annotated[int, Field(ge=1, le=10)] = 2,
) -> Tensor:
    """Gaussian-kernel correlations between samples (correlation congruence); options layer, gamma, order."""
    return relation.correlation_congruence(_layer(out, layer), _layer(teacher_out, layer), gamma=gamma, order=order)


def pkt(
    out: "Outputs", teacher_out: "Outputs", batch: "Batch", *, temperature: float, layer: Layer = "features"
) -> Tensor:
    """Neighbourhoods as distributions (probabilistic knowledge transfer); option layer."""
    return information.probabilistic_transfer(_layer(out, layer), _layer(teacher_out, layer))


def _layer(out: "Outputs", layer: Layer) -> Tensor:
    if layer == "features":
        return out.features
    if not -len(out.taps) <= layer < len(out.taps):
        raise ScenarioError(
            f"layer {layer} does not exist: the model has {len(out.taps)} taps",
            key="client.terms",
            hint='use layer = "features"',
        )
    return out.taps[layer]
