"""Trains a student towards targets for the samples of a proxy set."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from fedkd.data.batches import Batch, Samples, epoch_order, step_order
from fedkd.data.proxy import ProxySet
from fedkd.errors import KnowledgeError, RunError, ScenarioError
from fedkd.losses.response import kd
from fedkd.optimizers import SGD, Adam, Optimizer
from fedkd.server.averaging import StateMean
from fedkd.server.descent import Descent, Loss
from fedkd.server.targets import Targets
from fedkd.students import borrowed, reestimate_norms
from fedkd.wording import did_you_mean

BatchNorm = nn.modules.batchnorm._BatchNorm


@dataclass(frozen=True)
class DistillReport:
    """What happened in a distillation.

    Parameters
    ----------
    steps : int
        Optimiser steps taken.
    loss_first, loss_last : float
        Loss of the first and the last step's batch, each before its step.
    best_score : float or None
        Best validation score; None without validation.
    best_step : int
        Steps after which the best score was measured; 0 without validation.
    stopped_early : bool
        Whether patience ran out.
    """

    steps: int
    loss_first: float
    loss_last: float
    best_score: float | None
    best_step: int
    stopped_early: bool


@dataclass(kw_only=True)
class Distiller:
    """How a student is distilled on the server. The defaults are FedDF's (Lin et al., NeurIPS 2020).

    Parameters
    ----------
    reduction : str
        ``batchmean`` or ``mean_all``, a factor of the number of classes; no default, as papers differ in it
        silently.
    t_squared : bool
        Whether the loss is multiplied by T²; no default for the same reason.
    temperature : float
        Temperature T of the student, and of targets that are logits.
    kind : str
        ``kl``, ``soft_ce``, ``mse`` or ``mae``; see `fedkd.losses.response.kd`.
    optimizer : str
        ``adam`` or ``sgd``, fresh in every `fit` unless its state is carried from one to the next.
    lr : float
        Learning rate from which the schedule starts.
    momentum : float
        Momentum of SGD, in [0, 1).
    weight_decay : float
        L2 weight decay.
    amsgrad : bool
        Adam's variant that keeps the largest second moment (Reddi et al. 2018).
    schedule : str
        ``constant``; ``cosine`` from `lr` towards 0 over all steps; ``cyclic`` in straight lines from `lr` to `lr_low`,
        which is reached at the last step of every `cycle` (Izmailov et al. 2018). A cycle ends at `swa_start`, so that
        `swa` takes its snapshots at ends of cycles where `swa_every` is a multiple of `cycle`.
    lr_low : float
        Learning rate of a cycle's last step.
    cycle : int
        Steps in a cycle.
    steps : int
        Optimiser steps; 0 = use `epochs`.
    epochs : int
        Passes over the samples that have targets.
    batch_size : int
        Samples in a step.
    clip : float
        Largest norm of the gradient; 0 = off.
    check_every : int
        Steps between validations (and between checks that the loss is finite).
    patience : int
        Stop after so many steps without a better validation score; 0 = never.
    returns : str
        ``last``; ``best`` on validation, which is the last one where there is no validation; ``swa``, the
        mean of snapshots of the weights (Izmailov et al. 2018), which is the last one if there were no
        snapshots.
    compare_start : bool
        With ``best``: whether the student as it came is returned if no score on the way was as high as its own.
    swa_start, swa_every : int
        Steps after which the first snapshot is taken, and steps between snapshots.
    norm_buffers : str
        Running statistics of BatchNorm: ``train`` lets them move to the proxy set, as FedDF does; ``frozen``
        uses and keeps the student's; ``reestimate`` trains likewise and then computes those of the returned
        weights afresh on the proxy set, as FedBE does.
    device : str or torch.device
        Where the student is trained; it returns to where it was.
    channels_last : bool
        Memory layout of image batches and convolutions.
    graphs : bool
        Whether a GPU may replay the steps from a graph, see `fedkd.graphs`.
    precision : str
        ``fp32``, or ``bf16`` for the student's forward and backward pass; weights, loss and optimiser stay float32.

    Raises
    ------
    ScenarioError
        A setting is unknown or out of range.
    """

    reduction: Literal["batchmean", "mean_all"]
    t_squared: bool
    temperature: float = 1.0
    kind: Literal["kl", "soft_ce", "mse", "mae"] = "kl"
    optimizer: Literal["adam", "sgd"] = "adam"
    lr: float = 1e-3
    momentum: float = 0.0
    weight_decay: float = 0.0
    amsgrad: bool = False
    schedule: Literal["constant", "cosine", "cyclic"] = "cosine"
    lr_low: float = 0.0
    cycle: int = 25
    steps: int = 10_000
    epochs: int = 1
    batch_size: int = 128
    clip: float = 5.0
    check_every: int = 100
    patience: int = 1_000
    returns: Literal["last", "best", "swa"] = "best"
    compare_start: bool = False
    swa_start: int = 500
    swa_every: int = 25
    norm_buffers: Literal["train", "frozen", "reestimate"] = "train"
    device: str | torch.device = "cpu"
    channels_last: bool = False
    precision: Literal["fp32", "bf16"] = "fp32"
    graphs: bool = False

    def __post_init__(self) -> None:
        choices = {
            "reduction": ("batchmean", "mean_all"),
            "kind": ("kl", "soft_ce", "mse", "mae"),
            "optimizer": ("adam", "sgd"),
            "schedule": ("constant", "cosine", "cyclic"),
            "returns": ("last", "best", "swa"),
            "norm_buffers": ("train", "frozen", "reestimate"),
            "precision": ("fp32", "bf16"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ScenarioError(
                    f"distiller: {name} {getattr(self, name)!r} is unknown",
                    hint=did_you_mean(str(getattr(self, name)), allowed),
                )
        # not (x > 0) is true for NaN too
        for name in ("temperature", "lr"):
            if not 0 < getattr(self, name) < math.inf:
                raise ScenarioError(f"distiller: {name} must be > 0, is {getattr(self, name)}")
        for name in ("lr_low", "weight_decay", "clip", "steps", "epochs", "patience", "swa_start"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ScenarioError(f"distiller: {name} must be >= 0, is {getattr(self, name)}")
        for name in ("batch_size", "check_every", "swa_every", "cycle"):
            if not getattr(self, name) >= 1:
                raise ScenarioError(f"distiller: {name} must be at least 1, is {getattr(self, name)}")
        if not 0 <= self.momentum < 1:
            raise ScenarioError(f"distiller: momentum must be at least 0 and below 1, is {self.momentum}")
        if not self.steps and not self.epochs:
            raise ScenarioError("distiller: steps and epochs are both 0", hint="set one of them")

    def fit(
        self,
        model: nn.Module,
        data: Samples | ProxySet,
        targets: Targets,
        *,
        generator: np.random.Generator,
        validate: Callable[[nn.Module], float] | None = None,
        on_step: Callable[[int, Tensor], None] | None = None,
        loss: Loss | None = None,
        order: Sequence[np.ndarray] | None = None,
        carried: dict[str, dict[str, Tensor]] | None = None,
    ) -> DistillReport:
        """Train `model` in place.

        Parameters
        ----------
        model : nn.Module
            The student; ``forward(x)`` returns `fedkd.models.Outputs`. Every module has its mode (train or
            eval) again afterwards.
        data : Samples or ProxySet
            The samples. Only those with targets are drawn.
        targets : Targets
            Targets by sample id.
        generator : np.random.Generator
            Order of the samples, and seed of dropout.
        validate : callable, optional
            Score of the model, larger is better; the model is in evaluation mode. A score of NaN is never
            better.
        on_step : callable, optional
            Called after each step with the number of steps and the loss, a scalar on the device: reading its
            value waits for the device.
        loss : callable, optional
            ``loss(logits [B, C], target [B, C], batch)``, a scalar, instead of the distance that the settings
            describe; the batch tells labels and sample ids.
        order : sequence of np.ndarray, optional
            Rows of the targets for every step, instead of `steps` or `epochs` of random batches.
        carried : dict, optional
            State of the optimiser by parameter: where it has any, the optimiser goes on from it; afterwards it holds
            the new one, on the CPU. Empty for a fresh start.

        Returns
        -------
        DistillReport
            Steps, losses and scores.

        Raises
        ------
        KnowledgeError
            There are no targets.
        RunError
            The loss, the samples or the weights are not finite.
        ScenarioError
            Batches of one sample for a model with BatchNorm.
        """
        array = data.data if isinstance(data, ProxySet) else data
        if not len(targets):
            raise KnowledgeError("nothing to distil: no sample has a target")
        # Dropout draws from torch's global generator, which is therefore seeded here and restored afterwards.
        seed = int(generator.integers(2**63))
        batches = list(order) if order is not None else self._batches(model, len(targets), generator)
        device = torch.device(self.device)
        with (
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
            borrowed(model, device),
        ):
            torch.default_generator.manual_seed(seed)
            if device.type == "cuda":
                torch.cuda.manual_seed_all(seed)
            if self.channels_last:
                model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
            if not _finite_weights(model):
                raise RunError("the student has weights that are not finite before its distillation starts")
            return self._train(model, array, targets, batches, validate, on_step, loss, carried)

    def _batches(self, model: nn.Module, samples: int, generator: np.random.Generator) -> list[np.ndarray]:
        """Rows of the targets for every step."""
        learns_statistics = self.norm_buffers != "frozen" and any(isinstance(m, BatchNorm) for m in model.modules())
        if learns_statistics and min(samples, self.batch_size) < 2:
            raise ScenarioError(
                f"distiller: BatchNorm needs batches of at least 2 samples; batch_size is {self.batch_size}, "
                f"{samples} sample(s) have targets",
                hint="enlarge the batch or the proxy set, or set models.norm = 'group'",
            )
        rows = np.arange(samples)
        if self.steps:
            return step_order(rows, self.batch_size, self.steps, generator, drop_single=learns_statistics)
        return [
            batch
            for _ in range(self.epochs)
            for batch in epoch_order(rows, self.batch_size, generator, drop_single=learns_statistics)
        ]

    def _train(
        self,
        model: nn.Module,
        data: Samples,
        targets: Targets,
        batches: list[np.ndarray],
        validate: Callable[[nn.Module], float] | None,
        on_step: Callable[[int, Tensor], None] | None,
        loss: Loss | None,
        carried: dict[str, dict[str, Tensor]] | None,
    ) -> DistillReport:
        values = targets.values.to(self.device)
        ids = targets.ids.cpu()
        optimizer = self._optimizer(model)
        if carried:
            _resume(optimizer, model, carried)
        descent = Descent(
            model,
            optimizer,
            loss or self._distance(targets.space),
            sizes=[len(rows) for rows in batches],
            rates=[self._rate(step, len(batches)) for step in range(len(batches))],
            clip=self.clip,
            precision=self.precision,
            device=self.device,
            graphs=self.graphs and loss is None,  # somebody else's loss may keep something of every step
        )
        first = descent.last
        best_score, best_step, best_state = None, 0, None
        snapshots = StateMean("the student")
        step, stopped = 0, False
        start = None
        if self.compare_start and self.returns == "best" and validate is not None:
            start = self._score(model, validate), _copy(model)
        self._training_mode(model)
        for rows in batches:
            at = torch.from_numpy(rows)
            batch = data.gather(ids[at], device=self.device, channels_last=self.channels_last)
            descent.step(batch, values[at.to(values.device)])
            step += 1
            if step == 1:
                first = descent.last.clone()
            if on_step is not None:
                on_step(step, descent.last.clone())
            if self.returns == "swa" and step >= self.swa_start and (step - self.swa_start) % self.swa_every == 0:
                snapshots.add(model.state_dict())
            if step % self.check_every and step < len(batches):
                continue
            # Not finite once, the sum stays so: one look at the device for many steps.
            if not math.isfinite(float(descent.total)) or not _finite_weights(model):
                raise self._diverged(data, ids, step)
            if validate is None:
                continue
            score = self._score(model, validate)
            if best_score is None or score > best_score:
                best_score, best_step = score, step
                if self.returns == "best":
                    best_state = _copy(model)
            elif self.patience and step - best_step >= self.patience:
                stopped = True
                break
        if start is not None and (best_score is None or start[0] > best_score):
            (best_score, best_state), best_step = start, 0
        if best_state is not None:
            model.load_state_dict(best_state)
        elif snapshots.count:
            model.load_state_dict(snapshots.result())
        if self.norm_buffers == "reestimate":
            reestimate_norms(
                model,
                data,
                ids,
                device=self.device,
                batch_size=self.batch_size,
                channels_last=self.channels_last,
            )
        if carried is not None:
            carried.clear()
            carried.update(_memory(optimizer, model))
        return DistillReport(step, float(first), float(descent.last), best_score, best_step, stopped)

    def _distance(self, space: str) -> Loss:
        """Return the loss that the settings describe, for targets in a space."""

        def distance(logits: Tensor, target: Tensor, batch: Batch) -> Tensor:
            return kd(
                logits,
                target,
                temperature=self.temperature,
                reduction=self.reduction,
                t_squared=self.t_squared,
                target_space="logits" if space == "logits" else "probs",
                kind=self.kind,
            )

        return distance

    def _optimizer(self, model: nn.Module) -> Optimizer:
        if self.optimizer == "adam":
            # Fused: small models feel a dozen calls for each tensor.
            return Adam(model.parameters(), self.lr, weight_decay=self.weight_decay, amsgrad=self.amsgrad, fused=True)
        return SGD(model.parameters(), self.lr, momentum=self.momentum, weight_decay=self.weight_decay)

    def _rate(self, step: int, steps: int) -> float:
        if self.schedule == "cosine":
            return self.lr * 0.5 * (1 + math.cos(math.pi * step / steps))
        if self.schedule == "cyclic":
            return self.lr + (self.lr_low - self.lr) * ((step - self.swa_start) % self.cycle + 1) / self.cycle
        return self.lr

    def _training_mode(self, model: nn.Module) -> None:
        model.train()
        if self.norm_buffers == "frozen":
            for module in model.modules():
                if isinstance(module, BatchNorm):
                    module.eval()

    def _score(self, model: nn.Module, validate: Callable[[nn.Module], float]) -> float:
        model.eval()
        with torch.no_grad():
            score = float(validate(model))
        self._training_mode(model)
        return -math.inf if math.isnan(score) else score

    def _diverged(self, data: Samples, ids: Tensor, step: int) -> RunError:
        """Say why the loss is not finite; targets and first weights have been checked before."""
        for rows in ids.split(1):  # not all need have one shape
            finite = torch.isfinite(data.gather(rows).x.flatten(1).float()).all(1)
            if not bool(finite.all()):
                return RunError(
                    f"distillation failed: proxy sample {int(rows[~finite][0])} holds NaN or infinite numbers"
                )
        clipped = "" if self.clip else ", or clip gradients (clip is off)"
        return RunError(
            f"distillation diverged within {step} steps: the loss or the student's weights are not finite, "
            f"though samples and targets are; lower the learning rate ({self.lr:g}){clipped}"
        )


def _finite_weights(model: nn.Module) -> bool:
    sums = [parameter.detach().sum() for parameter in model.parameters()]
    return not sums or bool(torch.isfinite(torch.stack(sums)).all())


def _memory(optimizer: Optimizer, model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Return the optimiser's state by the names of the parameters, on the CPU."""
    return {
        name: {key: value.detach().to("cpu", copy=True) for key, value in optimizer.state.get(parameter, {}).items()}
        for name, parameter in model.named_parameters()
    }


def _resume(optimizer: Optimizer, model: nn.Module, memory: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Let a fresh optimiser go on from what `_memory` returned."""
    for name, parameter in model.named_parameters():
        # All but Adam's count of steps gets the parameter's memory layout.
        optimizer.state[parameter] = {
            key: torch.empty_like(parameter).copy_(value)
            if value.shape == parameter.shape
            else value.to(parameter.device, copy=True)
            for key, value in memory.get(name, {}).items()
        }


def _copy(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
