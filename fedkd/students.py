"""Students as a scenario wants them: built from one seed, and the part of their state that travels."""

from __future__ import annotations

import ctypes
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from fedkd import models
from fedkd.errors import RunError
from fedkd.payloads import State
from fedkd.seeds import Purpose, torch_seed

if TYPE_CHECKING:
    from fedkd.data.batches import ArrayData, Samples
    from fedkd.data.sources import Dataset
    from fedkd.scenario import Scenario


SHARD = 1024
"""Samples into which computations without gradients are divided: whole batches of every `forward_batch`, so that it
does not change a bit who computes which shard."""


def build_student(scenario: Scenario, dataset: Dataset, arch: str) -> nn.Module:
    """Build the model that every client of an architecture starts from.

    Parameters
    ----------
    scenario : Scenario
        Its ``models`` section and the run's seed.
    dataset : Dataset
        Tells the shape of inputs and the number of classes.
    arch : str
        Name of the model.

    Returns
    -------
    nn.Module
        ``forward(x)`` returns `fedkd.models.Outputs`; equal bits for equal seed and name in every process.
    """
    name_id = zlib.crc32(arch.encode())
    return models.build(
        arch,
        num_classes=dataset.num_classes,
        input_shape=dataset.input_shape,
        kind=dataset.kind,
        vocab_size=dataset.vocab_size,
        norm=scenario.models.norm,
        seed=torch_seed(scenario.run.seed, Purpose.MODEL_INIT, partition=name_id),
        pretrained=scenario.models.pretrained,
        **scenario.models.options,
    )


def travelling(model: nn.Module, buffers: str) -> State:
    """Return the entries of a model's state that travel; they share the model's memory.

    Parameters
    ----------
    model : nn.Module
        The model.
    buffers : str
        ``all``, or ``params_only`` to leave running statistics at home.
    """
    if buffers == "all":
        return dict(model.state_dict())
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def snapshot(state: Mapping[str, Tensor]) -> State:
    """Return copies on the CPU, in the default memory layout."""
    return {name: torch.empty(t.shape, dtype=t.dtype).copy_(t.detach()) for name, t in state.items()}


def reestimate_norms(
    model: nn.Module,
    data: Samples,
    ids: Tensor,
    *,
    device: str | torch.device = "cpu",
    batch_size: int = 128,
    channels_last: bool = False,
) -> None:
    """Compute BatchNorm's running statistics afresh: their mean over batches of the samples, in order.

    Parameters
    ----------
    model : nn.Module
        The model, on `device`; left in evaluation mode. Without BatchNorm layers nothing happens.
    data : Samples
        Where the samples are.
    ids : Tensor
        Which samples, shape [n]; a last batch of one is left out.
    device, channels_last
        As in `predict`.
    batch_size : int
        Samples in a batch.

    Raises
    ------
    RunError
        There are BatchNorm layers, and no batch has two samples.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [module.momentum for module in norms]
    batches = [rows for rows in ids.split(batch_size) if len(rows) > 1] if norms else []
    if norms and not batches:
        raise RunError("running statistics of BatchNorm need at least two samples in a batch")
    model.eval()
    try:
        for module in norms:
            module.train()
            module.reset_running_stats()
            module.momentum = None  # the cumulative mean, every batch weighing the same
        with torch.no_grad():
            for rows in batches:
                model(data.gather(rows, device=device, channels_last=channels_last).x)
    finally:
        for module, momentum in zip(norms, momenta, strict=True):
            module.momentum = momentum
            module.eval()


def complete(
    model: nn.Module,
    state: Mapping[str, Tensor],
    data: ArrayData | None,
    *,
    device: str | torch.device = "cpu",
    channels_last: bool = False,
) -> State:
    """Return a whole state for one that travelled without BatchNorm's running statistics.

    They are estimated on data, so that they depend on the weights alone and not on what was computed before.

    Parameters
    ----------
    model : nn.Module
        Module of the architecture, on `device`; its own state is overwritten.
    state : mapping of str to Tensor
        All parameters.
    data : ArrayData or None
        Samples for the statistics.
    device, channels_last
        As in `predict`.

    Raises
    ------
    RunError
        There are statistics to estimate, and no data; or a parameter is missing.
    """
    missing = {name for name, _ in model.named_parameters()}.intersection(
        model.load_state_dict(dict(state), strict=False).missing_keys
    )
    if missing:  # it would be that of whichever model was here before
        raise RunError(f"the weights lack {', '.join(sorted(missing)[:3])}")
    if has_batch_norm(model):
        if data is None:
            raise RunError("running statistics of BatchNorm stay with the clients, and no proxy set can replace them")
        reestimate_norms(model, data, torch.arange(len(data)), device=device, channels_last=channels_last)
    return snapshot(model.state_dict())


def has_batch_norm(model: nn.Module) -> bool:
    """Whether a model has BatchNorm layers, which cannot be trained on a batch of one."""
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())


def pick_device(setting: str) -> torch.device:
    """Return the device for a setting: ``auto`` takes a GPU if this process sees one.

    On a GPU, cuDNN is held to deterministic algorithms.
    """
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if setting == "auto" else setting)
    if device.type == "cuda":
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    return device


def keep_freed_memory() -> None:
    """Let glibc keep freed memory instead of giving it back: activations of small models are taken again at once.

    Ray workers get much the same by their environment. Nothing happens where the C library is another one.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
    # Activations of a ResNet-8 and 512 images are kept; larger blocks, of weights say, would leave holes in the heap,
    # which grows where the next one does not fit into them. Older versions of glibc take no more than 32 MiB.
    if mallopt(mmap_threshold, 40 << 20) or mallopt(mmap_threshold, 32 << 20):
        mallopt(trim_threshold, 1 << 30)


