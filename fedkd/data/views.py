"""Random views of samples for self-supervised learning: what a model should not care about."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

AREA = (0.25, 1.0)  # share of an image that a view shows
RATIO = (3 / 4, 4 / 3)  # its width over its height
JITTER = 0.4  # contrast and brightness vary by as much
GREY = 0.2  # share of colour images that lose their colour
CORRUPTED = 0.3  # share of a vector's numbers, or of a text's words, that are replaced


def random_view(x: Tensor, kind: str, generator: torch.Generator) -> Tensor:
    """Return a random view of every sample of a batch.

    Images: a part of them, scaled to their size, mirrored or not, with other contrast and brightness, and some in grey
    (after SimCLR). Vectors: some numbers are those of other samples (after SCARF). Texts: some words are unknown.

    Parameters
    ----------
    x : Tensor
        As `fedkd.data.batches.ArrayData.gather` returns them.
    kind : str
        ``image``, ``vector`` or ``tokens``.
    generator : torch.Generator
        On the CPU, so that every device sees the same views.

    Notes
    -----
    Chen et al., A Simple Framework for Contrastive Learning of Visual Representations, ICML 2020; Bahri et al., SCARF:
    Self-Supervised Contrastive Learning using Random Feature Corruption, ICLR 2022.
    """
    if kind == "image":
        return _recolour(_crop(x, generator), generator)
    replaced = (torch.rand(x.shape, generator=generator) < CORRUPTED).to(x.device)
    if kind == "tokens":
        return torch.where(replaced & (x != 0), torch.ones_like(x), x)  # 0 is padding, 1 an unknown word
    donors = torch.randint(len(x), x.shape, generator=generator).to(x.device)
    return torch.where(replaced, x.gather(0, donors), x)


def _crop(x: Tensor, generator: torch.Generator) -> Tensor:
    """Return a part of each image, mirrored or not, at its full size."""
    count = len(x)

    def draw(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=generator)

    area, ratio = draw(*AREA), draw(*map(math.log, RATIO)).exp()
    width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    across, down = draw(-1, 1) * (1 - width), draw(-1, 1) * (1 - height)
    mirror = torch.where(draw(0, 1) < 0.5, -1.0, 1.0)
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0], theta[:, 0, 2] = width * mirror, across
    theta[:, 1, 1], theta[:, 1, 2] = height, down
    grid = F.affine_grid(theta.to(x), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _recolour(x: Tensor, generator: torch.Generator) -> Tensor:
    """Return images with other contrast and brightness, and some of the coloured ones in grey."""
    count = len(x)

    def draw() -> Tensor:
        return torch.rand(count, 1, 1, 1, generator=generator).to(x)

    contrast, brightness = 1 + JITTER * (2 * draw() - 1), JITTER * (2 * draw() - 1)
    grey = draw() < GREY
    mean = x.mean((1, 2, 3), keepdim=True)
    changed = (x - mean) * contrast + mean + brightness
    return torch.where(grey, changed.mean(1, keepdim=True), changed)
