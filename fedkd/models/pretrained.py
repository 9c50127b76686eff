"""Weights that students start from, out of a safetensors file."""

import os

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fedkd.errors import ScenarioError
from fedkd.models.foreign import Foreign

KEY = "models.pretrained"


def load_pretrained(model: nn.Module, file: str, *, fresh_head: bool = False) -> None:
    """Load a model's state in place.

    Parameters
    ----------
    model : nn.Module
        Must have the file's entries and shapes, all of them; values are cast to the model's types. A
        torchvision model also takes files with torchvision's own names.
    file : str
        Safetensors file, such as a run's final model. Pickled files (.pt, .pth) are never read.
    fresh_head : bool
        Whether the head stays as it is, because the file was made for other classes.

    Raises
    ------
    ScenarioError
        If the file is missing or of another format, or entries or shapes differ.
    """
    state = _read(file)
    wanted = model.state_dict()
    if isinstance(model, Foreign) and not state.keys() & wanted.keys():
        state = {model.own_name(name): tensor for name, tensor in state.items()}
    if fresh_head:
        state = {name: tensor for name, tensor in state.items() if not name.startswith("head.")}
        wanted = {name: tensor for name, tensor in wanted.items() if not name.startswith("head.")}

    problems = [f"{name} is missing" for name in wanted if name not in state]
    problems += [f"{name} is not in the model" for name in state if name not in wanted]
    problems += [
        f"{name} is {tuple(state[name].shape)}, not {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in state and state[name].shape != tensor.shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        only_head = all(problem.startswith("head.") for problem in problems)
        hint = (
            "for other classes, keep a random head with models.options: fresh_head = true"
            if only_head
            else "the file must be of the same model with the same options, norm and input"
        )
        raise ScenarioError(f"{file} does not fit: {'; '.join(problems[:3])}{more}", key=KEY, hint=hint)
    bad = [name for name, tensor in state.items() if not tensor.isfinite().all()]
    if bad:
        raise ScenarioError(f"{file} holds values that are not finite: {bad[0]}", key=KEY)
    with torch.no_grad():
        for name, tensor in wanted.items():  # tensors of a state dict share the model's memory
            tensor.copy_(state[name])


def _read(file: str) -> dict[str, Tensor]:
    file = os.path.expanduser(file)
    if not os.path.isfile(file):
        raise ScenarioError(f"there is no file {file!r}", key=KEY, hint="give the path of a safetensors file")
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ScenarioError(
            f"{file} is not a safetensors file: {error}",
            key=KEY,
            hint="pickled weights are never read; convert them with safetensors.torch.save_file",
        ) from None
