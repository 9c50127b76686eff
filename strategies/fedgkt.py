"""FedGKT: He, Annavaram, Avestimehr, Group Knowledge Transfer: Federated Learning of Large CNNs at the Edge,
NeurIPS 2020 (2007.14513), Algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from fedkd.client.local import Aux, LocalTraining
from fedkd.data.batches import Batch, epoch_order
from fedkd.losses.response import cross_entropy, kd
from fedkd.models.cut import Tail, tap_shape
from fedkd.payloads import FeatureMaps, Knowledge, SampleKnowledge, Weights
from fedkd.seeds import Purpose
from fedkd.server.distiller import Distiller
from fedkd.server.evaluation import Predict
from fedkd.server.features import FeatureStore
from fedkd.server.logit_pool import LogitPool
from fedkd.server.strategy import DistillationStrategy
from fedkd.server.targets import Targets
from fedkd.server.uploads import Upload
from fedkd.students import has_batch_norm, snapshot

if TYPE_CHECKING:
    from fedkd.client.student import Student
    from fedkd.data.batches import ArrayData
    from fedkd.models import Outputs

TAIL = "tail"
PAIR = "client body + server tail"


class EdgeTraining(LocalTraining):
    """Cross-entropy, and KD against the server's logits for the same private samples."""

    method: FedGKT
    keeps_model = True

    def __init__(self, method: FedGKT) -> None:
        super().__init__(method)
        self.tails: dict[tuple[int, ...], Tail] = {}

    def absorb(self, student: Student, knowledge: Knowledge) -> Aux:
        """Lay out the server's logits by sample id; none have come in a client's first round."""
        targets = torch.zeros(len(student.data), student.num_classes)
        known = torch.zeros(len(student.data))
        if "sample-knowledge" in knowledge:
            taught = knowledge.get(SampleKnowledge)
            taught.check(student.num_classes, torch.as_tensor(np.asarray(student.shard.train)))
            targets[taught.ids], known[taught.ids] = taught.logits, 1.0
        return {"targets": targets.to(student.device), "known": known.to(student.device)}

    def loss(
        self, params: Mapping[str, Tensor], batch: Batch, out: Outputs, teachers: tuple[Outputs, ...], aux: Aux
    ) -> dict[str, Tensor]:
        """Cross-entropy + α·T²·KL(server ‖ client), mean over the batch: on clients α weighs the KD (code)."""
        distilled = kd(
            out.logits,
            aux["targets"][batch.ids],
            temperature=self.method.temperature,
            reduction="batchmean",
            t_squared=True,
            sample_weight=aux["known"][batch.ids],
        )
        return {**super().loss(params, batch, out, teachers, aux), "kd": self.method.alpha * distilled}

    def share(self, student: Student) -> Knowledge:
        """Share the feature maps behind the cut, logits and labels of all training samples."""
        ids = torch.as_tensor(np.asarray(student.shard.train), dtype=torch.int64)
        cut = self.method.client_stages - 1
        features, logits = student.collect(student.data, ids, lambda out: (out.taps[cut], out.logits))
        labels = torch.as_tensor(np.asarray(student.data.labels)[ids.numpy()], dtype=torch.int64)
        return Knowledge.of(FeatureMaps(ids, features, logits, labels), num_examples=student.num_examples)

    def predict(self, student: Student, data: ArrayData, ids: Tensor | np.ndarray) -> Tensor:
        """Return the logits of the own body with the server's tail where that has come, else of the own model."""
        if TAIL not in student.knowledge:
            return super().predict(student, data, ids)
        received, cut, device = student.knowledge.get(Weights, TAIL), self.method.client_stages, student.device
        example = data.gather(torch.as_tensor(ids)[:1], device=device).x
        shape = tap_shape(student.model, example, cut)
        if shape not in self.tails:
            assert student.build is not None
            whole = student.build(received.arch)
            self.tails[shape] = Tail(whole, self.method.server_stages, example, [shape]).eval()
        tail = self.tails[shape]
        tail.load_state_dict(received.state)
        return student.collect(data, ids, lambda out: (tail(out.taps[cut - 1]).logits,))[0]


