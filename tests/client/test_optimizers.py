"""Stacked optimisers against PyTorch's, one for each client."""

import numpy as np
import pytest
import torch

from fedkd.client.optimizers import clip, make_optimizer, stacked_optimizer
from fedkd.client.stacks import CannotVectorise, Places, Stack
from fedkd.scenario import Client

CPU = torch.device("cpu")
CLIENTS = 4
# Who takes part in each step: all, neighbours, and others; nobody at the same number of steps for long.
TURNS = [[0, 1, 2, 3], [1, 2], [0, 3], [0, 1, 3], [2], [0, 1, 2, 3]]


def draws(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return lambda: {
        "w": torch.randn(CLIENTS, 3, 2, generator=generator, dtype=torch.float64),
        "b": torch.randn(CLIENTS, generator=generator, dtype=torch.float64),
    }


class Model(torch.nn.Module):
    def __init__(self, state):
        super().__init__()
        for name, tensor in state.items():
            self.register_parameter(name, torch.nn.Parameter(tensor.clone()))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"weight_decay": 0.1},
        {"momentum": 0.9},
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
        {"optimizer": "adam"},
        {"optimizer": "adam", "weight_decay": 0.1},
    ],
    ids=str,
)
@pytest.mark.parametrize("same", [True, False], ids=["one-rate", "rates"])
def test_a_stacked_optimiser_is_one_of_pytorch_for_each_client(settings, same):
    client, draw = Client(lr=0.1, **settings), draws()
    state = draw()
    models = [Model({name: stack[n] for name, stack in state.items()}) for n in range(CLIENTS)]
    references = [make_optimizer(client, model) for model in models]
    stacked = stacked_optimizer(client, state)

    for step, clients in enumerate(TURNS):
        gradients, rates = draw(), [0.1 if same else 0.1 / (1 + n + step) for n in clients]
        places = Places(clients, CPU)
        weights = {name: places.take(stack) for name, stack in state.items()}
        numbers = stacked.begin(places, rates)
        stacked.step(weights, {name: places.take(stack) for name, stack in gradients.items()}, places, numbers)
        for name, entries in weights.items():
            places.put(state[name], entries)
        for n, rate in zip(clients, rates, strict=True):
            for name, parameter in models[n].named_parameters():
                parameter.grad = gradients[name][n].clone()
            references[n].param_groups[0]["lr"] = rate
            references[n].step()

    for n, model in enumerate(models):
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(state[name][n], parameter.detach(), rtol=1e-6, atol=1e-7)


def test_clipping_is_each_clients_own():
    gradients = draws()()
    gradients["w"][1] *= 0.01
    gradients["b"][1] *= 0.01
    clipped = clip(gradients, 0.5)
    for n in range(CLIENTS):
        parameters = [torch.zeros_like(stack[n]).requires_grad_() for stack in gradients.values()]
        for parameter, stack in zip(parameters, gradients.values(), strict=True):
            parameter.grad = stack[n].clone()
        torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        for parameter, stack in zip(parameters, clipped.values(), strict=True):
            torch.testing.assert_close(stack[n], parameter.grad, rtol=1e-6, atol=1e-9)
    assert torch.equal(clipped["w"][1], gradients["w"][1])  # it was short enough


def test_a_stack_keeps_once_what_is_the_same():
    shared, own = torch.rand(3), [torch.rand(2) for _ in range(3)]
    trees = [{"same": shared.clone(), "deep": {"own": each}, "name": "kl"} for each in own]
    stack = Stack(trees, "aux", CPU)
    assert stack.dims == {"same": None, "deep": {"own": 0}, "name": None} and not stack.shared
    taken = stack.take(Places([0, 2], CPU))
    assert torch.equal(taken["deep"]["own"], torch.stack([own[0], own[2]]))
    assert torch.equal(taken["same"], shared) and taken["name"] == "kl"
    assert Stack([{"same": shared}] * 3, "aux", CPU).shared
    assert not Stack([{"same": shared}] * 3, "aux", CPU, share=False).shared


def test_a_stack_that_will_be_changed_changes_nobody():
    tensor = torch.zeros(2)
    stack = Stack([{"w": tensor}, {"w": tensor}], "state", CPU, share=False)
    stack.tree["w"][0] += 1
    assert stack.tree["w"].tolist() == [[1, 1], [0, 0]] and tensor.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("trees", "reason"),
    [
        ([{"a": torch.ones(1)}, {"b": torch.ones(1)}], "structure"),
        ([{"a": torch.ones(1)}, {"a": torch.ones(2)}], "shapes"),
        ([{"a": torch.ones(1)}, {"a": 1.0}], "shapes"),
        ([{"a": 1.0}, {"a": 2.0}], "no tensors"),
        ([{"a": 1}, {"a": True}], "no tensors"),
        ([{"a": np.ones(2)}, {"a": np.zeros(2)}], "no tensors"),
    ],
)
def test_what_cannot_be_stacked_says_why(trees, reason):
    with pytest.raises(CannotVectorise, match=f"what is sent .*{reason}"):
        Stack(trees, "what is sent", CPU)
