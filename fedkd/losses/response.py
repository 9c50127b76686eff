"""Losses on logits and probabilities: one primitive that covers the response terms of published methods.

All functions are pure and can be vectorised with ``torch.func.vmap``: log-softmax and masks instead of
``F.kl_div`` and boolean indexing. They do not stop gradients: a teacher is frozen by whoever computes its
outputs, and a generator that is trained through both models needs both gradients.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Reduction = Literal["batchmean", "mean_all"]
Direction = Literal["forward", "reverse", "symmetric"]
Kind = Literal["kl", "soft_ce", "mse", "mae"]
Space = Literal["logits", "probs"]

_LEAST = -1e30
"""Smallest log-probability. Finite logits may have -inf, of which a probability of 0 makes NaN; with this one, sums
over batches are finite, too."""

_CHOICES = {
    "reduction": ("batchmean", "mean_all"),
    "direction": ("forward", "reverse", "symmetric"),
    "kind": ("kl", "soft_ce", "mse", "mae"),
    "target_space": ("logits", "probs"),
}


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy of logits with labels.

    Parameters
    ----------
    logits : Tensor
        Shape [N, C].
    labels : Tensor
        Class indices, int64, shape [N].

    Returns
    -------
    Tensor
        Scalar, in nats. Half-precision logits are computed in float32.
    """
    if _batched(logits):
        return _by_sample(logits, labels).mean()
    return F.cross_entropy(at_least_float32(logits), labels)


def cross_entropies(logits: Tensor, labels: Tensor) -> Tensor:
    """Return each sample's cross-entropy with its label.

    Parameters
    ----------
    logits : Tensor
        Shape [N, C].
    labels : Tensor
        Class indices, int64, shape [N]; -1 is no label.

    Returns
    -------
    Tensor
        Shape [N], in nats; 0 without a label. Half-precision logits are computed in float32.

    Examples
    --------
    >>> cross_entropies(torch.zeros(2, 4), torch.tensor([1, -1]))  # log 4
    tensor([1.3863, 0.0000])
    """
    return _by_sample(logits, labels.clamp(min=0)).where(labels >= 0, 0)


