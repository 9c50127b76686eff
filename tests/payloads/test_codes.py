"""Quantised outputs: the wire, bytes, refusals, attackers."""

import numpy as np
import pytest
import torch

from fedkd.client.attacks import negated
from fedkd.codecs import quantise
from fedkd.errors import KnowledgeError
from fedkd.payloads import Knowledge, OutputCodec, ProxyOutputs, QuantizedOutputs

PROBS = torch.from_numpy(np.random.default_rng(0).dirichlet(np.full(5, 0.4), 80)).float()
BEFORE = torch.from_numpy(np.random.default_rng(1).dirichlet(np.full(5, 0.4), 80)).float()


@pytest.mark.parametrize("bits", [1, 4, 11])
@pytest.mark.parametrize("delta", [False, True])
def test_they_survive_the_wire(bits, delta):
    levels, reference = quantise(PROBS, bits), quantise(BEFORE, bits) if delta else None
    sent = Knowledge.of(QuantizedOutputs.of(levels, bits, reference))

    records = sent.to_records()
    got = Knowledge.from_records(records).get(QuantizedOutputs)

    assert (got.samples, got.num_classes, got.bits, got.delta) == (80, 5, bits, delta)
    assert torch.equal(got.check(5, 80, bits, reference), levels)
    assert sent.nbytes["quantized-outputs"] == sum(a.numpy().nbytes for a in records.array_records[got.kind].values())
    torch.testing.assert_close(got.probs(levels), levels / (2**bits - 1))


def test_outputs_that_were_not_asked_for_are_refused():
    good = QuantizedOutputs.of(quantise(PROBS, 2), 2)
    changes = QuantizedOutputs.of(quantise(PROBS, 2), 2, quantise(BEFORE, 2))
    bad = {
        "in 2 bits, not 3": (good, (5, 80, 3)),
        r"wrong shape: \(80, 5\), not \(80, 4\)": (good, (4, 80, 2)),
        r"wrong shape: \(80, 5\), not \(79, 5\)": (good, (5, 79, 2)),
        "changes since outputs that are not known": (changes, (5, 80, 2)),
        "float32, not one row": (QuantizedOutputs(good.words.astype(np.float32), 80, 5, 2, False), (5, 80, 2)),
        "not one row": (QuantizedOutputs(np.stack([good.words] * 2), 80, 5, 2, False), (5, 80, 2)),
        "coded outputs": (QuantizedOutputs(good.words[:-1], 80, 5, 2, False), (5, 80, 2)),
    }
    for reason, (outputs, asked) in bad.items():
        with pytest.raises(KnowledgeError, match=reason):
            outputs.check(*asked)


def test_a_codec_has_float32_as_its_finest():
    ids, codec = torch.arange(80), OutputCodec(32)
    payload = codec.pack(ids, codec.round(PROBS), BEFORE)
    assert isinstance(payload, ProxyOutputs) and payload.nbytes == 4 * 80 * 5 + 4 * 80
    assert torch.equal(codec.probs(codec.unpack(payload, ids, 5)), PROBS)
    with pytest.raises(KnowledgeError, match="wrong sample ids"):
        codec.unpack(payload, ids.flip(0), 5)
    with pytest.raises(KnowledgeError, match="proxy-outputs are no outputs in 4 bits"):
        OutputCodec(4).unpack(payload, ids, 5)
    with pytest.raises(KnowledgeError, match="quantized-outputs are no outputs in 32 bits"):
        codec.unpack(OutputCodec(4).pack(ids, quantise(PROBS, 4)), ids, 5)


@pytest.mark.parametrize("bits", [1, 2, 16, 32])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_outputs_that_are_not_finite_are_not_rounded(bits, bad):
    probs = PROBS.clone()
    probs[7, 2] = bad
    with pytest.raises(KnowledgeError, match="the model's output holds NaN or infinite numbers"):
        OutputCodec(bits).round(probs)


def test_of_changes_an_attacker_makes_votes_for_the_lowest_class_with_one_bit():
    changes = QuantizedOutputs.of(quantise(PROBS, 1), 1, quantise(BEFORE, 1))
    assert changes.with_outputs(negated).check(5, 80, 1).argmax(1).unique().tolist() == [0]


def test_an_attacker_sends_other_outputs_that_can_be_read():
    reversed_ = QuantizedOutputs.of(quantise(PROBS, 3), 3).with_outputs(lambda values, space: values.flip(1))
    assert torch.equal(reversed_.check(5, 80, 3), quantise(PROBS, 3).flip(1))
    changes = QuantizedOutputs.of(quantise(PROBS, 3), 3, quantise(BEFORE, 3))
    noise = torch.from_numpy(np.random.default_rng(2).dirichlet(np.ones(5), 80)).float()
    assert torch.equal(changes.with_outputs(lambda values, space: noise).check(5, 80, 3), quantise(noise, 3))
    assert changes.with_outputs(lambda values, space: values).check(5, 80, 3).tolist() == [[2, 2, 1, 1, 1]] * 80
