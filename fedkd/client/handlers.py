"""Handlers of the Flower ClientApp: message in, absorb → learn → share, message out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from flwr.app import ConfigRecord, Context, Error, Message
from flwr.clientapp import ClientApp

from fedkd import flower, plugins
from fedkd.client.attacks import poison
from fedkd.client.faults import inject
from fedkd.client.runtime import Runtime, runtime_of
from fedkd.client.student import Student
from fedkd.client.trainer import learn
from fedkd.errors import KnowledgeError
from fedkd.payloads import CONFIG, Knowledge, Weights
from fedkd.scenario import Attacks, Faults, Scenario, System
from fedkd.threads import one_thread

REFUSED = 400
"""Code of the Flower error with which a client refuses malformed knowledge."""

PARTITION = "partition-id"
SAMPLES = "samples"
"""Key in the reply's record ``config``: training samples that the client has seen, each as often as it was seen."""

UNTRAINED = ("query", "evaluate")
"""Message types on which nobody is trained."""

Mod = Callable[[Message, Context, Any], Message]
Work = Callable[[Runtime, Student, Knowledge, ConfigRecord], Knowledge]


def make_app(scenario: Scenario | None = None, mods: Sequence[Mod] = ()) -> ClientApp:
    """Return the ClientApp of a scenario.

    Parameters
    ----------
    scenario : Scenario, optional
        The resolved scenario. Without one, it is named by the run config of Flower's runtime
        (keys ``scenario`` and ``overrides``), as `flwr run` passes it.
    mods : sequence of Flower mods
        Wrap every message, such as taps. Those of the scenario's ``[faults]`` and ``[attacks]`` come after them: what
        an attacker sends may still be lost.
    """

    def resolved(context: Context) -> Scenario:
        return scenario if scenario is not None else flower.scenario_of(context.run_config)

    text = scenario.model_dump_json() if scenario is not None else ""

    def runtime(context: Context) -> Runtime:
        return runtime_of(text or resolved(context).model_dump_json())

    faulty = scenario is None or scenario.faults != Faults()
    poisoned = scenario is None or scenario.attacks != Attacks()
    app = ClientApp(mods=[*mods, *([inject(resolved)] if faulty else []), *([poison(runtime)] if poisoned else [])])

    def handler(work: Work, *, keeps: bool = True) -> Callable[[Message, Context], Message]:
        def handle(message: Message, context: Context) -> Message:
            with one_thread():
                return _handle(work, runtime(context), message, context, keeps)

        return handle

    app.train()(handler(_train))
    app.evaluate()(handler(_evaluate, keeps=False))
    app.query()(handler(_introduce, keeps=False))
    if scenario is not None:
        methods = [plugins.strategy_class(scenario.strategy.name)]
    else:
        methods = list(plugins.strategies().values())
    for action in sorted({name for method in methods for name in method.local.actions}):
        app.train(action)(handler(_action(action)))
        app.query(action)(handler(_action(action)))

    def meets(messages: Sequence[Message]) -> bool:
        """Whether a cohort's clients are to be trained together (see `fedkd.engine.worker.CohortRunner`)."""
        first, system = messages[0], scenario.system if scenario is not None else System()
        return first.metadata.message_type not in UNTRAINED and _trainer(_config(first), system) == "vectorised"

    app.meets = meets  # pyright: ignore[reportAttributeAccessIssue]
    return app


def _handle(work: Work, runtime: Runtime, message: Message, context: Context, keeps: bool) -> Message:
    config = _config(message)
    partition_id = int(context.node_config[PARTITION])  # type: ignore[arg-type]
    try:
        knowledge = Knowledge.from_records(message.content)
        with runtime.student(partition_id, int(config.get("server-round", 0)), context) as student:  # type: ignore[arg-type]
            student.knowledge = knowledge
            student.trainer = _trainer(config, runtime.scenario.system)
            student.max_steps = int(config.get("max-steps", 0))  # type: ignore[arg-type]
            reply = work(runtime, student, knowledge, config)
            if keeps:
                runtime.keep(student, context)
    except KnowledgeError as refusal:
        return Message(Error(REFUSED, f"client {partition_id} refuses: {refusal}"), reply_to=message)
    said = {PARTITION: partition_id, "arch": student.arch, SAMPLES: student.samples}
    return Message(reply.to_records(said), reply_to=message)


def _config(message: Message) -> ConfigRecord:
    record = message.content.get(CONFIG)
    return record if isinstance(record, ConfigRecord) else ConfigRecord()


def _trainer(config: ConfigRecord, system: System) -> str:
    """Return how a client is trained: as its message says, which is how trainers are measured, or the scenario."""
    return str(config.get("trainer", system.trainer))


def _train(runtime: Runtime, student: Student, knowledge: Knowledge, config: ConfigRecord) -> Knowledge:
    """Absorb → learn → share."""
    aux = runtime.local.absorb(student, knowledge)
    learn(student, runtime.local, aux)
    reply = runtime.local.share(student)
    reply.metrics = student.metrics | reply.metrics
    return reply


def _action(name: str) -> Work:
    def work(runtime: Runtime, student: Student, knowledge: Knowledge, config: ConfigRecord) -> Knowledge:
        reply = getattr(runtime.local, f"on_{name}")(student, knowledge)
        reply.metrics = student.metrics | reply.metrics
        return reply

    return work


def _evaluate(runtime: Runtime, student: Student, knowledge: Knowledge, config: ConfigRecord) -> Knowledge:
    """Accuracy of the received model, or of the client's own, on local or global test data."""
    if "weights" in knowledge:
        student.load(knowledge.get(Weights))
    local = config.get("on", "local") == "local"
    # Of an attacker that flips labels, too, the true ones.
    true = runtime.federation.train
    data, ids = (true, student.shard.test) if local else (student.test, torch.arange(len(student.test)))
    labels = torch.tensor(np.asarray(data.labels)[np.asarray(ids)], dtype=torch.int64)
    logits = runtime.local.predict(student, data, ids)
    if not len(labels):
        return Knowledge(num_examples=0, metrics={"accuracy": 0.0, "loss": 0.0})
    return Knowledge(
        num_examples=len(labels),
        metrics={
            "accuracy": float((logits.argmax(1) == labels).double().mean()),
            "loss": float(F.cross_entropy(logits, labels)),
        },
    )


def _introduce(runtime: Runtime, student: Student, knowledge: Knowledge, config: ConfigRecord) -> Knowledge:
    """Tell the partition id, the architecture (in the reply's config) and the number of examples."""
    return Knowledge(num_examples=student.num_examples)
