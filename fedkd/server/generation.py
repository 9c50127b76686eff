"""What data-free methods share: labels to generate, live teachers, diversity, generator and student in turn."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from fedkd.errors import RunError
from fedkd.models.generators import Generator
from fedkd.optimizers import Optimizer
from fedkd.seeds import seeded
from fedkd.server.runtime import ServerRuntime
from fedkd.server.uploads import Upload
from fedkd.students import borrowed


def draw_labels(counts: np.ndarray | Tensor, number: int, generator: np.random.Generator) -> Tensor:
    """Return labels, int64 [number], drawn in proportion to class counts [C], which must not all be 0."""
    share = np.asarray(counts, dtype=np.float64)
    return torch.from_numpy(generator.choice(len(share), size=number, p=share / share.sum()))


def diversity(noise: Tensor, samples: Tensor) -> Tensor:
    """Return how much alike the samples are that came of different noise, in (0, 1]; the less the better.

    exp(-mean_{i,j} d(z_i, z_j) · d(x_i, x_j)) over all pairs, with the mean squared difference of the noise and the
    mean absolute difference of the samples: per number, so that it does not depend on the size of a sample.

    Parameters
    ----------
    noise : Tensor
        Shape [n, d].
    samples : Tensor
        Shape [n, ...].

    Notes
    -----
    Zhu, Hong, Zhou, Data-Free Knowledge Distillation for Heterogeneous Federated Learning, ICML 2021, as released;
    FedFTG (Zhang et al., CVPR 2022) has it from there.
    """
    flat = samples.flatten(1)
    between_noise = (noise[:, None] - noise[None]).square().mean(2)
    between_samples = torch.cdist(flat, flat, p=1) / flat.shape[1]
    return torch.exp(-(between_noise * between_samples).mean())


class Teachers:
    """Uploaded models on the server, frozen and in evaluation mode, through which gradients reach their inputs.

    Parameters
    ----------
    server : ServerRuntime
        Builds the architectures.
    uploads : iterable of Upload
        All of them are held at once.
    """

    def __init__(self, server: ServerRuntime, uploads: Iterable[Upload]) -> None:
        self._modules: dict[str, nn.Module] = {}
        self._states: list[tuple[str, Mapping[str, Tensor]]] = []
        for upload in uploads:
            arch = upload.arch
            if arch not in self._modules:
                self._modules[arch] = copy.deepcopy(server.model(arch)).eval().requires_grad_(False)
            state = server.complete(arch, upload.state)
            self._states.append((arch, {name: tensor.to(server.device) for name, tensor in state.items()}))

    def __len__(self) -> int:
        return len(self._states)

    def logits(self, number: int, x: Tensor) -> Tensor:
        """Return the logits [n, C] of one teacher."""
        arch, state = self._states[number]
        return torch.func.functional_call(self._modules[arch], dict(state), (x,)).logits.float()

    @torch.no_grad()
    def mean_probs(self, x: Tensor, weights: Tensor) -> Tensor:
        """Return Σ_k w_k σ(z_k) [n, C] for weights [k, n], without gradients."""
        probs = (self.logits(k, x).softmax(1) * weights[k, :, None] for k in range(len(self)))
        return torch.stack(list(probs)).sum(0)


@dataclass(frozen=True)
class Generated:
    """A batch of generated samples and what a teacher says about it.

    Parameters
    ----------
    x : Tensor
        Samples [n, ...].
    noise : Tensor
        What they are made of, [n, d].
    y : Tensor
        Their labels, int64 [n].
    student, teacher : Tensor
        Logits [n, C].
    weight : Tensor
        Weight of the teacher on each sample, [n].
    """

    x: Tensor
    noise: Tensor
    y: Tensor
    student: Tensor
    teacher: Tensor
    weight: Tensor


@dataclass(kw_only=True)
class Alternation:
    """A generator and a student in turn: one step of the generator for each teacher, then steps of the student.

    Parameters
    ----------
    generator, student : nn.Module
        On the server's device. The student is in evaluation mode while the generator learns, and the other way round.
    teachers : Teachers
        The clients' models.
    counts : Tensor
        Samples of each class at each teacher, [K, C]: labels are drawn in proportion to their sums.
    alpha : Tensor
        Weight of each teacher on samples of each class, [K, C].
    generator_loss : callable
        From a `Generated` batch to a scalar.
    student_loss : callable
        From the student's logits and the teachers' weighted mean of probabilities, both [n, C], to a scalar.
    tune, descend : Optimizer
        Of the generator and of the student.
    """

    generator: Generator
    student: nn.Module
    teachers: Teachers
    counts: Tensor
    alpha: Tensor
    generator_loss: Callable[[Generated], Tensor]
    student_loss: Callable[[Tensor, Tensor], Tensor]
    tune: Optimizer
    descend: Optimizer

    def run(
        self, iterations: int, student_steps: int, batch_size: int, rng: np.random.Generator, device: torch.device
    ) -> list[float]:
        """Return the student's losses, step by step.

        Raises
        ------
        RunError
            They are not finite.
        """
        noise, losses = torch.Generator().manual_seed(int(rng.integers(2**63))), []
        with seeded(int(rng.integers(2**63)), device), borrowed(self.student, device):
            for _ in range(iterations):
                y = draw_labels(self.counts.sum(0), batch_size, rng)
                weights, y = self.alpha[:, y].float().to(device), y.to(device)
                z = torch.randn(batch_size, self.generator.noise, generator=noise).to(device)
                self._teach_generator(z, y, weights)
                self.generator.eval()
                with torch.no_grad():
                    x = self.generator(z, y)
                target = self.teachers.mean_probs(x, weights)
                self.student.train().requires_grad_(True)
                for _ in range(student_steps):
                    losses.append(_step(self.descend, self.student_loss(self.student(x).logits, target)))
        history = torch.stack(losses).tolist() if losses else []
        if not np.isfinite(history).all():
            raise RunError("the student diverged on generated samples: its loss is not finite; lower learning rates")
        return history

    def _teach_generator(self, z: Tensor, y: Tensor, weights: Tensor) -> None:
        self.student.eval().requires_grad_(False)
        self.generator.train()
        for k in range(len(self.teachers)):
            x = self.generator(z, y)
            out = self.student(x).logits.float()
            batch = Generated(x, z, y, out, self.teachers.logits(k, x), weights[k])
            _step(self.tune, self.generator_loss(batch))


def _step(optimizer: Optimizer, loss: Tensor) -> Tensor:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()
