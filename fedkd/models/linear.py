"""Linear layers whose products on an AMD processor are oneDNN's, as those of convolutions are.

PyTorch leaves products of float32 matrices to MKL, which is slower than oneDNN on AMD's processors, and
faster on Intel's.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

AMD = "AuthenticAMD"

WORTH = 1 << 20
"""Multiplications below which a product is too short for the choice to matter."""


def _operator() -> Any:
    # Internal to PyTorch: its compiler emits calls of it. Where it is missing, layers stay what they are.
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return None
    return torch.ops.mkldnn._linear_pointwise.default


_ONEDNN = _operator()
_is_wrapped: Callable[[Tensor], bool] = torch._C._functorch.is_functorch_wrapped_tensor  # pyright: ignore[reportAttributeAccessIssue]


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``x @ weight.T + bias``."""
    return _ONEDNN(x, weight, bias, "none", [], "")


class _Affine(torch.autograd.Function):
    """`F.linear` of a matrix, and its gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        grad = grad.contiguous()
        return (
            _product(grad, weight.t()) if wanted[0] else None,
            _product(grad.t(), x.t()) if wanted[1] else None,
            grad.sum(0) if wanted[2] else None,
        )


class Linear(nn.Linear):
    """`torch.nn.Linear`, with oneDNN's products where that pays: large float32 matrices on a CPU.

    Not differentiable twice there.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return ``input @ weight.T + bias``."""
        if (
            input.ndim != 2
            or input.shape[0] * self.weight.numel() < WORTH
            or input.device.type != "cpu"
            or input.dtype != torch.float32
            or self.weight.dtype != torch.float32
            or torch.is_autocast_enabled("cpu")
            or _is_wrapped(self.weight)
            or _is_wrapped(input)
        ):
            return F.linear(input, self.weight, self.bias)
        return _Affine.apply(input.contiguous(), self.weight, self.bias)  # pyright: ignore[reportReturnType]


@cache
def processor_vendor() -> str:
    """Return who made this machine's processor, as the processor itself says (``AuthenticAMD``); empty if unknown."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return AMD if AMD in platform.processor() else ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "")


def quicken(model: nn.Module, vendor: str = "") -> nn.Module:
    """Make the linear layers of a model `Linear` where that pays, in place; their weights stay the same tensors.

    Parameters
    ----------
    model : nn.Module
        The model.
    vendor : str
        Who made the processor, as `processor_vendor` says; empty (default) = of this machine.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    >>> [type(layer).__module__ for layer in quicken(model, vendor="GenuineIntel")]
    ['torch.nn.modules.linear', 'torch.nn.modules.activation']
    >>> [type(layer).__module__ for layer in quicken(model, vendor="AuthenticAMD")]
    ['fedkd.models.linear', 'torch.nn.modules.activation']
    """
    if _ONEDNN is not None and (vendor or processor_vendor()) == AMD:
        for module in model.modules():
            if type(module) is nn.Linear:
                module.__class__ = Linear
    return model
