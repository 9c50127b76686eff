"""Students from elsewhere: torchvision's classification models, and anybody's module."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedkd.errors import ScenarioError
from fedkd.models.base import Classifier, Norm, Outputs, make_norm, refuse_batch_of_one
from fedkd.plugins import load_object
from fedkd.wording import did_you_mean

KEY = "models.student"


class Foreign(Classifier):
    """A torchvision model, cut before its last linear layer.

    Parameters
    ----------
    body, head : nn.Module
        See `Classifier`.
    head_path : str
        Where the head was in the original, for weights that are stored under the original names.
    repeat_grey : bool
        Whether grey images are repeated to three channels.
    """

    def __init__(self, body: nn.Module, head: nn.Module, head_path: str = "", repeat_grey: bool = False) -> None:
        super().__init__(body, head)
        self.head_path, self.repeat_grey = head_path, repeat_grey

    def forward(self, x: Tensor) -> Outputs:
        """Return the outputs for a batch; taps are empty."""
        return super().forward(x.expand(-1, 3, -1, -1) if self.repeat_grey else x)

    def own_name(self, name: str) -> str:
        """Return the name in this model of an entry in the original's state."""
        if self.head_path and name.startswith(f"{self.head_path}."):
            return "head." + name.removeprefix(f"{self.head_path}.")
        return f"body.{name}"


