"""Output files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

_PARTIAL = ".partial-"


def check_file(path: str | Path) -> None:
    """Raise an OSError unless a file can be written to `path`: its folder exists, and it is no folder itself."""
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path must lie in an existing folder, got {path}")
    if path.is_dir():
        raise IsADirectoryError(f"path must be that of a file, got the folder {path}")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise PermissionError(f"path must lie in a folder that can be written to, got {path}")


def remove_partial_files(folder: str | Path) -> None:
    """Remove what processes that were killed while they wrote have left in `folder`."""
    for path in Path(folder).glob(f"{_PARTIAL}*"):
        path.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    """Of a file's content, in hexadecimal. Raises FileNotFoundError if there is no file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} must be an existing file")
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def written_whole(path: str | Path, *, durable: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `path`, renamed to it on success and removed on failure or interruption.

    The temporary name keeps the ending, by which writers choose a format. Raises as `check_file` before anything else.
    durable: the file is on the disk before it takes the place of an older one, even if the power fails.
    """
    check_file(path)
    path = Path(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=_PARTIAL, suffix="".join(path.suffixes))
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        if durable:
            _synchronise(temporary)
        temporary.replace(path)
        if durable:
            _synchronise(path.parent)  # the new name
    finally:
        temporary.unlink(missing_ok=True)


def _synchronise(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
