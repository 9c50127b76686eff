"""CFD: Sattler, Marban, Rischke, Samek, CFD: Communication-Efficient Federated Distillation via Soft-Label Quantization
and Delta Coding, IEEE TNSE 2022 (2012.00632).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from fedkd.client import trainer
from fedkd.client.exchange import OutputSharing, soft_cross_entropy
from fedkd.client.local import Aux
from fedkd.codecs import entropy
from fedkd.errors import KnowledgeError
from fedkd.payloads import Knowledge, OutputCodec, Request
from fedkd.seeds import Purpose, rng
from fedkd.server.exchange import OutputExchange
from fedkd.server.uploads import Upload

if TYPE_CHECKING:
    from fedkd.client.student import Student

Bits = Literal[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 32]


class FreshDistillation(OutputSharing):
    """Starts from the common initial weights, distils the server's labels, trains, and shares rounded outputs."""

    method: CFD

    def absorb(self, student: Student, knowledge: Knowledge) -> Aux:
        """Forget the model of the last round, and digest the server's labels, if there are any yet."""
        if "request" in knowledge:  # the server knows none of the client's outputs: no changes since them
            student.memory |= {"subset": self.asked(student, knowledge)}
            student.memory.pop("levels", None)
        if "subset" not in student.memory:
            raise KnowledgeError("the subset is not known: it has not come, or was lost with the client's state")
        student.reset()
        ids, codec = student.memory["subset"], self.method.down
        if codec.kind in knowledge:
            labels = codec.unpack(knowledge.payloads[codec.kind], ids, student.num_classes)
            epochs, size = self.method.distill_epochs, self.method.distill_batch_size
            trainer.digest(student, ids, codec.probs(labels), soft_cross_entropy, epochs=epochs, batch_size=size)
        return {}

    def share(self, student: Student) -> Knowledge:
        """Share probabilities on the subset, rounded, as changes since the last time."""
        ids, codec = student.memory["subset"], self.method.up
        levels = codec.round(self.outputs(student, ids).values)
        coded = codec.pack(ids, levels, student.memory.get("levels"))
        if self.method.changes:
            student.memory["levels"] = levels
        return Knowledge.of(coded, num_examples=student.num_examples)


