"""Work that is replayed from a tape: the numbers of work that is done, and no tape where there is no telling."""

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedkd import tapes
from fedkd.tapes import REPLAYS, Tapes, record


def draw(*shapes, seed=0):
    """Return random tensors."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def same(work, *shapes, places=3, tolerance=0.0):
    """Check that work on tensors leaves in all of them what its replay leaves; returns the tape."""
    recorded, done = draw(*shapes), draw(*shapes)
    tape = record(lambda: work(*recorded), recorded)
    work(*done)
    for one, other in zip(recorded, done):  # recording is doing
        assert torch.equal(one, other)
    assert tape is not None
    for seed in range(1, places + 1):
        replayed, done = draw(*shapes, seed=seed), draw(*shapes, seed=seed)
        tape.replay(replayed)
        work(*done)
        for one, other in zip(replayed, done):
            torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
    return tape


# --- replays --------------------------------------------------------------------------------------------------------


def in_place(total, x):
    total.add_(x)
    total.mul_(0.5)
    x.zero_()


def views(total, x):
    total.view(-1)[2:5].add_(x.t().reshape(-1)[:3])
    total[0].copy_(x.expand(2, *x.shape)[1, 0])


def lists_and_several_results(total, x):
    first, second = torch.stack([x, total]).unbind(0)
    values, places = torch.cat([first, second], 1).max(1, keepdim=True)
    total.copy_(values * 2 + places).sub_(x.split(1)[1])


def constants(total, x):
    ones = torch.ones_like(x)  # changed afterwards, so it must be made anew
    ones[0] = 3.0
    total.add_(ones * torch.arange(3.0) + torch.zeros(3)).add_(torch.full_like(x, 2.0) * torch.tensor(0.5))


def times_one(total, x):
    copy, other = x * 1, total * 1
    x.add_(1)  # the copy stays as it was
    total.add_(copy).mul_(other)


def places_by_number(total, x):
    total[torch.tensor([1, 0])] = x[torch.tensor([0, 0])]
    total.scatter_add_(1, torch.zeros(2, 1, dtype=torch.long), x[:, 1:2])


def complex_numbers(total, x):
    z = torch.view_as_complex(x[:, :2].contiguous())
    total[:, 0].add_((z.conj() * z).real).add_((z.conj() * 2j).imag).add_(z.conj().imag)


def made_dense(total, x):
    total.view(-1).add_((x[:1].expand(2, 3) * 1).view(-1))


def copies_of_what_changes(total, x):
    copy = x * 1
    row = copy[0] * 1
    x.add_(1)
    total.add_(row)


def nothing_of_use(total, x):
    (x @ x.T).exp()
    total.add_(x)


@pytest.mark.parametrize(
    "work",
    [
        in_place,
        views,
        lists_and_several_results,
        constants,
        times_one,
        places_by_number,
        nothing_of_use,
        complex_numbers,
        made_dense,
        copies_of_what_changes,
    ],
)
def test_replays_have_the_bits_of_the_work(work):
    same(work, (2, 3), (2, 3))


def test_what_computes_nothing_is_left_out():
    assert len(same(nothing_of_use, (2, 3), (2, 3))) == 1
    assert len(same(lambda total, x: total.add_(x.view(2, 3).detach().expand(2, 3) * 1), (2, 3), (2, 3))) == 1
    assert len(same(lambda total, x: total.add_(torch.ones_like(x).exp() + torch.arange(3.0)), (2, 3), (2, 3))) == 1


def test_a_training_step_has_no_autograd_left():
    def step(weight, bias, x):
        parameters = [weight.detach().requires_grad_(), bias.detach().requires_grad_()]
        loss = F.cross_entropy(F.linear(x, *parameters).relu(), torch.tensor([0, 1]))
        for parameter, gradient in zip((weight, bias), torch.autograd.grad(loss, parameters)):
            parameter.sub_(gradient, alpha=0.1)

    same(step, (4, 3), (4,), (2, 3))


@pytest.mark.parametrize(
    "model",
    [
        nn.Conv2d(2, 3, 3),
        nn.GroupNorm(1, 2),
        nn.MaxPool2d(2),
        nn.AvgPool2d(2),
        nn.LayerNorm(4),
        nn.GELU(),
        nn.Softmax(1),
    ],
    ids=lambda model: type(model).__name__,
)
def test_gradients_of_layers(model):
    def step(x, total):
        leaf = x.detach().requires_grad_()
        total.add_(torch.autograd.grad(model(leaf).square().sum(), leaf)[0])

    same(step, (2, 2, 4, 4), (2, 2, 4, 4))


def test_random_numbers_are_drawn_for_every_replay():
    def noisy(x):
        F.dropout(x)  # draws, even if nobody wants it
        x.add_(torch.rand_like(x))

    mine, other, first = torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 3)
    tape = record(lambda: noisy(first), [first])
    assert tape is not None
    torch.manual_seed(3)
    tape.replay([mine])
    torch.manual_seed(3)
    noisy(other)
    assert torch.equal(mine, other) and mine.unique().numel() == 6


# --- along gradients ------------------------------------------------------------------------------------------------


def descend(weight, one, other):
    weight.sub_(torch.bmm(one, other), alpha=0.1)


def descend_turned(weight, one, other):
    weight.mT.sub_(torch.bmm(one, other).mT.detach(), alpha=0.1)
    weight.mT.sub_(torch.bmm(one, other).mT)


@pytest.mark.parametrize(("work", "steps"), [(descend, 1), (descend_turned, 4)])
def test_a_product_is_subtracted_where_it_is_computed(work, steps):
    tape = same(work, (2, 5, 3), (2, 5, 4), (2, 4, 3), tolerance=1e-6)
    assert len(tape) == steps
    weight, one, other = draw((2, 5, 3), (2, 5, 4), (2, 4, 3), seed=9)
    expected = weight.double() - (0.1 if work is descend else 1.1) * one.double() @ other.double()
    tape.replay([weight, one, other])
    torch.testing.assert_close(weight.double(), expected, rtol=1e-5, atol=1e-6)


def also_used(weight, one, other):
    product = torch.bmm(one, other)
    weight.sub_(product, alpha=0.1)
    one.add_(product.sum())


def written_between(weight, one, other):
    product = torch.bmm(one, other)
    other.mul_(2)
    weight.sub_(product)


def changed_before(weight, one, other):
    product = torch.bmm(one, other)
    product[0].clamp_(min=0)
    weight.sub_(product)


def spread(weight, one, other):
    weight.sub_(torch.bmm(one, other)[:1])


def of_another_type(weight, one, other):
    weight.sub_(torch.bmm(one.double(), other.double()))


def by_itself(weight, one, other):
    weight.sub_(torch.bmm(weight, other[:, :3]))


def copied_before(weight, one, other):
    product = torch.bmm(one, (other * 1).mT.mT)
    other.mul_(2)
    weight.sub_(product)


@pytest.mark.parametrize("work", [copied_before, also_used, written_between, changed_before, spread, of_another_type])
def test_products_that_are_more_than_a_step_stay(work):
    same(work, (2, 5, 3), (2, 5, 4), (2, 4, 3))


def test_a_product_of_what_it_is_subtracted_from_stays():
    same(by_itself, (2, 5, 3), (2, 5, 4), (2, 4, 3))


# --- no tape --------------------------------------------------------------------------------------------------------


def asks(total, x):
    total.add_(x if x.sum() > 0 else -x)


def asks_which(total, x):
    total.add_(x.nonzero().sum())


def takes_some(total, x):
    total.add_(x[x > 0].sum())


def changes_a_tensor_itself(total, x):
    y = x[:, :2].clone()
    total[:, :2].add_(y.t())
    y.t_()


def draws_in_python(total, x):
    total.add_(x * random.random())


def draws_in_numpy(total, x):
    total.add_(x * float(np.random.random()))


def draws_by_itself(total, x):
    total.add_(torch.rand(3, generator=torch.Generator().manual_seed(3)))


@pytest.mark.parametrize(
    "work", [asks, asks_which, takes_some, changes_a_tensor_itself, draws_in_python, draws_in_numpy, draws_by_itself]
)
def test_work_that_may_be_other_work_the_next_time_is_not_recorded(work):
    inputs, done = draw((2, 3), (2, 3)), draw((2, 3), (2, 3))
    random.seed(0), np.random.seed(0)
    assert record(lambda: work(*inputs), inputs) is None
    random.seed(0), np.random.seed(0)
    work(*done)
    assert torch.equal(inputs[0], done[0])  # but it is done


def test_work_that_gets_at_its_inputs_in_another_way_is_not_recorded():
    total, x = draw((2, 3), (2, 3))
    behind = x[0]
    assert record(lambda: total[0].add_(behind), [total, x]) is None
    assert record(lambda: total.add_(behind * 2), [total, x]) is None
    assert record(lambda: total.add_(x), [x]) is None  # changes what is no input
    assert record(lambda: total.add_(x), [total, x, x]) is None
    assert record(lambda: total.add_(x), [total]) is not None  # x is always the same


def test_large_work_is_not_recorded(monkeypatch):
    total, x = draw((2, 3), (2, 3))
    monkeypatch.setattr(tapes, "HELD", 4 * 4 * 6)
    assert record(lambda: [total.add_(x * 2) for _ in range(4)], [total, x]) is not None
    assert record(lambda: [total.add_(x * 2) for _ in range(5)], [total, x]) is None


def test_errors_of_the_work_are_its_own():
    with pytest.raises(ZeroDivisionError):
        record(lambda: 1 / 0, [])
    total = torch.zeros(1)
    assert record(lambda: total.add_(1), [total]) is not None  # nobody listens to the other work any more


def test_what_comes_often_enough_is_recorded_once():
    done, totals = [], {key: torch.zeros(1) for key in ("often", "rare", "asks")}
    keys = ["often", "rare", "asks"] * REPLAYS + ["often", "asks"] * 4
    player = Tapes()
    for number, key in enumerate(keys):
        x = torch.full((1,), 1.0 + number)

        def work(key=key, x=x):
            done.append(key)
            totals[key].add_(x if key != "asks" or x > 0 else -x)

        player.do(key, work, [totals[key], x], keys[number:].count(key))
    assert [done.count(key) for key in ("often", "rare", "asks")] == [1, REPLAYS, REPLAYS + 4]
    for key, total in totals.items():
        assert total.item() == sum(1 + number for number, each in enumerate(keys) if each == key)
