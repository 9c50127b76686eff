"""Self-supervised pre-training of a model's body on unlabelled data."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from fedkd.data.batches import ArrayData, epoch_order
from fedkd.data.views import random_view
from fedkd.errors import RunError
from fedkd.losses.contrastive import nt_xent
from fedkd.optimizers import Adam
from fedkd.seeds import seeded
from fedkd.students import autocast, borrowed


@dataclass(frozen=True)
class PretrainReport:
    """What happened in a pre-training.

    Parameters
    ----------
    steps : int
        Optimiser steps taken.
    loss_first, loss_last : float
        Loss of the first and of the last batch, each before its step.
    """

    steps: int
    loss_first: float
    loss_last: float


@dataclass(kw_only=True)
class SimCLR:
    """Trains features so that two views of a sample are alike, and unlike those of all others in the batch.

    Parameters
    ----------
    epochs : int
        Passes over the samples.
    batch_size : int
        Samples in a step, each in two views.
    lr, weight_decay : float
        Of Adam.
    temperature : float
        Of the contrast, see `fedkd.losses.contrastive.nt_xent`.
    width : int
        Of the projection of the features, two layers that are thrown away afterwards.
    device : str or torch.device
        Where the model is trained; it returns to where it was.
    channels_last : bool
        Memory layout of image batches and convolutions.
    precision : str
        ``fp32``, or ``bf16`` for forward and backward passes.

    Notes
    -----
    Chen, Kornblith, Norouzi, Hinton, A Simple Framework for Contrastive Learning of Visual Representations, ICML 2020.
    """

    epochs: int = 100
    batch_size: int = 512
    lr: float = 1e-3
    weight_decay: float = 1e-6
    temperature: float = 0.5
    width: int = 128
    device: str | torch.device = "cpu"
    channels_last: bool = False
    precision: str = "fp32"

    def fit(self, model: nn.Module, data: ArrayData, *, generator: np.random.Generator) -> PretrainReport:
        """Train a model in place, except for its head, which keeps its weights.

        Parameters
        ----------
        model : nn.Module
            ``forward(x)`` returns `fedkd.models.Outputs`. Every module has its mode again afterwards.
        data : ArrayData
            The samples; without labels.
        generator : np.random.Generator
            Order of the samples, views, projection and dropout.

        Raises
        ------
        RunError
            The loss is not finite.
        """
        device = torch.device(self.device)
        seed = int(generator.integers(2**63))
        views = torch.Generator().manual_seed(int(generator.integers(2**63)))
        ids = np.arange(len(data))
        batches = [
            batch
            for _ in range(self.epochs)
            for batch in epoch_order(ids, self.batch_size, generator, drop_single=True)
        ]
        first = last = 0.0
        with seeded(seed, device), borrowed(model, device):
            if self.channels_last:
                model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
            model.eval()
            with torch.no_grad():
                features = model(data.gather(ids[:2], device=device, channels_last=self.channels_last).x).features
            model.train()
            depth = features.shape[1]
            projection = nn.Sequential(nn.Linear(depth, depth), nn.ReLU(), nn.Linear(depth, self.width)).to(device)
            # The head has no part in the loss: without gradients, the optimiser leaves it alone.
            trained = [*model.parameters(), *projection.parameters()]
            optimizer = Adam(trained, self.lr, weight_decay=self.weight_decay)
            for step, batch in enumerate(batches):
                x = data.gather(batch, device=device, channels_last=self.channels_last).x
                pair = [random_view(x, data.kind, views) for _ in range(2)]
                with autocast(self.precision, device):
                    one, two = projection(model(torch.cat(pair)).features).chunk(2)
                loss = nt_xent(one, two, temperature=self.temperature)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                last = loss.detach()
                first = last if step == 0 else first
            optimizer.zero_grad()
        if batches and not math.isfinite(float(last)):
            raise RunError(f"pre-training diverged: the loss is not finite; lower its learning rate ({self.lr:g})")
        return PretrainReport(len(batches), float(first), float(last))
