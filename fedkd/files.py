"""Files that are either there whole or not at all, and what JSON can hold."""

import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_atomic(path: Path, content: bytes) -> Path:
    """Write `content` under a temporary name beside `path`, then rename it.

    Parameters
    ----------
    path : Path
        File to write or replace; its folder is made if it is missing.
    content : bytes
        All of the file.

    Returns
    -------
    Path
        `path`.

    Raises
    ------
    OSError
        The folder cannot be written; an older file at `path` is left as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        # mkstemp makes files private; results get the permissions of any other new file.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def plain(value: Any) -> Any:
    """Return a value as JSON can hold it: numbers that are not finite, as of a model that has diverged, become null.

    Examples
    --------
    >>> plain({"loss": float("nan"), "curve": [(10, float("inf")), (20, 0.5)]})
    {'loss': None, 'curve': [[10, None], [20, 0.5]]}
    """
    if isinstance(value, Mapping):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