@dataclass(kw_only=True)
class CFD(OutputExchange):
    """Sattler et al., CFD: Communication-Efficient Federated Distillation via Soft-Label Quantization and Delta Coding.

    All exchange outputs on one fixed subset of a public set. Clients start every round from the same initial weights,
    distil the server's labels, train on their data, and send probabilities on the subset, rounded to the closest
    probability vector whose entries are multiples of 1 / (2^b - 1) and coded as changes since their last ones. The
    server averages, distils its own model from the mean (it goes on from round to round) and sends what that model
    predicts, rounded likewise: dual distillation. Bytes are those of a range coder that learns the symbols'
    frequencies. A client that is new, or whose last upload was lost, gets the subset's ids and starts without changes.
    Reported is the accuracy of the server's model.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2012.00632"
    year: ClassVar[int] = 2020
    distils_on: ClassVar[Literal["", "clients", "server", "both"]] = "both"
    server_data: ClassVar[str] = "the proxy set, unlabelled"
    travels_up: ClassVar[str] = (
        "quantized-outputs: as coded, about |X|·H/8 in 1 bit, |X|·(C - 1)·H/8 in more (H: entropy of a class, or of a "
        "level's symbols, in bits); 32 bits: 4·|X|·C + 4·|X| (ids)"
    )
    travels_down: ClassVar[str] = (
        "request: 4·|X| (ids), once; from round 2 on quantized-outputs: as coded, likewise; 32 bits: 4·|X|·C + "
        "4·|X| (ids)"
    )
    pitfalls: ClassVar[str] = (
        "changes can cost more bits than the outputs themselves where classes are few; of a small subset the coder "
        "learns little, and its words have four bytes"
    )
    differences: ClassVar[str] = (
        "The official code was unavailable. As in the paper: fixed subset, common initial weights in every round, Adam "
        "1e-3 on the server (clients: the scenario's). Assumed: one pass of distillation on either side, batch 128, "
        "soft cross-entropy at T = 1, 1 bit each way. The paper's coder is CABAC; here it is an adaptive range coder, "
        "whose bytes are measured, not estimated. With 1 bit a change is the distance from the last class around the "
        "circle of classes, with more the distance of levels. The server's labels are never sent as changes: delta "
        "coding is for clients alone, as the paper's text has it; the sizes that it reports at 1 bit (0.47 MB up, 0.24 "
        "MB down) suggest that its downlink is coded further."
    )
    verified: ClassVar[str] = (
        "quantiser against all vectors of the grid; decode(encode(x)) = x; bytes against entropies; 32 bits = plain "
        "dual distillation, rounds and several passes by hand; outputs that are not finite; lost uploads; resume; "
        "three models"
    )
    owns_model: ClassVar[bool] = True
    local = FreshDistillation

    bits_up: Bits = field(default=1, metadata={"help": "b of clients' outputs; 1 = the class alone, 32 = float32"})
    bits_down: Bits = field(default=1, metadata={"help": "b of the server's labels"})
    delta: bool = field(
        default=True, metadata={"help": "whether clients send changes since their last outputs; not with 32 bits"}
    )
    subset_size: int = field(
        default=80_000, metadata={"ge": 1, "help": "|X|, samples of the fixed subset; at most the proxy set"}
    )
    distill_epochs: int = field(default=1, metadata={"ge": 1, "help": "passes over the subset, clients and server"})
    distill_batch_size: int = field(default=128, metadata={"ge": 1, "help": "samples of the subset a step"})
    server_lr: float = field(default=1e-3, metadata={"gt": 0, "help": "Adam learning rate of the server model"})

    def bind(self, server: Any) -> None:
        """Start without knowing anybody's outputs."""
        super().bind(server)
        entropy.library()  # that it is missing should be known before round 1
        self.known: dict[int, Tensor] = {}  # by partition id: levels of clients whose last upload has arrived
        self.answer: Tensor | None = None  # levels of the server's labels

    @property
    def changes(self) -> bool:
        """Whether clients send changes since their last outputs."""
        return self.delta and self.bits_up < 32

    @property
    def up(self) -> OutputCodec:
        """How clients' outputs travel."""
        return OutputCodec(self.bits_up)

    @property
    def down(self) -> OutputCodec:
        """How the server's labels travel."""
        return OutputCodec(self.bits_down)

    def draw(self) -> Tensor:
        """Return the subset, the same in every round."""
        everything = len(self.server.proxy)
        draw = rng(self.server.seed, Purpose.PROXY_SUBSET)
        return torch.from_numpy(np.sort(draw.choice(everything, min(self.subset_size, everything), replace=False)))

    def broadcast(self, selected: list[int]) -> Mapping[int, Knowledge]:
        """Send the server's labels, and the subset's ids to those whose outputs are not known."""
        self.asked, self.called = self.draw(), frozenset(selected)
        labels = [] if self.answer is None else [self.down.pack(self.asked, self.answer)]
        known, new = Knowledge.of(*labels), Knowledge.of(Request(self.asked), *labels)
        return {p: known if p in self.known else new for p in selected}

    def levels(self, upload: Upload) -> Tensor:
        """Return the levels of a client's outputs, checked."""
        [payload] = upload.knowledge.payloads.values()
        classes = self.server.federation.num_classes
        reference = self.known.get(upload.partition_id) if self.changes else None
        return self.up.unpack(payload, self.asked, classes, reference)

    def check(self, upload: Upload) -> None:
        """Refuse outputs of another size, words that cannot be read, and changes since what is not known."""
        if len(upload.knowledge.payloads) != 1:
            raise KnowledgeError(f"{len(upload.knowledge.payloads)} payloads, not one")
        self.levels(upload)

    def fuse(self, uploads: Iterable[Upload]) -> None:
        """Average the clients' rounded probabilities, and remember them; forget those that did not arrive."""
        arrived = {upload.partition_id: self.levels(upload) for upload in uploads}
        others = {p: levels for p, levels in self.known.items() if p not in self.called}
        self.known = {**others, **{p: levels if self.changes else torch.empty(0) for p, levels in arrived.items()}}
        self.consensus = self.reduced_outputs([self.up.probs(levels) for levels in arrived.values()])

    def distill(self) -> None:
        """Train the server model on the mean; its outputs, rounded, are the next labels."""
        epochs, size = self.distill_epochs, self.distill_batch_size
        self.teach_server(self.consensus, optimizer="adam", lr=self.server_lr, epochs=epochs, batch_size=size)
        self.answer = self.down.round(self.server_outputs().softmax(1))

    def state_dict(self) -> dict[str, Any]:
        """Return the base's state, the labels, and what is known of clients."""
        answer = {} if self.answer is None else {"answer": self.answer}
        return {**super().state_dict(), **answer, "known": {str(p): levels for p, levels in self.known.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        super().load_state_dict(state)
        self.answer = state.get("answer")
        self.known = {int(p): levels for p, levels in state["known"].items()}
