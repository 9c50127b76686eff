"""The shape of every student: a body and a head that give logits, features and taps in one forward pass."""

from collections.abc import Callable, Iterable, Iterator
from typing import Literal, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedkd.errors import ScenarioError

Norm = Literal["group", "batch", "none"]


class Outputs(NamedTuple):
    """What a model says about a batch.

    Parameters
    ----------
    logits : Tensor
        Before the softmax, [N, C].
    features : Tensor
        Input of the head, [N, D].
    taps : tuple of Tensor
        Outputs of the body's stages, first to last: maps [N, c, H, W] or vectors [N, d]. Empty for foreign
        models.
    """

    logits: Tensor
    features: Tensor
    taps: tuple[Tensor, ...] = ()


class Body(nn.Module):
    """Stages in a row, and a neck that turns the last stage's output into features.

    Parameters
    ----------
    stages : iterable of nn.Module
        Their outputs are the taps. A model is cut between stages: ``body.stages[:1]`` is a client's part.
    neck : nn.Module
        From the last stage's output to features [N, D].
    """

    def __init__(self, stages: Iterable[nn.Module], neck: nn.Module | None = None) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.neck = neck if neck is not None else nn.Identity()

    def with_taps(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return features and the outputs of all stages."""
        taps = []
        for stage in self.stages:
            x = stage(x)
            taps.append(x)
        return self.neck(x), tuple(taps)

    def forward(self, x: Tensor) -> Tensor:
        """Return features, [N, D]."""
        return self.with_taps(x)[0]


class Classifier(nn.Module):
    """A body and a head.

    Parameters
    ----------
    body : nn.Module
        From inputs to features [N, D]; a `Body` also gives taps.
    head : nn.Module
        From features to logits [N, C].
    """

    def __init__(self, body: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.body, self.head = body, head

    def forward(self, x: Tensor) -> Outputs:
        """Return the outputs for a batch.

        Raises
        ------
        ScenarioError
            For a batch of one where BatchNorm would have to take statistics from it.
        """
        refuse_batch_of_one(self, x)
        features, taps = self.body.with_taps(x) if isinstance(self.body, Body) else (self.body(x), ())
        return Outputs(self.head(features), features, taps)


def bare_forward(model: nn.Module) -> Callable[[Tensor], Outputs]:
    """Return a model's forward pass without what PyTorch does around that of every module in it.

    Each call of a module looks for hooks, which small models feel. The bits are those of the model.

    Parameters
    ----------
    model : nn.Module
        Its modules must stay what they are, and have no hooks (see `has_hooks`). Other than a `Classifier` over a
        `Body` come back as they are.

    Examples
    --------
    >>> import torch
    >>> body = Body([nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU())])
    >>> model = Classifier(body, nn.Linear(3, 2))
    >>> x = torch.ones(5, 2, 2)
    >>> bool((bare_forward(model)(x).logits == model(x).logits).all())
    True
    """
    if type(model) is not Classifier or type(model.body) is not Body:
        return model
    stages = [list(_leaves(stage)) for stage in model.body.stages]
    neck, head = list(_leaves(model.body.neck)), list(_leaves(model.head))

    def forward(x: Tensor) -> Outputs:
        refuse_batch_of_one(model, x)
        taps = []
        for stage in stages:
            for leaf in stage:
                x = leaf(x)
            taps.append(x)
        for leaf in neck:
            x = leaf(x)
        logits = x
        for leaf in head:
            logits = leaf(logits)
        return Outputs(logits, x, tuple(taps))

    return forward


def _leaves(module: nn.Module) -> Iterator[Callable[[Tensor], Tensor]]:
    """Yield the forward passes of which that of a module consists."""
    if type(module) is nn.Sequential:
        for child in module:
            yield from _leaves(child)
    elif type(module) is not nn.Identity:
        yield module.forward


def has_hooks(model: nn.Module) -> bool:
    """Whether somebody wants to hear of calls of a model's modules, or of modules at all."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return _any_global_hook() or any(getattr(module, kind, None) for module in model.modules() for kind in kinds)


_any_global_hook: Callable[[], bool] = getattr(nn.modules.module, "_has_any_global_hook", lambda: False)


def refuse_batch_of_one(model: nn.Module, x: Tensor) -> None:
    """Raise `ScenarioError` if BatchNorm in training mode meets a single sample."""
    if model.training and len(x) == 1 and any(isinstance(m, _BatchNorm) and m.training for m in model.modules()):
        raise ScenarioError(
            "BatchNorm cannot learn from a batch of one sample",
            key="models.norm",
            hint='use norm = "group", or leave out a last batch of one',
        )


class GroupNorm(nn.GroupNorm):
    """GroupNorm in the precision of its weights, whatever comes in.

    So autocast leaves it in float32: PyTorch's does on a GPU, but not on a CPU, where half precision takes four times
    as long.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return the normalised maps."""
        return super().forward(input.to(self.weight.dtype))


def make_norm(kind: Norm, channels: int) -> nn.Module:
    """Return a normalisation layer for maps of `channels` channels.

    GroupNorm has the largest number of groups up to eight that divides the channels and leaves at least two
    in a group: a group of one would make zero of a map that is one pixel wide.

    Examples
    --------
    >>> [make_norm("group", channels).num_groups for channels in (16, 30, 7, 2)]
    [8, 6, 1, 1]
    """
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    if kind == "none":
        return nn.Identity()
    groups = max(g for g in range(1, 9) if channels % g == 0 and (channels // g >= 2 or g == 1))
    return GroupNorm(groups, channels)


def conv_norm(
    in_channels: int, out_channels: int, kernel: int, norm: Norm, *, stride: int = 1
) -> tuple[nn.Module, nn.Module]:
    """Return a convolution that keeps height and width (but for its stride) and its normalisation layer.

    The convolution has a bias only where no norm follows.
    """
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride=stride, padding=kernel // 2, bias=norm == "none")
    return conv, make_norm(norm, out_channels)


def he_initialise(module: nn.Module) -> None:
    """Draw all convolutions from He's normal distribution (fan out), biases zero."""
    for m in module.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
            if m.bias is not None:
                nn.init.zeros_(m.bias)


class GlobalAverage(nn.Module):
    """Mean over height and width: [N, c, H, W] to [N, c]."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the mean of every map."""
        return F.adaptive_avg_pool2d(x, 1).flatten(1)
