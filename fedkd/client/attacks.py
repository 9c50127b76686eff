"""Attacks as a Flower mod: clients that upload the opposite of what they have learned, or random numbers.

What an attacker uploads has the form of an honest upload, so nothing refuses it; only robust reduces help. Clients that
flip labels need no mod: the federation gives them wrong ones (`fedkd.data.federation.Federation.data_of`). Who attacks
is drawn once from the run's seed, see `fedkd.data.poison.draw_attackers`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from torch import Tensor

from fedkd.client.faults import MEASURING, NO_FAULTS, Mod, Next
from fedkd.payloads import CONFIG, Knowledge, Payload, Weights
from fedkd.seeds import Purpose, rng

if TYPE_CHECKING:
    from fedkd.client.runtime import Runtime

Change = Callable[[Tensor, str], Tensor]
"""From outputs [n, C] and their space to others of the same shape and space."""

STATISTICS = ("running_mean", "running_var")
"""Ends of the names of what norm layers measure: no attacker touches them, as a negative variance would be refused."""

TINY = 1e-12  # probabilities below have the logarithm of this one


def poison(runtime_of: Callable[[Context], Runtime]) -> Mod:
    """Return a mod that spoils the uploads of the clients that attack by ``sign-flip`` or ``random``.

    Parameters
    ----------
    runtime_of : callable
        Returns the clients' side of a message's scenario.

    Notes
    -----
    Attacks hit what belongs to the method: ``train``, ``train.<action>`` and ``query.<action>``.
    """

    def mod(message: Message, context: Context, call_next: Next) -> Message:
        config = message.content.config_records.get(CONFIG, ConfigRecord())
        if message.metadata.message_type in NO_FAULTS or MEASURING in config:
            return call_next(message, context)
        runtime, client = runtime_of(context), int(context.node_config["partition-id"])  # type: ignore[arg-type]
        received = message.content
        reply = call_next(message, context)
        kind = runtime.scenario.attacks.kind
        if reply.has_error() or kind not in ("sign-flip", "random") or client not in runtime.federation.attackers:
            return reply
        round = int(config.get("server-round", 0))  # type: ignore[arg-type]
        generator = rng(runtime.scenario.run.seed, Purpose.ATTACK, round, client)
        reply.content = _poisoned(kind, received, reply.content, generator)
        return reply

    return mod


def _poisoned(kind: str, received: RecordDict, sent: RecordDict, generator: np.random.Generator) -> RecordDict:
    """Return an upload as an attacker sends it; the records given stay as they are."""
    before, upload = Knowledge.from_records(received), Knowledge.from_records(sent)

    def spoil(payload: Payload) -> Payload:
        if isinstance(payload, Weights):
            known = before.payloads.get("weights")
            start = known.state if isinstance(known, Weights) else {}
            if kind == "sign-flip":
                return sign_flipped(payload, start)
            return random_update(payload, start, generator)
        return payload.with_outputs(negated if kind == "sign-flip" else random_outputs(generator))

    payloads = {name: spoil(payload) for name, payload in upload.payloads.items()}
    config = sent.config_records.get(CONFIG, ConfigRecord())
    return Knowledge(payloads, upload.num_examples, upload.metrics).to_records(config)


def sign_flipped(weights: Weights, received: dict[str, Tensor]) -> Weights:
    """Return the received weights less the update: 2·received - uploaded; what was not received counts as 0.

    Examples
    --------
    >>> sign_flipped(Weights({"w": torch.tensor([3.0])}, "mlp"), {"w": torch.tensor([1.0])}).state
    {'w': tensor([-1.])}
    """
    return _with_updates(weights, received, lambda update: -update)


def random_update(weights: Weights, received: dict[str, Tensor], generator: np.random.Generator) -> Weights:
    """Return the received weights and a Gaussian update, of which every tensor is as long as that of the client."""

    def replaced(update: Tensor) -> Tensor:
        noise = torch.from_numpy(generator.normal(size=tuple(update.shape)))
        return noise * (update.norm() / noise.norm().clamp(min=TINY))

    return _with_updates(weights, received, replaced)


def _with_updates(weights: Weights, received: dict[str, Tensor], change: Callable[[Tensor], Tensor]) -> Weights:
    state = dict(weights.state)
    for name, tensor in state.items():
        if not tensor.is_floating_point() or name.endswith(STATISTICS):
            continue
        start = received.get(name, torch.zeros_like(tensor)).double()
        state[name] = (start + change(tensor.double() - start)).to(tensor.dtype)
    return Weights(state, weights.arch, weights.kind)


def negated(values: Tensor, space: str) -> Tensor:
    """Return the outputs of negated logits.

    Examples
    --------
    >>> negated(torch.tensor([[0.5, 0.25, 0.25]]), "probs")
    tensor([[0.2000, 0.4000, 0.4000]])
    """
    if space == "logits":
        return -values
    return (-values.double().clamp(min=TINY).log()).softmax(-1).float()


def random_outputs(generator: np.random.Generator) -> Change:
    """Return a change to random outputs: normal logits with the deviation of the honest ones, uniform distributions."""

    def change(values: Tensor, space: str) -> Tensor:
        shape = tuple(values.shape)
        if space == "logits":
            return torch.from_numpy(generator.normal(size=shape) * float(values.double().std(correction=0))).float()
        drawn = generator.exponential(size=shape)
        return torch.from_numpy(drawn / drawn.sum(-1, keepdims=True)).float()

    return change
