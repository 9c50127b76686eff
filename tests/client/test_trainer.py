"""Local training against a plain PyTorch loop, and the teachers of scenario terms against hand arithmetic."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flwr.app import Context, RecordDict

from fedkd.client import terms, trainer
from fedkd.client.runtime import Runtime
from fedkd.data.batches import epoch_order
from fedkd.payloads import Weights
from fedkd.scenario import Client, Term
from fedkd.seeds import Purpose, rng


def context():
    return Context(0, 0, {}, RecordDict(), {})


def student_of(scenario, round=1, partition=0, ctx=None):
    runtime = Runtime(scenario)
    return runtime, runtime.student(partition, round, ctx or context())


def plain_loop(scenario, model, data, shard, optimizer, clip=0.0, rate=lambda step, steps: None):
    """Reference: nothing but PyTorch, over the same batches."""
    order = rng(scenario.run.seed, Purpose.BATCHES, 1, 0)
    batches = [
        b
        for _ in range(scenario.client.epochs)
        for b in epoch_order(np.asarray(shard.train), scenario.client.batch_size, order)
    ]
    model.train()
    for step, ids in enumerate(batches):
        if (lr := rate(step, len(batches))) is not None:
            optimizer.param_groups[0]["lr"] = lr
        batch = data.gather(ids)
        optimizer.zero_grad()
        F.cross_entropy(model(batch.x).logits, batch.y).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return model


@pytest.mark.parametrize(
    ("changes", "make", "extra"),
    [
        ({}, lambda p: torch.optim.SGD(p, lr=0.1), {}),
        (
            {"client__momentum": 0.9, "client__weight_decay": 1e-3, "client__nesterov": True, "client__epochs": 2},
            lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-3, nesterov=True),
            {},
        ),
        ({"client__optimizer": "adam", "client__lr": 0.01}, lambda p: torch.optim.Adam(p, lr=0.01), {}),
        ({"client__clip": 0.1}, lambda p: torch.optim.SGD(p, lr=0.1), {"clip": 0.1}),
        (
            {"client__schedule": "cosine"},
            lambda p: torch.optim.SGD(p, lr=0.1),
            {"rate": lambda step, steps: 0.1 * 0.5 * (1 + math.cos(math.pi * step / steps))},
        ),
    ],
    ids=["sgd", "momentum", "adam", "clip", "cosine"],
)
def test_learning_is_a_plain_loop_over_the_same_batches(small, changes, make, extra):
    scenario = small("fedavg", **changes)
    runtime, student = student_of(scenario)
    reference = copy.deepcopy(student.model)

    trainer.learn(student, runtime.local, {})

    plain_loop(scenario, reference, student.data, student.shard, make(reference.parameters()), **extra)
    for (name, learned), expected in zip(
        student.model.state_dict().items(), reference.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(learned, expected, rtol=1e-5, atol=1e-6, msg=name)


def test_learning_rate_decays_across_rounds_and_within_one():
    client = Client(lr=0.1, lr_decay=0.5)
    assert [trainer.learning_rate(client, r, 0, 10) for r in (1, 2, 3)] == [0.1, 0.05, 0.025]
    cosine = Client(lr=0.1, schedule="cosine")
    assert trainer.learning_rate(cosine, 1, 5, 10) == pytest.approx(0.05)
    assert trainer.learning_rate(cosine, 1, 0, 10) == 0.1


def test_steps_replace_epochs_even_for_tiny_shards(small):
    scenario = small("fedavg", client__steps=7, client__batch_size=512)
    runtime, student = student_of(scenario)
    seen = []
    loss = runtime.local.loss
    runtime.local.loss = lambda params, batch, *rest: seen.append(len(batch.y)) or loss(params, batch, *rest)
    trainer.learn(student, runtime.local, {})
    assert seen == [student.num_examples] * 7


def test_bf16_learns_nearly_the_same(small):
    _, exact = student_of(small("fedavg"))
    runtime, rounded = student_of(small("fedavg", client__precision="bf16"))
    trainer.learn(exact, runtime.local, {})
    trainer.learn(rounded, runtime.local, {})
    assert rounded.metrics["loss"] == pytest.approx(exact.metrics["loss"], rel=0.05)
    assert rounded.metrics["loss"] != exact.metrics["loss"]
    assert all(t.dtype == torch.float32 for t in rounded.model.state_dict().values())


def test_batches_of_one_are_dropped_where_batch_norm_cannot_use_them(small):
    scenario = small("fedavg", models__norm="batch", client__batch_size=2, models__student="cnn", models__options={},
                     data__options={"classes": 4, "train": 200, "test": 40, "shape": [8, 8]})  # fmt: skip
    runtime, _ = student_of(scenario)
    odd = next(p for p in range(6) if len(runtime.federation.shards[p].train) % 2)
    student = runtime.student(odd, 1, context())
    trainer.learn(student, runtime.local, {})
    assert math.isfinite(student.metrics["loss"])


def test_digest_fits_the_targets_it_is_given(small):
    scenario = small({"name": "dsfl"}, client__lr=1.0)
    _, student = student_of(scenario)
    ids = torch.arange(40)
    targets = F.one_hot(torch.arange(40) % 4, 4).float()[torch.randperm(40, generator=torch.Generator().manual_seed(0))]
    before = F.cross_entropy(student.predict(student.proxy.data, ids), targets)
    trainer.digest(student, ids, targets, F.cross_entropy, epochs=20, batch_size=10)
    assert F.cross_entropy(student.predict(student.proxy.data, ids), targets) < before
    assert student.metrics["digest"] < float(before)


def test_a_method_that_hides_the_proxy_set_hides_it(small):
    _, student = student_of(small("fedavg"))
    assert student.proxy is None
    with pytest.raises(ValueError, match="sees_proxy"):
        trainer.digest(student, torch.arange(2), torch.rand(2, 4), F.cross_entropy, epochs=1, batch_size=2)


# --- teachers of scenario terms ----------------------------------------------------------------------------------


def constant(student, value):
    return Weights({n: torch.full_like(t, value) for n, t in student.weights().state.items()}, student.arch)


def parameter_of(teacher):
    return float(next(iter(teacher.state.values())).flatten()[0])


def test_last_m_is_the_mean_of_the_last_m_received_models(small):
    scenario = small("fedavg", client__terms=[{"teacher": "last:2"}])
    runtime, _ = student_of(scenario)
    ctx, means = context(), []
    for round, value in enumerate((1.0, 3.0, 8.0), start=1):
        student = runtime.student(0, round, ctx)
        student.load(constant(student, value))
        (term,) = terms.activate(scenario.client.terms, student)
        means.append(parameter_of(term.teacher))
        runtime.keep(student, ctx)
    assert means == [1.0, 2.0, 5.5]


def test_ema_follows_the_student_step_by_step(small):
    scenario = small("fedavg", client__terms=[{"teacher": "ema:0.75"}])
    _, student = student_of(scenario)
    student.load(constant(student, 1.0))
    (term,) = terms.activate(scenario.client.terms, student)
    student.load(constant(student, 5.0))
    terms.follow(term.teacher.state, student.state, term.decay)
    assert parameter_of(term.teacher) == pytest.approx(0.75 * 1 + 0.25 * 5)


def test_own_is_the_clients_model_of_its_last_round(small):
    scenario = small("fedavg", client__terms=[{"teacher": "own"}])
    runtime, student = student_of(scenario)
    ctx = context()
    student.load(constant(student, 2.0))
    assert terms.activate(scenario.client.terms, student) == []  # nothing to learn from in the first round
    terms.remember(scenario.client.terms, student)
    runtime.keep(student, ctx)
    later = runtime.student(0, 2, ctx)
    later.load(constant(later, 9.0))
    (term,) = terms.activate(scenario.client.terms, later)
    assert parameter_of(term.teacher) == 2.0


def test_a_term_is_weight_times_the_loss_against_its_teacher(small):
    scenario = small("fedavg")
    _, student = student_of(scenario)
    student.load(student.weights())
    term = Term(loss="kd", weight=0.3, teacher="global", temperature=1.0)
    (active,) = terms.activate([term], student)
    batch = student.data.gather(student.shard.train[:4])
    with torch.no_grad():
        out, target = student.model(batch.x), active.teacher(batch.x)
    assert float(active(out, target, batch)) == pytest.approx(0.0, abs=1e-7)  # student = teacher
    doubled = out._replace(logits=out.logits * 2)
    p, log_q = out.logits.softmax(1), doubled.logits.log_softmax(1)
    by_hand = 0.3 * float((p * (p.log() - log_q)).sum(1).mean())
    assert float(active(doubled, target, batch)) == pytest.approx(by_hand, rel=1e-5)
