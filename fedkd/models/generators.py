"""Conditional generators: from noise and labels to samples in the shape of a task."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedkd.errors import ScenarioError

SLOPE = 0.2  # of leaky ReLU below zero


class Generator(nn.Module):
    """Base of all generators: called as ``generator(noise, labels)``.

    Its samples are normalised as those of the task are: every channel (or number) has mean 0 and deviation 1.

    Parameters
    ----------
    noise : int
        Numbers that a sample is made of, beside its label.
    num_classes : int
        C.
    """

    def __init__(self, noise: int, num_classes: int) -> None:
        super().__init__()
        self.noise, self.num_classes = noise, num_classes

    def forward(self, noise: Tensor, labels: Tensor) -> Tensor:
        """Return samples [n, ...].

        Parameters
        ----------
        noise : Tensor
            Float32 [n, noise].
        labels : Tensor
            Int64 [n].
        """
        return self.draw(noise, F.one_hot(labels, self.num_classes).to(noise.dtype))

    def draw(self, noise: Tensor, labels: Tensor) -> Tensor:
        """Return samples for one-hot labels [n, C]."""
        raise NotImplementedError


class ImageGenerator(Generator):
    """FedFTG's convolutional generator, for images of any size.

    Noise and label become halves of the channels of a map of a quarter of the size, which is doubled twice with
    convolutions after each (Zhang et al., CVPR 2022, as released).

    Parameters
    ----------
    noise, num_classes : int
        See `Generator`.
    input_shape : (C, H, W)
        Of the images.
    width : int
        Channels of each half; the last hidden map has as many.
    """

    def __init__(self, noise: int, num_classes: int, input_shape: tuple[int, ...], width: int = 64) -> None:
        super().__init__(noise, num_classes)
        channels, *size = input_shape
        self.size = size
        self.sizes = [[max(1, math.ceil(side / divisor)) for side in size] for divisor in (4, 2, 1)]
        self.width = width
        area = math.prod(self.sizes[0])
        self.from_noise = nn.Linear(noise, width * area)
        self.from_label = nn.Linear(num_classes, width * area)
        self.first = nn.BatchNorm2d(2 * width)
        self.second = nn.Sequential(
            nn.Conv2d(2 * width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), nn.LeakyReLU(SLOPE)
        )
        self.third = nn.Sequential(
            nn.Conv2d(2 * width, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.LeakyReLU(SLOPE),
            nn.Conv2d(width, channels, 3, padding=1),
            nn.Tanh(),
            nn.BatchNorm2d(channels, affine=False),
        )

    def draw(self, noise: Tensor, labels: Tensor) -> Tensor:
        """Return images [n, C, H, W] for one-hot labels."""
        halves = [
            part.view(len(noise), self.width, *self.sizes[0])
            for part in (self.from_noise(noise), self.from_label(labels))
        ]
        maps = F.interpolate(self.first(torch.cat(halves, dim=1)), self.sizes[1])
        return self.third(F.interpolate(self.second(maps), self.sizes[2]))


class VectorGenerator(Generator):
    """Fully connected layers, for samples that are vectors.

    Parameters
    ----------
    noise, num_classes : int
        See `Generator`.
    input_shape : (D,)
        Of the samples.
    width : int
        Units of the two hidden layers.
    """

    def __init__(self, noise: int, num_classes: int, input_shape: tuple[int, ...], width: int = 64) -> None:
        super().__init__(noise, num_classes)
        self.layers = nn.Sequential(
            nn.Linear(noise + num_classes, width),
            nn.BatchNorm1d(width),
            nn.LeakyReLU(SLOPE),
            nn.Linear(width, width),
            nn.BatchNorm1d(width),
            nn.LeakyReLU(SLOPE),
            nn.Linear(width, math.prod(input_shape)),
            nn.BatchNorm1d(math.prod(input_shape), affine=False),
        )

    def draw(self, noise: Tensor, labels: Tensor) -> Tensor:
        """Return vectors [n, D] for one-hot labels."""
        return self.layers(torch.cat([noise, labels], dim=1))


def build_generator(
    kind: str, input_shape: tuple[int, ...], num_classes: int, *, noise: int = 100, width: int = 64, seed: int = 0
) -> Generator:
    """Return a generator for a kind of data; equal arguments give equal bits, and no global generator is disturbed.

    Parameters
    ----------
    kind : str
        ``image`` or ``vector``.
    input_shape : tuple of int
        Of a sample.
    num_classes : int
        C.
    noise, width : int
        See `Generator`, `ImageGenerator`, `VectorGenerator`.
    seed : int
        Seed of the random weights.

    Raises
    ------
    ScenarioError
        There is no generator for this kind: words are no numbers.

    Examples
    --------
    >>> generator = build_generator("image", (3, 10, 9), 5, noise=7, width=4)
    >>> tuple(generator(torch.randn(2, 7), torch.tensor([0, 4])).shape)
    (2, 3, 10, 9)
    """
    makers = {"image": ImageGenerator, "vector": VectorGenerator}
    if kind not in makers:
        raise ScenarioError(
            f"samples of kind {kind!r} cannot be generated", key="data.source", hint=f"only {' and '.join(makers)} data"
        )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return makers[kind](noise, num_classes, tuple(input_shape), width)
