"""Students without convolutions: a multilayer perceptron, and an embedding bag for text."""

import math
from itertools import pairwise
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from fedkd.models.base import Body, Classifier, Norm

Units = Annotated[int, Field(ge=1)]


def mlp(
    num_classes: int,
    input_shape: tuple[int, ...],
    norm: Norm,
    *,
    hidden: Annotated[tuple[Units, ...], Field(min_length=1)] = (200,),
) -> Classifier:
    """Fully connected layers, without norms; option hidden (units of every hidden layer, default [200])."""
    widths = [math.prod(input_shape), *hidden]
    stages = [nn.Sequential(nn.Linear(before, after), nn.ReLU()) for before, after in pairwise(widths)]
    stages[0].insert(0, nn.Flatten())
    return Classifier(Body(stages), nn.Linear(widths[-1], num_classes))


def text(num_classes: int, vocab_size: int, *, dim: Units = 64) -> Classifier:
    """Mean of word embeddings and a linear layer, without norms; option dim (of embeddings, default 64)."""
    return Classifier(Body([EmbeddingMean(vocab_size, dim)]), nn.Linear(dim, num_classes))


class EmbeddingMean(nn.Module):
    """Mean of the embeddings of a text's words; id 0 is padding and counts for nothing.

    Parameters
    ----------
    vocab_size : int
        Number of token ids, padding included.
    dim : int
        Width of embeddings.
    """

    def __init__(self, vocab_size: int, dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, dim, padding_idx=0)
        with torch.no_grad():
            # A tenth of PyTorch's spread: at full spread SGD needs far longer to drown the random part.
            self.embedding.weight.mul_(0.1)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the means, [N, dim], of tokens [N, L]; zero for a text of padding alone."""
        words = (tokens != 0).to(self.embedding.weight.dtype)
        share = words / words.sum(1, keepdim=True).clamp_min(1)
        # A product instead of a masked sum: no second tensor of the size [N, L, dim].
        return torch.bmm(share[:, None], self.embedding(tokens)).squeeze(1)
