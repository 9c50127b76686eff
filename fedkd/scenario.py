"""The typed scenario: one experiment. The only place where a setting is declared.

Scenarios are read from TOML files by `fedkd.scenario_file`, made of nested tables by `fedkd.parsing`, and checked as
wholes by `fedkd.checks`.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """Base of all sections: unknown keys, NaN and infinities are refused, values never change afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Data(Section):
    """Where training and test data come from."""

    source: str = Field(
        default="digits",
        description="digits | npz:PATH | torchvision:NAME | hub:NAME | synthetic. "
        "A relative npz path is looked up below `folder`.",
    )
    folder: str = Field(default="", description="Folder of npz files or torchvision downloads; also $FEDKD_DATA.")
    train_samples: int = Field(default=0, ge=0, description="Use only the first so many training samples; 0 = all.")
    test_samples: int = Field(default=0, ge=0, description="Use only the first so many test samples; 0 = all.")
    augment: Literal["none", "flip", "crop-flip"] = Field(
        default="none", description="Random changes to private training images, drawn per batch."
    )
    options: dict[str, Any] = Field(
        default_factory=dict,
        description="Parameters of the source, such as classes and dimensions of `synthetic`.",
    )


class Partition(Section):
    """How training data are divided among clients."""

    name: str = Field(default="dirichlet", description="A partitioner; see `fedkd list partitioners`.")
    clients: int = Field(default=20, ge=1, description="Number of clients in the federation.")
    alpha: float | None = Field(
        default=None,
        gt=0,
        description="Concentration of the Dirichlet partitioners; small = skewed; default 0.5.",
    )
    min_samples: int = Field(default=0, ge=0, description="Fewest samples a client may have; 0 allows empty clients.")
    validation: float = Field(default=0.0, ge=0, lt=1, description="Share of each client's data kept for validation.")
    test: float = Field(default=0.0, ge=0, lt=1, description="Share of each client's data kept for its own test.")
    options: dict[str, Any] = Field(
        default_factory=dict,
        description="Further parameters of the flwr-datasets partitioner, by its own names.",
    )


class Proxy(Section):
    """Data that the server (and for some methods every client) may use for distillation."""

    source: str = Field(
        default="none",
        description="none | held-out (from training data) | noise | any data source; classes are ignored.",
    )
    size: int = Field(
        default=0,
        ge=0,
        description="Samples in the proxy set; 0 = a tenth of the training data, or all of another set.",
    )
    labelled: bool = Field(default=False, description="Whether methods may see labels (held-out only).")
    server_labels: int = Field(
        default=0,
        ge=0,
        description="Labelled samples cut from the training data for the server (early stopping).",
    )


class Models(Section):
    """Students of the clients, and of the server where it differs."""

    student: str | list[str] | dict[str, float] = Field(
        default="cnn",
        description="One model for all; a list, dealt out in turn; or shares: {cnn = 0.5, mlp = 0.5}.",
    )
    server: str = Field(
        default="", description="Model of the server where a method wants another one; empty = the student."
    )
    norm: Literal["group", "batch", "none"] = Field(default="group", description="Normalisation layers.")
    buffers: Literal["all", "params_only"] = Field(
        default="all", description="Whether running statistics of norm layers travel and are averaged."
    )
    pretrained: str = Field(
        default="", description="Safetensors file that students start from; empty = random weights."
    )
    options: dict[str, Any] = Field(
        default_factory=dict, description="Further parameters of the models, such as width."
    )


class Strategy(Section):
    """The method. Every other key of the table is a hyper-parameter of it (`fedkd describe NAME`)."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True, allow_inf_nan=False)

    name: str = Field(default="fedavg", description="Built-in, entry point, module:attribute, or flwr:CLASS.")
    preset: str = Field(
        default="paper",
        description="paper (default) or code: the authors' released settings where they differ.",
    )

    @property
    def hyper(self) -> dict[str, Any]:
        """Hyper-parameters that the scenario sets."""
        return dict(self.model_extra or {})


class Term(Section):
    """One distillation term that is added to the client's loss, whatever the strategy."""

    loss: str = Field(default="kd", description="A loss of `fedkd list losses`, or module:attribute.")
    weight: float = Field(default=0.1, ge=0, description="Coefficient of the term.")
    teacher: str = Field(
        default="global",
        description="global | last:M | ema:DECAY | own | module:attribute. The global teacher of round 1 is the "
        "initial model; a client has no own teacher in its first round.",
    )
    temperature: float = Field(default=1.0, gt=0, description="Softmax temperature of teacher and student.")
    options: dict[str, Any] = Field(default_factory=dict, description="Further parameters of the loss.")