def _by_sample(logits: Tensor, labels: Tensor) -> Tensor:
    """Return each sample's cross-entropy with its label, which it must have."""
    logits = at_least_float32(logits)  # autocast would do so for some of these functions, on some devices
    if not _batched(logits):
        return F.cross_entropy(logits, labels, reduction="none")
    return -F.log_softmax(logits, dim=-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def _batched(tensor: Tensor) -> bool:
    """Return whether a tensor stands for those of several clients, in ``vmap``.

    PyTorch then takes its own cross-entropy apart in Python, and imports SymPy for that, which takes half a second.
    """
    return torch._C._functorch.is_batchedtensor(tensor)  # pyright: ignore[reportAttributeAccessIssue]


def not_true_mask(labels: Tensor, num_classes: int) -> Tensor:
    """Return the mask that leaves out every sample's own class.

    Parameters
    ----------
    labels : Tensor
        Class indices, shape [N]; -1 (no label) leaves out nothing.
    num_classes : int
        C.

    Returns
    -------
    Tensor
        Bool, shape [N, C], for `kd`'s ``class_mask``.

    Notes
    -----
    Lee et al., Preservation of the Global Knowledge by Not-True Distillation in Federated Learning, NeurIPS
    2022.

    Examples
    --------
    >>> not_true_mask(torch.tensor([2, 0]), 3).int().tolist()
    [[1, 1, 0], [0, 1, 1]]
    """
    return labels[:, None] != torch.arange(num_classes, device=labels.device)


def kd(
    student_logits: Tensor,
    target: Tensor,
    *,
    temperature: float,
    reduction: Reduction,
    t_squared: bool,
    target_space: Space = "logits",
    direction: Direction = "forward",
    kind: Kind = "kl",
    class_mask: Tensor | None = None,
    class_weight: Tensor | None = None,
    sample_weight: Tensor | None = None,
) -> Tensor:
    r"""Return the distance of a student from a target.

    With :math:`s = \mathrm{softmax}(z_s / T)` and the target distribution :math:`t`, a sample's loss is

    ========== =====================================================================
    kl         :math:`\sum_c t_c \log (t_c / s_c)`
    soft_ce    :math:`-\sum_c t_c \log s_c`; equals the entropy of t where s = t
    mse        :math:`\sum_c (z_{s,c} - z_{t,c})^2`, or of s and t if the target holds probabilities
    mae        the same with absolute differences
    ========== =====================================================================

    Parameters
    ----------
    student_logits : Tensor
        Shape [N, C].
    target : Tensor
        Shape [N, C].
    temperature : float
        T > 0, applied to the student's logits and to a target of logits. A target of probabilities is taken
        as it is, so it should have been made at the same temperature. Differences of logits (mse, mae) know
        no temperature.
    reduction : {"batchmean", "mean_all"}
        Sum over classes and mean over samples, the KL divergence of mathematics; or mean over all elements
        that the mask keeps, C times smaller without a mask. No default: published code differs in it
        silently.
    t_squared : bool
        Whether to multiply by T², which keeps the gradient's size when T changes. No default, for the same
        reason. Has no effect on differences of logits.
    target_space : {"logits", "probs"}
        What `target` holds.
    direction : {"forward", "reverse", "symmetric"}
        Teacher to student as above; s and t exchanged; or the mean of both. Of no consequence for mse and
        mae. In the reverse direction probabilities of exactly zero count as the smallest normal number of
        their dtype.
    kind : {"kl", "soft_ce", "mse", "mae"}
        See the table.
    class_mask : Tensor, optional
        Bool, shape [N, C] or [C]. Classes where it is False are left out before the softmax (probabilities of
        the others are scaled to sum to one); a sample without any class counts as zero.
    class_weight : Tensor, optional
        Factor on every class's summand, shape [C] or [N, C].
    sample_weight : Tensor, optional
        Factor on every sample's loss, shape [N]. The mean is still over N, not over the sum of weights.

    Returns
    -------
    Tensor
        Scalar. Half-precision inputs are computed in float32.

    Raises
    ------
    ValueError
        If shapes differ or a choice is unknown.

    Notes
    -----
    Hinton, Vinyals, Dean, Distilling the Knowledge in a Neural Network, 2015. What methods ask for: FedDF
    kl, batchmean, no T²; FedGKD and FedNTD kl, batchmean, T²; FedBE kl, mean_all; FedMD mae; FedSSD mse with
    weights.

    Examples
    --------
    >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.75, 0.25]])
    >>> options = {"temperature": 1.0, "reduction": "batchmean", "t_squared": False}
    >>> loss = kd(student, teacher, target_space="probs", **options)
    >>> round(loss.item(), 4)  # log 2 minus the entropy of (3/4, 1/4)
    0.1308
    """
    for name, choice in (
        ("reduction", reduction),
        ("direction", direction),
        ("kind", kind),
        ("target_space", target_space),
    ):
        if choice not in _CHOICES[name]:
            raise ValueError(f"{name} must be one of {_CHOICES[name]}, is {choice!r}")
    if student_logits.shape != target.shape:
        raise ValueError(f"student {tuple(student_logits.shape)} and target {tuple(target.shape)} differ in shape")
    student_logits, target = at_least_float32(student_logits), at_least_float32(target)
    keep = None if class_mask is None else class_mask.expand_as(student_logits)

    if kind in ("mse", "mae"):
        if target_space == "logits":
            difference, softened = student_logits - target, False
        else:
            student = _exp(_log_softmax(student_logits / temperature, keep), keep)
            difference, softened = student - _renormalise(target, keep), True
        summand = difference.square() if kind == "mse" else difference.abs()
        if keep is not None:
            summand = torch.where(keep, summand, 0.0)
    else:
        softened = True
        log_s = _log_softmax(student_logits / temperature, keep)
        s = _exp(log_s, keep)
        if target_space == "logits":
            log_t = _log_softmax(target / temperature, keep)
            t = _exp(log_t, keep)
        else:
            t = _renormalise(target, keep)
            # The clamp makes 0 · log 0 zero, and its gradient finite.
            log_t = t.clamp_min(torch.finfo(t.dtype).tiny).log()
        entropy = 1.0 if kind == "kl" else 0.0  # soft_ce is kl without the target's own entropy
        forward = t * (entropy * log_t - log_s)
        reverse = s * (entropy * log_s - log_t)
        summand = {"forward": forward, "reverse": reverse, "symmetric": 0.5 * (forward + reverse)}[direction]

    if class_weight is not None:
        summand = summand * class_weight
    if sample_weight is not None:
        summand = summand * sample_weight[:, None]
    samples, classes = student_logits.shape
    if reduction == "batchmean":
        loss = summand.sum() / max(samples, 1)
    elif keep is None:
        loss = summand.sum() / max(samples * classes, 1)
    else:
        loss = summand.sum() / keep.sum().clamp_min(1)
    return loss * temperature**2 if t_squared and softened else loss


def label_and_teacher(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    share: float,
    taught: Tensor | None = None,
) -> Tensor:
    r"""Return a mixture of cross-entropy and distillation, mean over samples, at temperature 1.

    :math:`\epsilon\,CE + (1 - \epsilon)\,KL(t \| s)` for samples that have a teacher, :math:`CE` for the others.

    Parameters
    ----------
    student_logits, teacher_logits : Tensor
        Shape [N, C].
    labels : Tensor
        Class indices, shape [N].
    share : float
        ε, the share of the labels, from 0 to 1.
    taught : Tensor, optional
        1.0 for samples that have a teacher and 0.0 for others, shape [N]; default: all have one.

    Returns
    -------
    Tensor
        Scalar.

    Examples
    --------
    >>> student, teacher = torch.tensor([[0.0, 0.0], [0.0, 0.0]]), torch.tensor([[9.0, 9.0], [9.0, 9.0]])
    >>> loss = label_and_teacher(student, teacher, torch.tensor([0, 1]), share=0.25, taught=torch.tensor([1.0, 0.0]))
    >>> round(loss.item(), 4)  # (0.25 log 2 + log 2) / 2
    0.4332
    """
    taught = torch.ones_like(student_logits[:, 0]) if taught is None else taught
    by_label = _by_sample(student_logits, labels)
    by_teacher = kd(
        student_logits,
        teacher_logits,
        temperature=1.0,
        reduction="batchmean",
        t_squared=False,
        sample_weight=(1.0 - share) * taught,
    )
    return (by_label * (1.0 - (1.0 - share) * taught)).mean() + by_teacher


def decoupled_kd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    temperature: float,
    t_squared: bool,
    alpha: float = 1.0,
    beta: float = 8.0,
) -> Tensor:
    r"""Return decoupled distillation, mean over samples.

    :math:`\alpha KL(b_t \| b_s) + \beta KL(\hat p_t \| \hat p_s)`, where :math:`b = (p_y, 1 - p_y)` says how
    sure a model is of the label, and :math:`\hat p` is the softmax over the other classes. With :math:`\alpha
    = 1` and :math:`\beta = 1 - p_{t,y}` the sum is plain distillation.

    Parameters
    ----------
    student_logits, teacher_logits : Tensor
        Shape [N, C].
    labels : Tensor
        Class indices, shape [N].
    temperature : float
        T > 0.
    t_squared : bool
        Whether to multiply by T²; the paper's code does.
    alpha, beta : float
        Weights of the target and the non-target part; the paper uses alpha 1 and beta 2 to 8.

    Returns
    -------
    Tensor
        Scalar.

    Notes
    -----
    Zhao et al., Decoupled Knowledge Distillation, CVPR 2022.
    """
    others = not_true_mask(labels, student_logits.shape[-1])
    log_s, log_t = (
        _label_against_rest(at_least_float32(z) / temperature, others) for z in (student_logits, teacher_logits)
    )
    target = (log_t.exp() * (log_t - log_s)).sum() / max(len(student_logits), 1)
    non_target = kd(
        student_logits,
        teacher_logits,
        temperature=temperature,
        reduction="batchmean",
        t_squared=False,
        class_mask=others,
    )
    loss = alpha * target + beta * non_target
    return loss * temperature**2 if t_squared else loss


