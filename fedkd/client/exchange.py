"""Client halves of methods that exchange outputs on the proxy set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedkd.client import trainer
from fedkd.client.local import Aux, LocalTraining
from fedkd.losses.response import cross_entropies, kd
from fedkd.payloads import Knowledge, ProxyOutputs, Request

if TYPE_CHECKING:
    from fedkd.client.student import Student
    from fedkd.data.batches import Batch
    from fedkd.models import Outputs


def soft_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy with soft targets, T = 1, sum over classes and mean over the batch: the gradient of KL."""
    return kd(
        logits,
        target,
        temperature=1.0,
        reduction="batchmean",
        t_squared=False,
        kind="soft_ce",
        target_space="probs",
    )


class OutputSharing(LocalTraining):
    """A client that owns its model and shares the model's outputs on the proxy set."""

    method: Any
    """An `OutputExchange`; its `space` is that of the outputs."""

    keeps_model = True
    sees_proxy = True

    def labels(self, student: Student, knowledge: Knowledge) -> ProxyOutputs | None:
        """Return the server's outputs for proxy samples, checked; None if it has sent none."""
        assert student.proxy is not None
        if "proxy-outputs" not in knowledge:
            return None
        labels = knowledge.get(ProxyOutputs)
        Request(labels.ids).check(len(student.proxy))
        labels.check(student.num_classes, labels.ids, self.method.space)
        return labels

    def asked(self, student: Student, knowledge: Knowledge) -> Tensor:
        """Return the proxy samples that the server asks for, int64 [n]: all, unless it names them."""
        assert student.proxy is not None
        if "request" not in knowledge:
            return torch.arange(len(student.proxy))
        request = knowledge.get(Request)
        request.check(len(student.proxy))
        return request.ids

    def outputs(self, student: Student, ids: Tensor) -> ProxyOutputs:
        """Return the student's outputs on proxy samples in the method's space."""
        assert student.proxy is not None
        logits = student.predict(student.proxy.data, ids)
        return ProxyOutputs(ids, logits if self.method.space == "logits" else logits.softmax(1), self.method.space)

    def share(self, student: Student) -> Knowledge:
        """Share outputs on the samples that were asked for."""
        asked = self.asked(student, student.knowledge)
        return Knowledge.of(self.outputs(student, asked), num_examples=student.num_examples)


class Digesting(OutputSharing):
    """Distils from the server's labels first, then trains on its own data, then shares.

    The method has ``distill_epochs`` and ``distill_batch_size``.
    """

    def absorb(self, student: Student, knowledge: Knowledge) -> Aux:
        """Digest the server's labels, if there are any yet."""
        self.asked(student, knowledge)  # refused before anything is learnt
        labels = self.labels(student, knowledge)
        if labels is not None:
            trainer.digest(
                student,
                labels.ids,
                labels.values,
                soft_cross_entropy,
                epochs=self.method.distill_epochs,
                batch_size=self.method.distill_batch_size,
            )
        return {}


class JointTraining(OutputSharing):
    """Trains on its own samples and on proxy samples with the server's labels, shuffled into one set; then shares.

    The method has ``public_weight``, the weight of a proxy sample.
    """

    def absorb(self, student: Student, knowledge: Knowledge) -> Aux:
        """Take in the server's labels, if there are any yet."""
        self.asked(student, knowledge)
        labels = self.labels(student, knowledge)
        if labels is None:
            return {}
        student.public = labels.ids
        return {"targets": labels.values.to(student.device)}

    def loss(
        self,
        params: Mapping[str, Tensor],
        batch: Batch,
        out: Outputs,
        teachers: tuple[Outputs, ...],
        aux: Aux,
    ) -> dict[str, Tensor]:
        """Cross-entropy with labels or, of proxy samples, with the server's soft ones; T = 1, mean over the batch."""
        if "targets" not in aux:
            return super().loss(params, batch, out, teachers, aux)
        targets = aux["targets"]
        own = cross_entropies(out.logits, batch.y).sum() / len(batch.y)
        public = kd(
            out.logits,
            targets[batch.ids.clamp(max=len(targets) - 1)],
            temperature=1.0,
            reduction="batchmean",
            t_squared=False,
            kind="soft_ce",
            target_space="probs",
            sample_weight=(batch.y < 0).float(),
        )
        return {"ce": own, "public": self.method.public_weight * public}