@dataclass(kw_only=True)
class FedGKT(DistillationStrategy):
    """He et al., Group Knowledge Transfer: Federated Learning of Large CNNs at the Edge, NeurIPS 2020.

    Clients train small models and send, for every private sample, a feature map, their logits and the label. The
    server trains a larger tail (``models.server`` without its first stages) on them, towards labels and clients'
    logits, and returns its own logits for the same samples, towards which clients train in their next round. What is
    deployed is a client's body with the server's tail; its accuracy is reported, as the mean over clients.

    Client: CE + α·T²·KL(tail ‖ client); server: T²·KL(client ‖ tail) + α·CE, as the release has them where its server
    distils; its commands let the server train towards the labels alone (preset ``code``). The returned logits
    are those of the last server epoch, each before its batch's step. Where a model with BatchNorm leaves out a last
    batch of one, which differs from epoch to epoch, that sample has those of the latest epoch that met it: a teacher a
    few steps older is better than none, which it has only if no epoch met it. Logits are keyed by sample id, so batches
    are shuffled; feature maps are made without augmentation, in evaluation mode. Test features are not uploaded, as
    they are in the release: the simulator takes the tail to the clients to measure it, which is not counted as traffic.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2007.14513"
    year: ClassVar[int] = 2020
    heterogeneous: ClassVar[bool] = True
    shares_weights: ClassVar[bool] = False
    travels_up: ClassVar[str] = "feature-maps: 4·n_k·F + 4·n_k·C + 8·n_k (labels, ids)"
    travels_down: ClassVar[str] = "sample-knowledge: 4·n_k·C + 4·n_k (ids), from a client's second round on"
    pitfalls: ClassVar[str] = (
        "sends labels, and features from which inputs can be reconstructed; traffic grows with the private data; where "
        "data are skewed and clients have few batches, the tail knows the client before best, and that is what it "
        "tells the next one about its samples: server_order = 'mixed' avoids it"
    )
    distils_on: ClassVar[Literal["", "clients", "server", "both"]] = "both"
    differences: ClassVar[str] = (
        "The paper's objectives have no coefficient; the release has α, on the KD of clients and on the CE of the "
        "server, 1 by default, which makes them one. Its server distils only with an option that is off by default "
        "and in its commands, and its temperature is 3: preset code. The release keys logits by batch number, which is "
        "wrong once the loader shuffles, adds 1e-7 to teachers' probabilities, augments what features are made of, "
        "uploads test features and lowers the learning rate when *test* accuracy stalls: none of it is done here. Its "
        "schedules of fewer server epochs in later rounds are not those of its ResNet-56 runs, which take 20 in every "
        "round, as here. Its clients start from a pre-trained ResNet-56, and their Adams are AMSGrad and live on "
        "between rounds; here models are as the scenario says, and clients' Adams plain and fresh in every round. A "
        "model with BatchNorm leaves out a last batch of one, and that sample's logits are those of the latest epoch "
        "that met it. One tail serves clients of several architectures through adapters, which the paper does not have."
    )
    verified: ClassVar[str] = (
        "losses by hand in float64, preset code too; feature maps, the server's training and its logits by sample id "
        "in plain PyTorch; client's own model as its tail; α = 0; bytes; resume"
    )
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"code": {"temperature": 3.0, "server_distils": False}}
    local = EdgeTraining

    alpha: float = field(default=1.0, metadata={"ge": 0, "help": "α: weight of clients' KD, and of the server's CE"})
    temperature: float = field(default=1.0, metadata={"gt": 0, "help": "softmax temperature"})
    server_distils: bool = field(
        default=True, metadata={"help": "whether the server learns from clients' logits too, or from labels alone"}
    )
    client_stages: int = field(
        default=1, metadata={"ge": 1, "help": "stages of a client's body behind which its features are taken"}
    )
    server_stages: int = field(
        default=1, metadata={"ge": 1, "help": "stages of the server model that are left out, as clients have them"}
    )
    server_epochs: int = field(default=20, metadata={"ge": 1, "help": "passes over the uploaded features a round"})
    server_batch_size: int = field(default=256, metadata={"ge": 1, "help": "samples a step on the server"})
    server_lr: float = field(default=1e-3, metadata={"gt": 0, "help": "Adam's learning rate on the server"})
    server_weight_decay: float = field(default=1e-4, metadata={"ge": 0, "help": "L2 weight decay on the server"})
    server_order: Literal["by-client", "mixed"] = field(
        default="by-client", metadata={"help": "one client's features after another's (paper), or shuffled together"}
    )

    def bind(self, server: Any) -> None:
        """Cut the server model."""
        super().bind(server)
        self.students = {}
        example = server.federation.train.gather(np.arange(1), device=server.device).x
        self.shapes = {arch: tap_shape(server.model(arch), example, self.client_stages) for arch in server.archs}
        whole = server.model(server.server_arch, server.initial(server.server_arch))
        self.tail = Tail(whole, self.server_stages, example, self.shapes.values(), server.seed)
        self.taught: dict[int, SampleKnowledge] = {}
        self.memory: dict[str, dict[str, Tensor]] = {}

    def broadcast(self, selected: list[int]) -> Mapping[int, Knowledge]:
        """Send each client the server's logits for its samples, if it has uploaded any."""
        return {p: Knowledge.of(self.taught[p]) if p in self.taught else Knowledge() for p in selected}

    def check(self, upload: Upload) -> None:
        """Refuse feature maps that do not fit the client's model, or that are not about its samples alone."""
        maps = upload.knowledge.get(FeatureMaps)
        maps.check(self.server.federation.num_classes, self.shapes[upload.arch], upload.num_examples)

    def fuse(self, uploads: Iterable[Upload]) -> None:
        """Collect the feature maps of the round."""
        self.store = FeatureStore()
        self.uploaded: dict[int, tuple[np.ndarray, SampleKnowledge]] = {}
        for upload in uploads:
            maps = upload.knowledge.get(FeatureMaps)
            rows = self.store.add(maps.features, maps.labels)
            # Clones, because what came shares its memory with the message, feature maps included.
            self.uploaded[upload.partition_id] = rows, SampleKnowledge(maps.ids.clone(), maps.logits.clone())

    def distill(self) -> None:
        """Train the tail, and keep what it said of every sample in the latest epoch that met it."""
        clients = torch.cat([own.logits for _, own in self.uploaded.values()])
        said = LogitPool(len(self.store), self.server.federation.num_classes)

        def loss(logits: Tensor, target: Tensor, batch: Batch) -> Tensor:
            said.put(batch.ids.cpu(), logits.detach().cpu())
            return self.server_loss(logits, target, batch.y)

        distiller = Distiller(
            optimizer="adam",
            lr=self.server_lr,
            weight_decay=self.server_weight_decay,
            amsgrad=True,
            schedule="constant",
            clip=0.0,
            temperature=self.temperature,
            t_squared=True,
            reduction="batchmean",
            returns="last",
            device=self.server.device,
            channels_last=self.server.channels_last,
            precision=self.server.scenario.system.server_precision,
        )
        rng = self.rng(Purpose.DISTILLATION)
        report = distiller.fit(
            self.tail,
            self.store,
            Targets(clients, "logits", torch.arange(len(self.store))),
            generator=rng,
            loss=loss,
            order=self.order(rng),
            carried=self.memory,
        )
        for p, (rows, own) in self.uploaded.items():
            met = said.known[rows]  # all but what was in every epoch its last batch of one, which BatchNorm cannot use
            self.taught[p] = SampleKnowledge(own.ids[met], said.values[rows][met])
        self.distilled[TAIL] = asdict(report)
        del self.store, self.uploaded

    def server_loss(self, logits: Tensor, clients: Tensor, labels: Tensor) -> Tensor:
        """Return T²·KL(client ‖ tail) + α·CE, mean over the batch: on the server α weighs the CE (code).

        Where the server does not distil, it is CE without α, as released.
        """
        if not self.server_distils:
            return cross_entropy(logits, labels)
        distilled = kd(logits, clients, temperature=self.temperature, reduction="batchmean", t_squared=True)
        return distilled + self.alpha * cross_entropy(logits, labels)

    def order(self, rng: np.random.Generator) -> list[np.ndarray]:
        """Return the rows of every step of the server: shuffled within each client, or within each shape."""
        mixed, single = self.server_order == "mixed", has_batch_norm(self.tail)
        groups = self.store.by_shape() if mixed else [rows for rows, _ in self.uploaded.values()]
        steps = []
        for _ in range(self.server_epochs):
            epoch = [b for rows in groups for b in epoch_order(rows, self.server_batch_size, rng, single)]
            steps += [epoch[i] for i in rng.permutation(len(epoch))] if mixed else epoch
        return steps

    def predictors(self) -> dict[str, Predict]:
        """Return nothing: no model on the server takes images; see `measure`."""
        return {}

    def deployed(self) -> Callable[[int], Knowledge]:
        """Return the tail, which every client's body is used with."""
        server = self.server
        state = snapshot(self.tail.state_dict())
        parts = {
            arch: Knowledge.of(Weights(self.tail.state_for(shape, state), server.server_arch, kind=TAIL))
            for arch, shape in self.shapes.items()
        }
        return lambda p: parts[server.federation.archs[p]]

    def measure(self) -> dict[str, dict[str, float]]:
        """Return the accuracy of every client's body with the tail, on the global test set."""
        return {PAIR: self.evaluate_clients(self.server.federation.eligible, "global", self.deployed())}

    def headline(self, measured: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """Return the accuracy of the pairs."""
        return {"accuracy": measured[PAIR]["accuracy"], "whose": PAIR}

    def state_dict(self) -> dict[str, Any]:
        """Return the base's state, the tail with its optimiser, and the logits for every client's samples."""
        taught = {str(p): {"ids": t.ids, "logits": t.logits} for p, t in self.taught.items()}
        return {
            **super().state_dict(),
            TAIL: dict(self.tail.state_dict()),
            "memory": self.memory,
            "taught": taught,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        super().load_state_dict(state)
        self.tail.load_state_dict(state[TAIL])
        self.memory = {name: dict(each) for name, each in state["memory"].items()}
        self.taught = {int(p): SampleKnowledge(t["ids"], t["logits"]) for p, t in state["taught"].items()}