def autocast(precision: str, device: str | torch.device) -> AbstractContextManager:
    """Return the arithmetic of forward passes: ``fp32`` as it is, ``bf16`` by PyTorch's autocast.

    On a CPU bf16 pays where it has instructions for it (``avx512_bf16``, ``amx_bf16``).
    """
    return torch.autocast(torch.device(device).type, dtype=torch.bfloat16) if precision == "bf16" else nullcontext()


def forward_batch(device: str | torch.device) -> int:
    """Return how many samples to take in a forward pass without gradients.

    128 on a CPU, whose caches then hold the activations of small models; a whole shard on a GPU.
    """
    return 128 if torch.device(device).type == "cpu" else SHARD


def predict(
    model: nn.Module,
    data: ArrayData,
    ids: Tensor | np.ndarray | Sequence[int],
    *,
    state: Mapping[str, Tensor] | None = None,
    device: str | torch.device = "cpu",
    batch_size: int = 0,
    channels_last: bool = False,
    precision: str = "fp32",
) -> Tensor:
    """Return a model's logits in evaluation mode; the model comes back with its weights, modes and device.

    Parameters
    ----------
    model : nn.Module
        ``forward(x)`` returns `fedkd.models.Outputs`.
    data : ArrayData
        Where the samples are.
    ids : Tensor
        Which samples, at least one, shape [n].
    state : mapping of str to Tensor, optional
        Weights to use instead of the model's own.
    device, channels_last
        Where it runs, memory layout of image batches.
    batch_size : int
        Samples in a forward pass; 0 = as of `forward_batch`.
    precision : str
        See `autocast`.

    Returns
    -------
    Tensor
        float32 on the CPU, shape [n, C].
    """
    [logits] = collect(
        model,
        data,
        ids,
        lambda out: (out.logits,),
        state=state,
        device=device,
        batch_size=batch_size,
        channels_last=channels_last,
        precision=precision,
    )
    return logits


def collect(
    model: nn.Module,
    data: ArrayData,
    ids: Tensor | np.ndarray | Sequence[int],
    pick: Callable[[models.Outputs], tuple[Tensor, ...]],
    *,
    state: Mapping[str, Tensor] | None = None,
    device: str | torch.device = "cpu",
    batch_size: int = 0,
    channels_last: bool = False,
    precision: str = "fp32",
) -> tuple[Tensor, ...]:
    """Return what `pick` takes of a model's outputs, each float32 on the CPU, shape [n, ...]; else as `predict`."""
    chunks: list[tuple[Tensor, ...]] = []
    with borrowed(model, device), torch.inference_mode(), autocast(precision, device):
        model.eval()
        moved = None if state is None else {name: tensor.to(device) for name, tensor in state.items()}
        for rows in torch.as_tensor(ids).cpu().long().split(batch_size or forward_batch(device)):
            x = data.gather(rows, device=device, channels_last=channels_last).x
            out = model(x) if moved is None else torch.func.functional_call(model, moved, (x,))
            chunks.append(tuple(values.float() for values in pick(out)))
        joined = [torch.cat(parts).cpu() for parts in zip(*chunks)]
    return tuple(values.clone() for values in joined)  # outside of inference mode: autograd refuses inference tensors


@contextmanager
def borrowed(model: nn.Module, device: str | torch.device) -> Iterator[None]:
    """Move a model to a device; afterwards every module has its mode again, and the model is back where it was."""
    home = next((t.device for t in chain(model.parameters(), model.buffers())), torch.device("cpu"))
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.to(device)
        yield
    finally:
        for module, training in modes:
            module.training = training
        model.to(home)
