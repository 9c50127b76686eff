"""Our optimisers against PyTorch's classes: the same bits."""

import subprocess
import sys
import textwrap

import pytest
import torch

from fedkd.client.optimizers import make_optimizer
from fedkd.optimizers import SGD, Adam
from fedkd.scenario import Client

RATE = 0.1


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def trained(make, again=None, device="cpu"):
    """Return a model's parameters after six steps; after three of them, `again` may change the optimiser."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.ReLU(), torch.nn.Linear(7, 3)).to(device)
    model[0].bias.requires_grad_(False)
    optimizer = make(model)
    for step in range(6):
        if again is not None and step == 3:
            optimizer = again(model, optimizer)
        for group in optimizer.param_groups:
            group["lr"] = RATE / (1 + step)
        layers = model if step != 3 else model[:1]  # one step in which some have no gradient
        layers(torch.randn(4, 5).to(device)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [parameter.detach() for parameter in model.parameters()]


def equal(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


SGDS = [
    {},
    {"weight_decay": 0.1},
    {"momentum": 0.9},
    {"momentum": 0.9, "weight_decay": 0.1},
    {"momentum": 0.9, "nesterov": True},
]
ADAMS = [{}, {"weight_decay": 0.1}]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("settings", SGDS, ids=str)
def test_sgd_has_the_bits_of_pytorchs(settings, device):
    theirs = trained(lambda m: torch.optim.SGD(m.parameters(), RATE, **settings), device=device)
    assert equal(trained(lambda m: SGD(m.parameters(), RATE, **settings), device=device), theirs)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("settings", [*ADAMS, {"amsgrad": True}], ids=str)
def test_adam_has_the_bits_of_pytorchs(settings, fused, device):
    how = {"fused": True} if fused else {}  # with False, PyTorch would not choose what is best on a GPU
    theirs = trained(lambda m: torch.optim.Adam(m.parameters(), RATE, **how, **settings), device=device)
    assert equal(trained(lambda m: Adam(m.parameters(), RATE, fused=fused, **settings), device=device), theirs)


@pytest.mark.parametrize(
    "settings", [{"optimizer": "sgd"} | s for s in SGDS] + [{"optimizer": "adam"} | s for s in ADAMS]
)
def test_a_clients_optimiser_is_the_one_that_the_scenario_asks_for(settings):
    options = {key: value for key, value in settings.items() if key != "optimizer"}
    theirs = torch.optim.Adam if settings["optimizer"] == "adam" else torch.optim.SGD
    fused = settings["optimizer"] == "adam" or "momentum" in settings
    expected = trained(lambda m: theirs(m.parameters(), RATE, fused=fused or None, **options))
    assert equal(trained(lambda m: make_optimizer(Client(lr=RATE, **settings), m)), expected)


@pytest.mark.parametrize(
    "make",
    [
        lambda m: SGD(m.parameters(), RATE, momentum=0.9),
        lambda m: Adam(m.parameters(), RATE, fused=True),
        lambda m: Adam(m.parameters(), RATE, amsgrad=True),
    ],
    ids=["sgd", "adam", "amsgrad"],
)
def test_what_is_remembered_is_all_that_a_fresh_one_needs_to_go_on(make):
    def again(model, optimizer):
        fresh = make(model)
        fresh.state |= optimizer.state
        return fresh

    assert equal(trained(make, again), trained(make))
    assert not equal(trained(make, lambda model, optimizer: make(model)), trained(make))


def test_a_model_that_was_elsewhere_goes_on_learning():
    def moved(model, optimizer):
        model.double().float()  # its parameters have other memory now, as after a visit to a GPU
        return optimizer

    def make(model):
        return SGD(model.parameters(), RATE)

    assert equal(trained(make, moved), trained(make))


def test_nothing_imports_pytorchs_compiler():
    script = """
        import sys, torch
        from fedkd.optimizers import SGD, Adam

        for kind, options in ((SGD, {"momentum": 0.9}), (Adam, {}), (Adam, {"fused": True})):
            model = torch.nn.Linear(2, 2)
            optimizer = kind(model.parameters(), 0.1, **options)
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
        assert "torch._dynamo" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True)