def correlation(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float,
    t_squared: bool,
    beta: float = 2.0,
    gamma: float = 2.0,
) -> Tensor:
    r"""Return DIST: one minus the Pearson correlation of probabilities, within samples and within classes.

    :math:`\beta \frac1N \sum_n (1 - \rho(s_{n,:}, t_{n,:})) + \gamma \frac1C \sum_c (1 - \rho(s_{:,c},
    t_{:,c}))`. Rows or columns without variance correlate with nothing: they count as one, without gradient.

    Parameters
    ----------
    student_logits, teacher_logits : Tensor
        Shape [N, C].
    temperature : float
        T > 0.
    t_squared : bool
        Whether to multiply by T²; the paper's code does.
    beta, gamma : float
        Weights of the inter-class and the intra-class part; 2 and 2 in the paper.

    Returns
    -------
    Tensor
        Scalar between 0 and 2 (beta + gamma), before T².

    Notes
    -----
    Huang et al., Knowledge Distillation from a Stronger Teacher, NeurIPS 2022.
    """
    s = F.softmax(at_least_float32(student_logits) / temperature, dim=-1)
    t = F.softmax(at_least_float32(teacher_logits) / temperature, dim=-1)
    loss = beta * (1 - _pearson(s, t)).mean() + gamma * (1 - _pearson(s.T, t.T)).mean()
    return loss * temperature**2 if t_squared else loss


