import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call, vmap

from fedkd.client.stacks import CannotVectorise, Places, Stack, transposed_weights

CPU = torch.device("cpu")


def test_the_same_for_all_is_kept_once_unless_it_will_change():
    one = torch.arange(3.0)
    trees = [{"same": one, "own": torch.full((2,), float(client))} for client in range(4)]
    stack = Stack(trees, "x", CPU)
    assert stack.tree["same"].shape == (3,)
    assert stack.tree["own"].shape == (4, 2)
    assert stack.dims == {"same": None, "own": 0}
    assert not stack.shared
    apart = Stack(trees, "x", CPU, share=False).tree["same"]
    apart[1] += 1
    assert apart.tolist() == [[0, 1, 2], [1, 2, 3], [0, 1, 2], [0, 1, 2]]
    assert one.tolist() == [0, 1, 2]


def test_equal_numbers_in_different_memory_are_the_same_for_all():
    assert Stack([[torch.ones(2)], [torch.ones(2)]], "x", CPU).shared


@pytest.mark.parametrize(
    ("trees", "why"),
    [
        ([{"a": torch.ones(1)}, {"b": torch.ones(1)}], "differs in structure"),
        ([[torch.ones(1)], [torch.ones(2)]], "shapes differ"),
        ([[1.0], [2.0]], "no tensors and differ"),
        ([[np.ones(2)], [np.zeros(2)]], "no tensors and differ"),
    ],
)
def test_what_cannot_be_stacked_is_said(trees, why):
    with pytest.raises(CannotVectorise, match=f"the thing .*{why}"):
        Stack(trees, "the thing", CPU)


@pytest.mark.parametrize("clients", [[1, 2, 3], [0, 3]])
def test_entries_of_some_clients_come_and_go(clients):
    stack = torch.arange(8.0).view(4, 2)
    before = stack.clone()
    places = Places(clients, CPU)
    places.put(stack, places.take(stack).add_(10))
    changed = torch.zeros(4, 1)
    changed[clients] = 10
    assert torch.equal(stack, before + changed)


@pytest.mark.parametrize("alike", [True, False], ids=["same start", "own starts"])
def test_matrices_can_lie_column_by_column(alike):
    states = [{"weight": torch.randn(3, 5), "bias": torch.randn(3)} for _ in range(4)]
    states = states[:1] * 4 if alike else states
    tree = Stack(states, "x", CPU, share=False, turned={"weight"}).tree
    assert torch.equal(tree["weight"], torch.stack([state["weight"] for state in states]))
    assert tree["weight"].mT.is_contiguous()
    assert tree["bias"].is_contiguous()


@pytest.mark.parametrize("shape", [(6, 4), (6, 2, 4)], ids=["vectors", "sequences"])
def test_weights_of_linear_layers_lie_as_their_gradients_do(shape):
    module = nn.Sequential(nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, 5, bias=False))
    names = transposed_weights(module)
    assert names == {"0.weight", "2.weight"}
    states = [dict(module.state_dict()) for _ in range(3)]
    weights = Stack(states, "x", CPU, share=False, turned=names).tree
    for weight in weights.values():
        weight.requires_grad_()
    out = vmap(lambda state, x: functional_call(module, state, (x,)))(weights, torch.randn(3, *shape))
    gradients = torch.autograd.grad(out.square().sum(), list(weights.values()))
    assert [one.stride() for one in gradients] == [one.stride() for one in weights.values()]


def test_a_module_that_is_a_linear_layer():
    assert transposed_weights(nn.Linear(2, 2)) == {"weight"}
