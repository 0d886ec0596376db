"""Files that are whole or absent: written beside their final name, then renamed."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from pathlib import Path
from typing import Any

from abste.errors import RunError

TEMPORARY = ".tmp"


def write_error(path: Path, error: OSError) -> RunError:
    """The sentence for a failed write."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return RunError(
            f"cannot write {path}: {error.strerror}; free some space and continue with --resume, "
            "earlier files are whole."
        )
    return RunError(f"cannot write {path}: {error.strerror or error}; check the path and its permissions.")


def write_atomic(path: Path, data: bytes) -> None:
    """Replace ``path`` by ``data`` so that at any moment, power cuts included, it is the old file or the new one.

    A symbolic link stays, and what it leads to is replaced.

    Raises:
        RunError: the disk is full, the file cannot be written, or something else than a file is there; ``path`` is as
            before and nothing else is left.
    """
    target = os.path.realpath(path)
    if os.path.exists(target) and not os.path.isfile(target):  # a device or a pipe would be gone
        raise RunError(f"cannot write {path}: what is there is no regular file; give another path.")
    temporary = f"{target}.{os.getpid()}{TEMPORARY}"
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
        folder = os.open(os.path.dirname(target), os.O_RDONLY)
        try:
            os.fsync(folder)  # or the rename may not survive a power cut
        finally:
            os.close(folder)
    except OSError as error:
        raise write_error(path, error) from error
    finally:
        with contextlib.suppress(OSError):  # it was renamed, or could not be written, which is told
            os.unlink(temporary)


def write_json(path: Path, value: Any) -> None:
    """Atomic, indented JSON; NaN and infinity are refused, since JSON has no word for them."""
    write_atomic(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def remove_leftovers(folder: Path) -> None:
    """Delete what killed writes left behind."""
    for path in folder.glob(f"*{TEMPORARY}"):
        path.unlink(missing_ok=True)