class Wrapped(nn.Module):
    """A module that returns logits, made to return `Outputs` whose features are the logits themselves.

    Parameters
    ----------
    module : nn.Module
        One whose output is not that of a last linear layer.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Outputs:
        """Return logits, twice."""
        refuse_batch_of_one(self, x)
        logits = self.module(x)
        return Outputs(logits, logits)


def torchvision_model(
    name: str, num_classes: int, input_shape: tuple[int, ...], norm: Norm, options: dict[str, Any]
) -> nn.Module:
    """Return an untrained classification model of torchvision.

    Parameters
    ----------
    name : str
        torchvision's name, such as ``resnet18``.
    num_classes : int
        C.
    input_shape : tuple of int
        (1, H, W) or (3, H, W).
    norm : {"group", "batch", "none"}
        What stands in for the model's BatchNorm layers; other norms stay.
    options : dict
        Passed on to torchvision's builder.

    Raises
    ------
    ScenarioError
        If there is no such model, it does not take the options, or it cannot take images of this size.
    """
    import torchvision.models as zoo  # takes a second, so only where it is needed

    known = zoo.list_models(module=zoo)
    label = f"torchvision:{name}"
    if name not in known:
        hint = did_you_mean(name, known, "models of torchvision")
        raise ScenarioError(f"torchvision has no classification model {name!r}", key=KEY, hint=hint)
    if input_shape[0] not in (1, 3):
        raise ScenarioError(f"{label} takes 1 or 3 channels, not {input_shape[0]}", key=KEY, hint="use cnn or resnet8")
    builder = zoo.get_model_builder(name)
    settings: dict[str, Any] = {"weights": None, "num_classes": num_classes}
    if name in ("googlenet", "inception_v3"):
        settings |= {"aux_logits": False, "init_weights": True}
    if name.startswith("vit_"):
        settings["image_size"] = input_shape[1]
    size = "x".join(map(str, input_shape[1:]))
    try:
        model = builder(**(settings | options))
        _replace_batch_norm(model, norm)
        return _split(model, _example("image", (3, *input_shape[1:])), repeat_grey=input_shape[0] == 1)
    except TypeError as error:
        raise ScenarioError(f"{label} cannot be built: {_line(error)}", key="models.options") from error
    except (RuntimeError, ValueError, AssertionError) as error:
        raise ScenarioError(
            f"{label} cannot take images of {size}: {_line(error)}",
            key=KEY,
            hint="use larger images, a built-in model, or one with less pooling such as torchvision:resnet18",
        ) from error


def module_model(name: str, arguments: dict[str, Any], options: dict[str, Any]) -> nn.Module:
    """Return what somebody's callable builds, made to return `Outputs`.

    Parameters
    ----------
    name : str
        ``module:attribute`` of a callable that returns an ``nn.Module``.
    arguments : dict
        num_classes, input_shape, kind, vocab_size, norm; the callable gets those that its signature names.
    options : dict
        Passed on as they are.

    Returns
    -------
    nn.Module
        The module itself if it returns `Outputs`. One that returns logits is cut before its last linear
        layer; if its output is not that layer's output, the features are the logits.

    Raises
    ------
    ScenarioError
        If it cannot be imported or called, or what it builds is no classifier for this data set.
    """
    factory: Callable[..., Any] = load_object(name, key=KEY)
    if not callable(factory):
        raise ScenarioError(f"{name!r} is not callable", key=KEY, hint="name a function or class that makes a module")
    try:
        parameters = inspect.signature(factory).parameters.values()
    except ValueError as error:  # of some functions written in C
        raise ScenarioError(f"{name!r} cannot be called: {_line(error)}", key=KEY) from error
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    wanted = {p.name for p in parameters}
    try:
        model = factory(**{k: v for k, v in arguments.items() if takes_all or k in wanted}, **options)
    except ScenarioError:
        raise
    except Exception as error:  # anybody's code
        problem = f"{name!r} cannot be called: {type(error).__name__}: {_line(error)}"
        raise ScenarioError(problem, key=KEY) from error
    if not isinstance(model, nn.Module):
        raise ScenarioError(f"{name!r} returned {type(model).__name__}, not an nn.Module", key=KEY)

    x = _example(arguments["kind"], arguments["input_shape"], arguments["vocab_size"])
    expected = (len(x), arguments["num_classes"])
    try:
        output = _evaluate(model, x)
    except Exception as error:  # anybody's code: any error means that it does not take this data set
        raise ScenarioError(
            f"{name!r} fails on inputs of shape {tuple(arguments['input_shape'])}: {_line(error)}", key=KEY
        ) from error
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or tuple(logits.shape) != expected:
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ScenarioError(f"{name!r} returns {shape}, not logits [N, {expected[1]}]", key=KEY)
    if isinstance(output, Outputs):
        return model
    if not isinstance(output, Tensor):
        raise ScenarioError(
            f"{name!r} returns {type(output).__name__}",
            key=KEY,
            hint="return logits, or fedkd.models.Outputs",
        )
    return _split(model, x)


def _split(model: nn.Module, x: Tensor, repeat_grey: bool = False) -> nn.Module:
    """Cut a model before its last linear layer if its output is that layer's output; else wrap it."""
    linear = [(path, module) for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    whole = _evaluate(model, x)
    if linear and linear[-1][0]:
        path, head = linear[-1]
        model.set_submodule(path, nn.Identity())
        if _is_cut(model, head, x, whole):
            return Foreign(model, head, path, repeat_grey).train()
        model.set_submodule(path, head)
    return Foreign(model, nn.Identity(), "", repeat_grey).train() if repeat_grey else Wrapped(model).train()


def _is_cut(body: nn.Module, head: nn.Linear, x: Tensor, whole: Tensor) -> bool:
    """Whether body and head make of `x` what the uncut model made of it."""
    try:
        features = _evaluate(body, x)
        with torch.no_grad():
            return features.ndim == 2 and torch.equal(head(features), whole)
    except Exception:  # layers after the head do not fit what is before it, so it cannot be cut here
        return False


def _evaluate(model: nn.Module, x: Tensor) -> Any:
    model.eval()
    with torch.no_grad():
        output = model(x)
    model.train()
    return output


def _example(kind: str, input_shape: tuple[int, ...], vocab_size: int = 0) -> Tensor:
    """Return two samples that differ, without drawing from any generator."""
    numbers = torch.arange(2 * int(torch.tensor(input_shape).prod())).reshape(2, *input_shape)
    return numbers % max(vocab_size, 1) if kind == "tokens" else numbers.float().sin()


def _replace_batch_norm(model: nn.Module, norm: Norm) -> None:
    if norm == "batch":
        return
    for path, module in list(model.named_modules()):
        if isinstance(module, _BatchNorm):
            model.set_submodule(path, make_norm(norm, module.num_features))


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
