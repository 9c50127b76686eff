"""Workers between two runs: kept for the next grid that wants the same kind, since starting one takes seconds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_keeping = False
_kept: tuple[Any, list[Any]] | None = None  # their kind, and the workers


@contextmanager
def kept_workers() -> Iterator[None]:
    """Keep the workers of each grid that is closed for the next one, until the context ends; one grid's at a time."""
    global _keeping
    before, _keeping = _keeping, True
    try:
        yield
    finally:
        _keeping = before
        if not before:
            release()


def keep(kind: Any, workers: list[Any]) -> bool:
    """Keep workers, unless nobody will want them; return whether they are kept.

    Parameters
    ----------
    kind : tuple
        What `kind_of` returned for them.
    workers : list
        Handles of Ray actors that have a method ``rest``.
    """
    global _kept
    if not _keeping:
        return False
    release()
    for worker in workers:
        worker.rest.remote()
    _kept = kind, workers
    return True


def take(kind: Any) -> list[Any]:
    """Return the workers that are kept, if they are of this kind; none otherwise.

    Those of another kind are ended: they hold CPUs that the caller needs.
    """
    global _kept
    if _kept is None or _kept[0] != kind:
        release()
        return []
    (_, workers), _kept = _kept, None
    return workers


def kind_of(*properties: Any) -> Any:
    """Return what workers have to have in common to stand for each other: properties, and the Ray that they are of."""
    import ray

    context = ray.get_runtime_context()
    return context.get_node_id(), context.get_job_id(), *properties


def release() -> None:
    """End the workers that are kept, if there are any."""
    global _kept
    (kind, workers), _kept = _kept or ((), []), None
    if not workers:
        return
    import ray  # which costs half a second, and who has workers has paid for it

    if ray.is_initialized() and kind_of()[:2] == kind[:2]:
        for worker in workers:
            ray.kill(worker, no_restart=True)