class Client(Section):
    """How a client trains."""

    epochs: int = Field(default=1, ge=1, description="Local epochs a round.")
    steps: int = Field(default=0, ge=0, description="Local steps a round instead of epochs; 0 = use epochs.")
    batch_size: int = Field(default=32, ge=1, description="Samples a step.")
    optimizer: Literal["sgd", "adam"] = Field(default="sgd", description="Local optimiser, fresh every round.")
    lr: float = Field(default=0.05, gt=0, description="Learning rate in round 1.")
    lr_decay: float = Field(default=1.0, gt=0, le=1, description="Factor on the learning rate per round.")
    schedule: Literal["constant", "cosine", "linear"] = Field(
        default="constant", description="Schedule within a round."
    )
    momentum: float = Field(default=0.0, ge=0, lt=1, description="SGD momentum.")
    nesterov: bool = Field(default=False, description="Nesterov momentum.")
    weight_decay: float = Field(default=0.0, ge=0, description="L2 weight decay.")
    clip: float = Field(default=0.0, ge=0, description="Gradient-norm clip; 0 = off.")
    precision: Literal["fp32", "bf16"] = Field(default="fp32", description="Arithmetic of forward passes.")
    channels_last: bool = Field(default=True, description="Memory layout of image batches and convolutions.")
    terms: list[Term] = Field(default_factory=list, description="Distillation terms added to the client's loss.")


class System(Section):
    """What computes the federation."""

    engine: Literal["ray", "inline"] = Field(default="ray", description="Ray workers, or this process.")
    workers: int = Field(
        default=0, ge=0, description="Worker processes; 0 = one per CPU, or as many as fit on the GPUs."
    )
    device: str = Field(default="auto", description="auto | cpu | cuda | cuda:N.")
    gpu_fraction: float = Field(
        default=0.0, ge=0, le=1, description="GPU share of one worker; 0 = measured and chosen."
    )
    server_threads: int = Field(
        default=0, ge=0, description="Torch threads of the server; 0 = all cores. Results depend on it."
    )
    server_precision: Literal["fp32", "bf16"] = Field(
        default="fp32",
        description="Arithmetic of forward passes in the server's distillation: students, and members' outputs on the "
        "proxy set. Losses, optimisers and what is measured stay float32.",
    )
    trainer: Literal["auto", "sequential", "vectorised"] = Field(
        default="auto",
        description="How a cohort is trained: one client after another, or as one batched computation. auto measures "
        "both before round 1 and keeps the faster; the run records it, because bits depend on it.",
    )
    graphs: bool = Field(
        default=False,
        description="Replay a GPU's training steps from CUDA graphs: of vectorised clients, and of the server's "
        "distillation. The bits are the same. Off, as it has hardly been measured where that pays.",
    )
    cohort: int = Field(
        default=0,
        ge=0,
        description="Most clients that a worker gets at once; 0 = a sixteenth of the selection, more on a GPU. "
        "The last bits of sums depend on it.",
    )
    min_replies: int = Field(default=1, ge=1, description="Fewest valid uploads with which a round goes on.")
    address: str = Field(default="", description="Ray cluster to join; empty = start one here.")


class Clock(Section):
    """Simulated time: how fast clients are and when they can be reached. Off with ``profile = "none"``."""

    profile: str = Field(
        default="none",
        description="none | uniform (all clients the same) | lognormal (drawn for each client) | file:PATH: CSV or "
        "JSON lines with samples_per_second, up and down, one row for each client. A relative path is looked up "
        "below data.folder.",
    )
    samples_per_second: float = Field(
        default=100.0, gt=0, description="Training samples that a client handles in a simulated second (the median)."
    )
    up: float = Field(default=1e6, gt=0, description="Bytes per second from a client to the server (the median).")
    down: float = Field(default=4e6, gt=0, description="Bytes per second from the server to a client (the median).")
    samples_per_second_sigma: float = Field(
        default=0.5, ge=0, description="lognormal: standard deviation of the logarithm of samples_per_second."
    )
    up_sigma: float = Field(default=0.5, ge=0, description="lognormal: standard deviation of the logarithm of up.")
    down_sigma: float = Field(default=0.5, ge=0, description="lognormal: standard deviation of the logarithm of down.")
    availability: str = Field(
        default="always",
        description="always | bernoulli (drawn for each client and round) | diurnal (by the hour of each client's "
        "day) | trace:PATH: CSV or JSON lines with client, start, end in simulated seconds, repeated after the last "
        "end. Where too few are available, the server looks again every simulated minute.",
    )
    probability: float = Field(
        default=0.5, gt=0, le=1, description="bernoulli: of being available; diurnal: the same at the best hour."
    )
    day: float = Field(default=86400.0, gt=0, description="diurnal: simulated seconds of a day.")
    deadline: float = Field(
        default=0.0,
        ge=0,
        description="Simulated seconds for which the server waits for replies, then goes on without the late ones; "
        "0 = waits for all.",
    )
    over_selection: float = Field(
        default=1.0,
        ge=1,
        description="Factor on the clients that are asked; the first to finish, as many as without it, are used.",
    )
    dropout: float = Field(
        default=0.0, ge=0, lt=1, description="Probability that a client drops out in the middle of a round."
    )


