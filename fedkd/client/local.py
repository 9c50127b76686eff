"""The client half of a method: what a client does with knowledge, how it learns, and what it shares."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from fedkd.losses.response import cross_entropy
from fedkd.payloads import Knowledge, Weights

if TYPE_CHECKING:
    import numpy as np

    from fedkd.client.student import Student
    from fedkd.data.batches import ArrayData, Batch
    from fedkd.models import Outputs

Aux = dict[str, Any]


class LocalTraining:
    """Local training of FedAvg; methods override what differs.

    Parameters
    ----------
    method : DistillationStrategy
        The server half as built from the scenario. Here it is read for hyper-parameters alone.

    Notes
    -----
    `loss` and `observe` are pure functions of their arguments: they may read hyper-parameters from
    ``self.method``, never anything that differs between clients, so that one step can be run for one client or
    for many at once. What differs between clients is in `aux`, the (nested) dict of tensors that `absorb` returns.
    """

    distils: ClassVar[bool] = False
    """Whether the default `absorb` keeps a frozen copy of the received model as teacher."""

    keeps_model: ClassVar[bool] = False
    """Whether a client owns its model from round to round (methods that do not share weights)."""

    sees_proxy: ClassVar[bool] = False
    """Whether clients hold the proxy set."""

    actions: ClassVar[tuple[str, ...]] = ()
    """Further exchanges inside a round: for ``name`` here, ``on_name(student, knowledge) -> Knowledge``."""

    def __init__(self, method: Any) -> None:
        self.method = method

    def absorb(self, student: Student, knowledge: Knowledge) -> Aux:
        """Take in what the server sent: load the weights, keep them as teacher if the method distils.

        Parameters
        ----------
        student : Student
            The client's student.
        knowledge : Knowledge
            What the server sent.

        Returns
        -------
        dict
            Tensors, in nested dicts, that `loss` needs and that differ between clients.

        Raises
        ------
        KnowledgeError
            The knowledge is malformed; the client refuses the round and says why.
        """
        weights = knowledge.get(Weights)
        student.load(weights)
        if self.distils:
            student.teach(weights)
        return {}

    def loss(
        self,
        params: Mapping[str, Tensor],
        batch: Batch,
        out: Outputs,
        teachers: tuple[Outputs, ...],
        aux: Aux,
    ) -> dict[str, Tensor]:
        """Return the named terms of the loss, weighted; their sum is minimised. Default: cross-entropy.

        Clients of a cohort may be computed together, and what a GPU does for one step may be replayed for others (see
        `fedkd.graphs`), so it must do nothing but compute.

        Parameters
        ----------
        params : mapping of str to Tensor
            Parameters of the student.
        batch : Batch
            ``x`` [B, ...], ``y`` [B] and sample ``ids`` [B].
        out : Outputs
            The student's outputs; logits [B, C].
        teachers : tuple of Outputs
            The frozen teachers' outputs, in the order in which they were added.
        aux : dict
            What `absorb` returned.
        """
        return {"ce": cross_entropy(out.logits, batch.y)}

    def observe(self, tally: dict[str, Tensor], batch: Batch, out: Outputs) -> dict[str, Tensor]:
        """Return sums kept over the steps of a round (class means, say); they end in ``student.tally``.

        Like `loss`, it must do nothing but compute.
        """
        return tally

    def share(self, student: Student) -> Knowledge:
        """Return what the client sends back. Default: weights and the number of examples."""
        return Knowledge.of(student.weights(copy=False), num_examples=student.num_examples)

    def predict(self, student: Student, data: ArrayData, ids: Tensor | np.ndarray) -> Tensor:
        """Return the logits whose accuracy an evaluation reports, shape [n, C]. Default: the student's.

        What came with the evaluation is in ``student.knowledge``.
        """
        return student.predict(data, ids)
