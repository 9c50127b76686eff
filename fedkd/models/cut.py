"""Models in two parts: what stays with a client, and a tail on the server that goes on from its feature maps."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from fedkd.errors import ScenarioError
from fedkd.models.base import Body, Classifier, Outputs, refuse_batch_of_one
from fedkd.seeds import Purpose, torch_seed

Shape = tuple[int, ...]


def tap_shape(model: nn.Module, example: Tensor, stages: int, key: str = "models.student") -> Shape:
    """Return the shape of one sample's feature map behind so many stages of a model's body.

    Parameters
    ----------
    model : nn.Module
        The model; its mode is as it was afterwards.
    example : Tensor
        A batch of inputs.
    stages : int
        At least 1.
    key : str
        Key of the scenario to blame.

    Raises
    ------
    ScenarioError
        The model has fewer stages, or none that are known.

    Examples
    --------
    >>> from fedkd import models
    >>> cnn = models.build("cnn", num_classes=10, input_shape=(1, 28, 28), kind="image")
    >>> tap_shape(cnn, torch.zeros(1, 1, 28, 28), 1)
    (16, 14, 14)
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    with torch.no_grad():
        taps = model(example).taps
    for module, training in modes:
        module.training = training
    if len(taps) < stages:
        raise ScenarioError(
            f"a model that is cut after stage {stages} of its body has {len(taps) or 'no known'} stage(s)",
            key=key,
            hint="cut earlier, or use a built-in model of more stages, such as cnn or resnet8",
        )
    return tuple(taps[stages - 1].shape[1:])


class Tail(nn.Module):
    """The end of a model, which goes on from feature maps of other models.

    Feature maps of another shape than its own beginning would give pass an adapter first: maps are averaged (or
    repeated) to its height and width and mixed by a 1x1 convolution; vectors, or maps for a tail that wants vectors,
    are mixed by a linear layer.

    Parameters
    ----------
    model : Classifier
        The whole model; not changed.
    stages : int
        Stages that are left out, which the clients have instead.
    example : Tensor
        A batch of inputs of the whole model.
    sources : iterable of tuple of int
        Shapes of the feature maps that come in.
    seed : int
        The run's seed, of the adapters' random weights.
    """

    def __init__(self, model: nn.Module, stages: int, example: Tensor, sources: Iterable[Shape], seed: int = 0) -> None:
        super().__init__()
        wanted = tap_shape(model, example, stages, key="models.server")
        assert isinstance(model, Classifier) and isinstance(model.body, Body)
        self.body = Body(copy.deepcopy(list(model.body.stages[stages:])), copy.deepcopy(model.body.neck))
        self.head = copy.deepcopy(model.head)
        self.wanted = wanted
        self.adapters = nn.ModuleDict()
        for source in sorted(set(sources) - {wanted}):
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(torch_seed(seed, Purpose.MODEL_INIT, partition=math.prod(source)))
                self.adapters[_name(source)] = _adapter(source, wanted).to(example.device)

    def forward(self, features: Tensor) -> Outputs:
        """Return the outputs for feature maps of one shape."""
        refuse_batch_of_one(self, features)
        source = tuple(features.shape[1:])
        x = features if source == self.wanted else self.adapters[_name(source)](features)
        features, taps = self.body.with_taps(x)
        return Outputs(self.head(features), features, taps)

    def state_for(self, source: Shape, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the part of a state that feature maps of one shape pass."""
        own = f"adapters.{_name(source)}."
        return {name: t for name, t in state.items() if not name.startswith("adapters.") or name.startswith(own)}


def _name(shape: Shape) -> str:
    return "x".join(map(str, shape))


def _adapter(source: Shape, wanted: Shape) -> nn.Module:
    if len(source) == len(wanted) == 3:
        resize = nn.Identity() if source[1:] == wanted[1:] else nn.AdaptiveAvgPool2d((wanted[1], wanted[2]))
        return nn.Sequential(resize, nn.Conv2d(source[0], wanted[0], 1))
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(source), math.prod(wanted)), nn.Unflatten(1, wanted))