def at_least_float32(x: Tensor) -> Tensor:
    """Return half-precision tensors in float32, others as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _log_softmax(logits: Tensor, keep: Tensor | None) -> Tensor:
    """Log-softmax over the kept classes, zero elsewhere."""
    if keep is None:
        return F.log_softmax(logits, dim=-1).clamp_min(_LEAST)
    # A finite fill, because a row of -inf alone is NaN.
    filled = logits.masked_fill(~keep, torch.finfo(logits.dtype).min)
    return torch.where(keep, F.log_softmax(filled, dim=-1).clamp_min(_LEAST), 0.0)


def _exp(log_probs: Tensor, keep: Tensor | None) -> Tensor:
    return log_probs.exp() if keep is None else torch.where(keep, log_probs.exp(), 0.0)


def _renormalise(probs: Tensor, keep: Tensor | None) -> Tensor:
    if keep is None:
        return probs
    kept = torch.where(keep, probs, 0.0)
    return kept / kept.sum(-1, keepdim=True).clamp_min(torch.finfo(probs.dtype).tiny)


def _label_against_rest(logits: Tensor, others: Tensor) -> Tensor:
    """Return log (p_y, 1 - p_y), shape [N, 2]."""
    low = torch.finfo(logits.dtype).min
    whole = logits.logsumexp(-1)
    parts = [logits.masked_fill(mask, low).logsumexp(-1) - whole for mask in (others, ~others)]
    return torch.stack(parts, dim=-1).clamp_min(_LEAST)


def _pearson(a: Tensor, b: Tensor) -> Tensor:
    return F.cosine_similarity(_centred(a), _centred(b), dim=-1, eps=1e-8)


def _centred(values: Tensor) -> Tensor:
    """Return deviations from the mean; none where they are no more than the mean's rounding errors.

    Equal numbers may differ from their mean in the last bit, and a correlation would divide by that.
    """
    deviations = values - values.mean(-1, keepdim=True)
    noise = (8 * torch.finfo(values.dtype).eps) ** 2 * values.square().sum(-1, keepdim=True)
    return torch.where(deviations.square().sum(-1, keepdim=True) > noise, deviations, 0.0)
