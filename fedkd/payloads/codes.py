"""Quantised outputs: probabilities in a few bits each, entropy-coded, so that they have the bytes of a real coder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedkd.codecs import entropy, from_symbols, quantise, symbols
from fedkd.codecs.quantise import shapes
from fedkd.errors import KnowledgeError
from fedkd.payloads.base import Payload, check_outputs
from fedkd.payloads.outputs import ProxyOutputs

FLOAT = 32
"""Bits of outputs that are not quantised."""


@dataclass(frozen=True)
class QuantizedOutputs(Payload):
    """Probabilities on samples that both sides know, on a grid of 2^bits - 1 steps. Bytes: what the coder made of them.

    Parameters
    ----------
    words : np.ndarray
        The coder's output, uint32 [words].
    samples, num_classes : int
        n and C of the outputs.
    bits : int
        Bits of a probability; 1 = the most likely class alone.
    delta : bool
        Whether these are changes since levels that the receiver has, too.

    Examples
    --------
    >>> probs = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.5, 0.4]])
    >>> sent = QuantizedOutputs.of(quantise(probs, 2), 2)
    >>> sent.nbytes, sent.probs(sent.levels())
    (4, tensor([[0.6667, 0.3333, 0.0000],
            [0.0000, 0.6667, 0.3333]]))
    """

    words: np.ndarray
    samples: int
    num_classes: int
    bits: int
    delta: bool
    kind: str = "quantized-outputs"

    @classmethod
    def of(cls, levels: Tensor, bits: int, reference: Tensor | None = None) -> QuantizedOutputs:
        """Code levels (see `fedkd.codecs.quantise`) by themselves, or as changes since earlier ones, int32 [n, C]."""
        words = entropy.encode(symbols(levels, bits, reference))
        samples, classes = levels.shape
        return cls(words, samples, classes, bits, reference is not None)

    def levels(self, reference: Tensor | None = None) -> Tensor:
        """Return the levels, int32 [n, C].

        Parameters
        ----------
        reference : Tensor, optional
            What changes are counted from; of no consequence where there are none.

        Raises
        ------
        KnowledgeError
            The words mean nothing, or changes since levels that are not known.
        """
        if self.delta and reference is None:
            raise KnowledgeError("changes since outputs that are not known here")
        planes = entropy.decode(self.words, shapes(self.samples, self.num_classes, self.bits))
        return from_symbols(planes, self.num_classes, self.bits, reference if self.delta else None)

    def probs(self, levels: Tensor) -> Tensor:
        """Return the probabilities that levels stand for, float32 [n, C]."""
        return levels.float() / (2**self.bits - 1)

    @property
    def nbytes(self) -> int:
        """4 a word."""
        return self.words.nbytes

    def arrays(self) -> dict[str, np.ndarray]:
        """The words."""
        return {"words": self.words}

    def meta(self) -> dict[str, Any]:
        """What it takes to read them."""
        return {
            "type": "QuantizedOutputs",
            "samples": self.samples,
            "classes": self.num_classes,
            "bits": self.bits,
            "delta": self.delta,
        }

    @classmethod
    def read(cls, kind: str, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> QuantizedOutputs:
        """Rebuild from arrays and meta."""
        samples, classes, bits = (int(meta[name]) for name in ("samples", "classes", "bits"))
        return cls(arrays["words"], samples, classes, bits, bool(meta["delta"]))

    def with_outputs(self, change: Callable[[Tensor, str], Tensor]) -> QuantizedOutputs:
        """Return other outputs, not as changes. Of changes the outputs are not known: uniform ones stand for them.

        With 1 bit these are votes for class 0.
        """
        uniform = torch.full((self.samples, self.num_classes), 1 / self.num_classes)
        outputs = uniform if self.delta else self.probs(self.levels())
        return self.of(quantise(change(outputs, "probs"), self.bits), self.bits)

    def check(self, num_classes: int, samples: int, bits: int, reference: Tensor | None = None) -> Tensor:
        """Refuse outputs of another size, and words that cannot be read; return the levels, int32 [n, C].

        Parameters
        ----------
        num_classes, samples, bits : int
            What was asked for.
        reference : Tensor, optional
            What changes are counted from.

        Raises
        ------
        KnowledgeError
            With the reason.
        """
        if self.bits != bits:
            raise KnowledgeError(f"wrong type: outputs in {self.bits} bits, not {bits}")
        if (self.samples, self.num_classes) != (samples, num_classes):
            raise KnowledgeError(f"wrong shape: {(self.samples, self.num_classes)}, not {(samples, num_classes)}")
        if self.words.dtype != np.uint32 or self.words.ndim != 1:
            raise KnowledgeError(f"wrong type: coded outputs are {self.words.dtype}, not one row of 32-bit words")
        return self.levels(reference)


@dataclass(frozen=True)
class OutputCodec:
    """Probabilities rounded to some bits, to payloads and back.

    What is rounded is called levels: integers, or in 32 bits the probabilities themselves, which travel as
    `ProxyOutputs` with their ids.

    Parameters
    ----------
    bits : int
        From 1 to 16, or 32.

    Examples
    --------
    >>> codec, ids, probs = OutputCodec(2), torch.tensor([7]), torch.tensor([[0.7, 0.2, 0.1]])
    >>> codec.probs(codec.round(probs))
    tensor([[0.6667, 0.3333, 0.0000]])
    >>> codec.unpack(codec.pack(ids, codec.round(probs)), ids, 3)
    tensor([[2, 1, 0]], dtype=torch.int32)
    """

    bits: int

    @property
    def kind(self) -> str:
        """Kind of the payloads."""
        return (ProxyOutputs if self.bits == FLOAT else QuantizedOutputs).kind

    def round(self, probs: Tensor) -> Tensor:
        """Return the levels [n, C] of probabilities.

        Raises
        ------
        KnowledgeError
            They are not finite. Rounded they would look sound: with 1 bit NaN is a vote for class 0.
        """
        check_outputs(probs, "the model's output")
        return probs if self.bits == FLOAT else quantise(probs, self.bits)

    def probs(self, levels: Tensor) -> Tensor:
        """Return the probabilities of levels, float32 [n, C]."""
        return levels if self.bits == FLOAT else levels.float() / (2**self.bits - 1)

    def pack(self, ids: Tensor, levels: Tensor, reference: Tensor | None = None) -> ProxyOutputs | QuantizedOutputs:
        """Return the payload of levels on samples; as changes since earlier levels, if there are any."""
        if self.bits == FLOAT:
            return ProxyOutputs(ids, levels, "probs")
        return QuantizedOutputs.of(levels, self.bits, reference)

    def unpack(self, payload: Payload, ids: Tensor, num_classes: int, reference: Tensor | None = None) -> Tensor:
        """Undo `pack`, for a payload that may hold anything.

        Raises
        ------
        KnowledgeError
            It does not hold what it should, of the samples and in the bits that it should.
        """
        if self.bits == FLOAT and isinstance(payload, ProxyOutputs):
            payload.check(num_classes, ids, "probs")
            return payload.values
        if self.bits != FLOAT and isinstance(payload, QuantizedOutputs):
            return payload.check(num_classes, len(ids), self.bits, reference)
        raise KnowledgeError(f"{payload.kind} are no outputs in {self.bits} bits")
