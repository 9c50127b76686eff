"""Faults and stragglers as a Flower mod: clients that crash, fall silent, send nonsense, or take their time.

The mod knows Flower's records alone, so it spoils what any ClientApp sends, on our grids and on Flower's own runtime.
Which client has which fault in which round is drawn from the run's seed, so a resumed run has the same ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict
from flwr.common.constant import ErrorCode

from fedkd.payloads import CONFIG
from fedkd.seeds import Purpose, rng

if TYPE_CHECKING:
    from fedkd.scenario import Faults, Scenario

SLOWDOWN = "slowdown"
"""Key in the reply's record ``config``: how many times as long as usual the client has computed (default 1)."""

NO_FAULTS = ("query", "evaluate")
"""Message types that the simulator itself uses, to get to know clients and to measure accuracy; they never fail."""

MEASURING = "max-steps"
"""Key in a message's record ``config`` with which the simulator measures what clients cost; that never fails either."""

Next = Callable[[Message, Context], Message]
Mod = Callable[[Message, Context, Next], Message]


def inject(scenario_of: Callable[[Context], Scenario]) -> Mod:
    """Return a mod that injects the faults of a scenario's ``[faults]`` section.

    Parameters
    ----------
    scenario_of : callable
        Returns the scenario of a message's context.

    Notes
    -----
    A client that draws several faults has the first of crash, silent, nan, shape, keys; it may straggle besides.
    Faults hit what belongs to the method: ``train``, ``train.<action>`` and ``query.<action>``.
    """

    def mod(message: Message, context: Context, call_next: Next) -> Message:
        config = message.content.config_records.get(CONFIG, ConfigRecord())
        if message.metadata.message_type in NO_FAULTS or MEASURING in config:
            return call_next(message, context)
        scenario = scenario_of(context)
        round, partition_id = config.get("server-round", 0), context.node_config["partition-id"]
        generator = rng(scenario.run.seed, Purpose.FAULT, int(round), int(partition_id))  # type: ignore[arg-type]
        faults = draw(scenario.faults, generator)
        if "crash" in faults:
            raise RuntimeError("injected fault: the client crashed")
        reply = call_next(message, context)
        if "silent" in faults:
            lost = Error(ErrorCode.REPLY_MESSAGE_UNAVAILABLE, "injected fault: no reply came")
            return Message(lost, reply_to=message)
        if not reply.has_error():
            reply.content = _with_faults(reply.content, faults, scenario.faults.straggle_factor, generator)
        return reply

    return mod


def draw(faults: Faults, generator: np.random.Generator) -> list[str]:
    """Return the faults of one client in one round.

    Parameters
    ----------
    faults : Faults
        Their probabilities.
    generator : numpy.random.Generator
        Of this client and round. It gives as many numbers whatever the probabilities are, so a higher one adds
        faulty clients and changes no other.

    Examples
    --------
    >>> from fedkd.scenario import Faults
    >>> draw(Faults(nan=1.0, straggle=1.0), np.random.default_rng(0))
    ['nan', 'straggle']
    """
    names = ("crash", "silent", *_SPOIL, "straggle")
    drawn = generator.random(len(names))
    return [name for name, number in zip(names, drawn, strict=True) if number < getattr(faults, name)]


def _with_faults(records: RecordDict, faults: list[str], slowdown: float, generator: np.random.Generator) -> RecordDict:
    """Return a reply with its faults; the records given stay as they are, because a client may keep them."""
    faulty = RecordDict()
    for name, record in records.items():
        faulty[name] = record
    for name in [name for name in faults if name in _SPOIL][:1]:
        places = [
            (key, array)
            for key, arrays in records.array_records.items()
            for array in arrays
            if name != "nan" or np.issubdtype(arrays[array].dtype, np.floating)
        ]
        if places:
            key, array = places[generator.integers(len(places))]
            faulty[key] = _SPOIL[name](records.array_records[key], array)
    if "straggle" in faults:
        config = records.config_records.get(CONFIG, ConfigRecord())
        faulty[CONFIG] = ConfigRecord({**config, SLOWDOWN: float(slowdown)})
    return faulty


def _nan(arrays: ArrayRecord, name: str) -> ArrayRecord:
    values = np.array(arrays[name].numpy())
    values.flat[:1] = np.nan
    return _replaced(arrays, name, name, Array(values))


def _shape(arrays: ArrayRecord, name: str) -> ArrayRecord:
    values = arrays[name].numpy()
    return _replaced(arrays, name, name, Array(np.stack([values, values])))


def _keys(arrays: ArrayRecord, name: str) -> ArrayRecord:
    return _replaced(arrays, name, f"{name}?", arrays[name])


def _replaced(arrays: ArrayRecord, name: str, new_name: str, new: Array) -> ArrayRecord:
    twin = ArrayRecord()
    for key, array in arrays.items():
        twin[new_name if key == name else key] = new if key == name else array
    return twin


_SPOIL: dict[str, Callable[[ArrayRecord, str], ArrayRecord]] = {"nan": _nan, "shape": _shape, "keys": _keys}
