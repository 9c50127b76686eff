"""Decoded arrays, once per machine: folders of .npy files that every process maps into memory."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fedkd.errors import DataError

#: Part of every key: raise it when decoding or partitioning changes, so that old entries are left alone.
VERSION = 2


def cache_folder() -> Path:
    """Return the folder below which decoded data are kept; it need not exist yet.

    ``$FEDKD_CACHE`` if that is set (the command line's ``--cache`` sets it), otherwise ``fedkd`` in the
    platform's cache folder of the user.
    """
    chosen = os.environ.get("FEDKD_CACHE")
    if chosen:
        return Path(os.path.expanduser(chosen)).absolute()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "fedkd"


def digest(*parts: Any) -> str:
    """Return a short name for `parts`: arrays (dtype, shape and bytes) and anything that JSON can hold."""
    hasher = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            hasher.update(f"{part.dtype.str}{part.shape}".encode())
            hasher.update(np.ascontiguousarray(part).data)
        else:
            hasher.update(json.dumps(part, sort_keys=True, default=str).encode())
    return hasher.hexdigest()[:24]


def signature(path: Path) -> list[tuple[str, int, int]]:
    """Return (relative name, bytes, modification time in ns) of a file, or of every file below a folder."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    found = [(str(p.relative_to(path)), p.stat()) for p in files]
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in found]


def fetch(
    name: str, key: Any, make: Callable[[], tuple[Mapping[str, np.ndarray], dict[str, Any]]]
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return what `make` returns, from disk if it was made before.

    Parameters
    ----------
    name : str
        Readable start of the entry's name.
    key : Any
        Everything the content depends on, as JSON-like values.
    make : Callable
        Makes named arrays (no object dtype) and a JSON-like dictionary.

    Returns
    -------
    arrays : dict of str to np.ndarray
        Read-only memory maps.
    facts : dict
        The dictionary of `make`.

    Raises
    ------
    DataError
        If the cache folder cannot be written.

    Notes
    -----
    An entry is written to a temporary folder and renamed, so any number of processes may ask for it at once:
    the first rename wins, and nobody ever sees half an entry.
    """
    slug = "".join(c if c.isalnum() or c in "-_." else "-" for c in name)[-60:]
    entry = cache_folder() / "data" / f"{slug}-{digest(VERSION, key)}"
    try:
        return _read(entry)
    except FileNotFoundError:
        pass
    except (ValueError, OSError, EOFError):  # damaged from outside: make it again
        shutil.rmtree(entry, ignore_errors=True)
    arrays, facts = make()
    try:
        _write(entry, arrays, facts)
        return _read(entry)
    except OSError as error:
        raise DataError(
            f"cannot write decoded data below {cache_folder()} ({error}); "
            "name another folder with --cache or $FEDKD_CACHE"
        ) from error


def _read(entry: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    content = json.loads((entry / "facts.json").read_text(encoding="utf-8"))
    arrays = {name: _map(entry / f"{name}.npy") for name in content["arrays"]}
    return arrays, content["facts"]


def _map(path: Path) -> np.ndarray:
    # The plain array over the map: np.memmap's own indexing runs Python code for every batch.
    return np.load(path, mmap_mode="r", allow_pickle=False).view(np.ndarray)


def _write(entry: Path, arrays: Mapping[str, np.ndarray], facts: dict[str, Any]) -> None:
    entry.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".new-", dir=entry.parent))
    try:
        for name, array in arrays.items():
            np.save(temporary / f"{name}.npy", np.ascontiguousarray(array), allow_pickle=False)
        content = json.dumps({"arrays": list(arrays), "facts": facts})
        (temporary / "facts.json").write_text(content, encoding="utf-8")
        temporary.chmod(0o755)  # mkdtemp makes it private; a cache may be shared
        try:
            temporary.rename(entry)
        except OSError:
            if not (entry / "facts.json").exists():  # otherwise another process was first
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
