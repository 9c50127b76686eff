"""Students by name: a body and a head, seeded, with `Outputs` from one forward pass."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from fedkd.errors import ScenarioError
from fedkd.models import dense, vision
from fedkd.models.base import Body, Classifier, Outputs
from fedkd.models.foreign import module_model, torchvision_model
from fedkd.models.pretrained import load_pretrained
from fedkd.options import check_options
from fedkd.wording import did_you_mean

__all__ = ["PATTERNS", "Body", "Classifier", "Outputs", "build", "check", "describe", "names"]

Kind = Literal["image", "tokens", "vector"]
SMALLEST = 8  # pixels; smaller images do not survive the poolings

PATTERNS = {
    "torchvision:NAME": "Any classification model of torchvision, untrained, such as torchvision:resnet18.",
    "module:attribute": "A callable that returns an nn.Module, which returns logits or fedkd.models.Outputs.",
}
"""Names that stand for more than one model, with one line about each."""


class _Entry(NamedTuple):
    builder: Callable[..., Classifier]
    kinds: tuple[Kind, ...]


_MODELS = {
    "mlp": _Entry(dense.mlp, ("image", "vector")),
    "cnn": _Entry(vision.cnn, ("image",)),
    "fedavg_cnn": _Entry(vision.fedavg_cnn, ("image",)),
    "resnet8": _Entry(vision.resnet8, ("image",)),
    "resnet20": _Entry(vision.resnet20, ("image",)),
    "resnet32": _Entry(vision.resnet32, ("image",)),
    "vgg9": _Entry(vision.vgg9, ("image",)),
    "text": _Entry(dense.text, ("tokens",)),
}


def names() -> list[str]:
    """Return the names of all built-in models; see `PATTERNS` for the others.

    Examples
    --------
    >>> names()[:3]
    ['mlp', 'cnn', 'fedavg_cnn']
    """
    return list(_MODELS)


def describe(name: str) -> str:
    """Return one line about a model.

    Parameters
    ----------
    name : str
        A built-in name, ``torchvision:NAME`` or ``module:attribute``.

    Raises
    ------
    ScenarioError
        With the key ``models.student`` if there is no such model.

    Examples
    --------
    >>> describe("resnet8")
    'CIFAR ResNet with 8 layers, 16-32-64 channels; option width.'
    """
    check(name)
    if name in _MODELS:
        return (inspect.getdoc(_MODELS[name].builder) or "").splitlines()[0]
    source, _, attribute = name.partition(":")
    return f"torchvision's {attribute}, untrained." if source == "torchvision" else f"{attribute} of {source}."


def check(name: str, kind: str = "", key: str = "models.student") -> None:
    """Refuse a name that no model has, and a model that cannot take a kind of data.

    Parameters
    ----------
    name : str
        Name of the model.
    kind : {"", "image", "tokens", "vector"}
        Kind of the data; empty to check the name alone.
    key : str
        Key of the scenario to blame.

    Raises
    ------
    ScenarioError
        With `key`.

    Examples
    --------
    >>> check("text", "image")
    Traceback (most recent call last):
    fedkd.errors.ScenarioError: models.student: model 'text' takes tokens, not image data
      for image data: mlp, cnn, fedavg_cnn, resnet8, resnet20, resnet32, vgg9
    """
    source, _, attribute = name.partition(":")
    if name in _MODELS:
        kinds: tuple[str, ...] = _MODELS[name].kinds
    elif source and attribute:
        kinds = ("image",) if source == "torchvision" else ("image", "tokens", "vector")
    else:
        hint = f"{did_you_mean(name, _MODELS, 'models')}, {', '.join(PATTERNS)}"
        raise ScenarioError(f"unknown model {name!r}", key=key, hint=hint)
    if kind and kind not in kinds:
        able = ", ".join(n for n, entry in _MODELS.items() if kind in entry.kinds) or "module:attribute"
        raise ScenarioError(
            f"model {name!r} takes {' or '.join(kinds)}, not {kind} data",
            key=key,
            hint=f"for {kind} data: {able}",
        )


def build(
    name: str,
    *,
    num_classes: int,
    input_shape: tuple[int, ...],
    kind: Kind,
    vocab_size: int = 0,
    norm: Literal["group", "batch", "none"] = "group",
    seed: int = 0,
    pretrained: str = "",
    **options: Any,
) -> nn.Module:
    """Build a model; equal arguments give equal bits, and no global generator is disturbed.

    Parameters
    ----------
    name : str
        A name of `names`, ``torchvision:NAME`` or ``module:attribute``.
    num_classes : int
        C, at least 1.
    input_shape : tuple of int
        (C, H, W) of an image, (L,) of tokens, (D,) of a vector.
    kind : {"image", "tokens", "vector"}
        What the inputs are.
    vocab_size : int
        Number of token ids, padding (0) included; for tokens alone.
    norm : {"group", "batch", "none"}
        Normalisation layers; ``mlp`` and ``text`` have none.
    seed : int
        Seed of the random weights.
    pretrained : str
        Safetensors file to start from; empty = random weights.
    **options
        The model's own parameters, and two for all: ``fresh_head`` (with `pretrained`: leave the head
        random), and a table under a model's name, whose entries are for that model alone (for federations of
        several models).

    Returns
    -------
    nn.Module
        In training mode, on the CPU, float32; ``forward(x)`` returns `Outputs`.

    Raises
    ------
    ScenarioError
        For an unknown model or option, a kind or size of data that the model cannot take, or weights that do
        not fit.

    Examples
    --------
    >>> model = build("cnn", num_classes=10, input_shape=(1, 8, 8), kind="image")
    >>> [tuple(t.shape) for t in model(torch.zeros(2, 1, 8, 8)).taps]
    [(2, 16, 4, 4), (2, 32, 2, 2)]
    """
    check(name, kind)
    input_shape = tuple(input_shape)
    if norm not in ("group", "batch", "none"):
        raise ScenarioError(f"must be group, batch or none, is {norm!r}", key="models.norm")
    if num_classes < 1:
        raise ScenarioError(f"a model needs at least one class, not {num_classes}", key="data.source")
    options = _own_options(name, options)
    fresh_head = options.pop("fresh_head", False)
    if not isinstance(fresh_head, bool):
        raise ScenarioError(f"fresh_head must be true or false, is {fresh_head!r}", key="models.options")

    with torch.random.fork_rng(devices=[]):
        # The CPU's generator alone: torch.manual_seed would also set those of GPUs.
        torch.default_generator.manual_seed(seed)
        model = _make(name, num_classes, input_shape, kind, vocab_size, norm, options)
    if pretrained:
        load_pretrained(model, pretrained, fresh_head=fresh_head)
    return model


def _make(
    name: str,
    num_classes: int,
    input_shape: tuple[int, ...],
    kind: Kind,
    vocab_size: int,
    norm: Literal["group", "batch", "none"],
    options: dict[str, Any],
) -> nn.Module:
    if name.startswith("torchvision:"):
        return torchvision_model(name.partition(":")[2], num_classes, input_shape, norm, options)
    if name not in _MODELS:
        arguments = {
            "num_classes": num_classes,
            "input_shape": input_shape,
            "kind": kind,
            "vocab_size": vocab_size,
            "norm": norm,
        }
        return module_model(name, arguments, options)

    builder = _MODELS[name].builder
    options = check_options(builder, options, key="models.options", owner=f"model {name!r}")
    if kind == "tokens":
        if vocab_size < 1:
            raise ScenarioError(f"model {name!r} needs a vocabulary, and the data have none", key="models.student")
        return builder(num_classes, vocab_size, **options)
    if kind == "image" and name != "mlp" and min(input_shape[1:]) < SMALLEST:
        size = "x".join(map(str, input_shape[1:]))
        raise ScenarioError(
            f"model {name!r} takes images from {SMALLEST}x{SMALLEST} pixels, not {size}",
            key="models.student",
            hint="use mlp",
        )
    return builder(num_classes, input_shape, norm, **options)


def _own_options(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options for all models and those in the table of this one."""
    shared = {key: value for key, value in options.items() if not _is_table_of_model(key, value)}
    return shared | dict(options.get(name, {}) if isinstance(options.get(name), Mapping) else {})


def _is_table_of_model(key: str, value: Any) -> bool:
    return isinstance(value, Mapping) and (key in _MODELS or ":" in key)