class Faults(Section):
    """Faults that are injected into clients: the probability of each, for every client in every round."""

    crash: float = Field(default=0.0, ge=0, le=1, description="Raises an error instead of training.")
    silent: float = Field(default=0.0, ge=0, le=1, description="Trains, but its reply is lost.")
    nan: float = Field(default=0.0, ge=0, le=1, description="Uploads an array with a NaN in it.")
    shape: float = Field(default=0.0, ge=0, le=1, description="Uploads an array of a wrong shape.")
    keys: float = Field(default=0.0, ge=0, le=1, description="Uploads an array under a wrong name.")
    straggle: float = Field(default=0.0, ge=0, le=1, description="Computes straggle_factor times as long ([clock]).")
    straggle_factor: float = Field(default=5.0, ge=1, description="How many times as long a straggler computes.")


class Attacks(Section):
    """Poisoned clients: what they do and how many they are. Off with ``kind = "none"``."""

    kind: Literal["none", "label-flip", "sign-flip", "random"] = Field(
        default="none",
        description="none | label-flip (trains on wrong labels) | sign-flip (uploads the received weights less its "
        "update, or outputs with the opposite sign) | random (a random update of the same length, or random outputs).",
    )
    share: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Share of the clients that attack, the same ones in every round; a larger share adds attackers.",
    )
    flip: Literal["next", "mirror"] = Field(
        default="next", description="label-flip: class y becomes y + 1 (the last one 0), or C - 1 - y."
    )


class Run(Section):
    """How long, how often, from which seed."""

    rounds: int = Field(default=10, ge=1, description="Communication rounds.")
    seed: int = Field(default=0, ge=0, description="Seed of every random choice.")
    participation: float = Field(default=1.0, gt=0, le=1, description="Share of the clients that take part in a round.")
    evaluate_every: int = Field(
        default=1, ge=1, description="Rounds between evaluations; the last round is always evaluated."
    )
    evaluate_clients: Literal["none", "selected", "all"] = Field(
        default="none",
        description="Which clients report accuracy on their own test data; needs partition.test > 0.",
    )
    evaluate_ensemble: bool = Field(
        default=True, description="Whether the ensemble of uploads is evaluated beside the student."
    )
    checkpoint_every: int = Field(default=1, ge=1, description="Rounds between checkpoints.")


class Scenario(Section):
    """One experiment."""

    name: str = Field(default="scenario", description="Name of the scenario; the folder of its runs.")
    label: str = Field(default="", description="Name of this cell in tables; empty = the strategy's name.")
    description: str = Field(default="", description="One line about what it shows.")
    data: Data = Field(default_factory=Data)
    partition: Partition = Field(default_factory=Partition)
    proxy: Proxy = Field(default_factory=Proxy)
    models: Models = Field(default_factory=Models)
    strategy: Strategy = Field(default_factory=Strategy)
    client: Client = Field(default_factory=Client)
    system: System = Field(default_factory=System)
    clock: Clock = Field(default_factory=Clock)
    faults: Faults = Field(default_factory=Faults)
    attacks: Attacks = Field(default_factory=Attacks)
    run: Run = Field(default_factory=Run)


# Settings that say how something is called or computed, and cannot change a result.
_IDLE: dict[str, Any] = {
    "name": True,
    "label": True,
    "description": True,
    "system": {"workers", "engine", "address", "gpu_fraction", "graphs"},
    "run": {"checkpoint_every"},
}


def digest(scenario: Scenario) -> str:
    """Return eight hexadecimal digits that stand for everything in the scenario that can change a result.

    Examples
    --------
    >>> a = Scenario.model_validate({"name": "a", "system": {"workers": 2}, "run": {"seed": 1}})
    >>> b = Scenario.model_validate({"name": "b", "run": {"seed": 1}})
    >>> digest(a) == digest(b) != digest(Scenario())
    True
    """

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [plain(inner) for inner in value]
        return int(value) if isinstance(value, float) and value.is_integer() else value

    text = json.dumps(plain(scenario.model_dump(exclude=_IDLE)), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]
