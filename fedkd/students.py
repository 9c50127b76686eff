"""Students as a scenario wants them: built from one seed, and the part of their state that travels."""

from __future__ import annotations

import ctypes
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from fedkd import models
from fedkd.payloads import State
from fedkd.seeds import Purpose, torch_seed

if TYPE_CHECKING:
    from fedkd.data.batches import ArrayData
    from fedkd.data.sources import Dataset
    from fedkd.scenario import Scenario


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
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in state.items()}


def reestimate_norms(
    model: nn.Module,
    data: ArrayData,
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
    data : ArrayData
        Where the samples are.
    ids : Tensor
        Which samples, shape [n]; a last batch of one is left out.
    device, batch_size, channels_last
        As in `predict`.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [module.momentum for module in norms]
    model.eval()
    for module in norms:
        module.train()
        module.reset_running_stats()
        module.momentum = None  # the cumulative mean, every batch weighing the same
    with torch.no_grad():
        for rows in ids.split(batch_size) if norms else ():
            if len(rows) > 1:
                model(data.gather(rows, device=device, channels_last=channels_last).x)
    for module, momentum in zip(norms, momenta, strict=True):
        module.momentum = momentum
        module.eval()


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

    Halves the time of an evaluation of the cnn on a CPU. Ray workers get the same by their environment. Nothing
    happens where the C library is another one.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
    mallopt(mmap_threshold, 1 << 30)
    mallopt(trim_threshold, 1 << 30)


def predict(
    model: nn.Module,
    data: ArrayData,
    ids: Tensor | np.ndarray | Sequence[int],
    *,
    state: Mapping[str, Tensor] | None = None,
    device: str | torch.device = "cpu",
    batch_size: int = 512,
    channels_last: bool = False,
) -> Tensor:
    """Return a model's logits in evaluation mode; the model comes back with its weights, modes and device.

    Parameters
    ----------
    model : nn.Module
        ``forward(x)`` returns `fedkd.models.Outputs`.
    data : ArrayData
        Where the samples are.
    ids : Tensor
        Which samples, shape [n].
    state : mapping of str to Tensor, optional
        Weights to use instead of the model's own.
    device, batch_size, channels_last
        Where it runs, samples in a forward pass, memory layout of image batches.

    Returns
    -------
    Tensor
        float32 on the CPU, shape [n, C].
    """
    chunks: list[Tensor] = []
    with borrowed(model, device), torch.inference_mode():
        model.eval()
        moved = None if state is None else {name: tensor.to(device) for name, tensor in state.items()}
        for rows in torch.as_tensor(ids).cpu().long().split(batch_size):
            x = data.gather(rows, device=device, channels_last=channels_last).x
            out = model(x) if moved is None else torch.func.functional_call(model, moved, (x,))
            chunks.append(out.logits.float())
        logits = torch.cat(chunks).cpu()
    return logits.clone()  # outside of inference mode: autograd refuses inference tensors


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
