"""Output files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


def check_file(path: str | Path) -> None:
    """Raise an OSError unless a file can be written to `path`: its folder exists, and it is no folder itself."""
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path must lie in an existing folder, got {path}")
    if path.is_dir():
        raise IsADirectoryError(f"path must be that of a file, got the folder {path}")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise PermissionError(f"path must lie in a folder that can be written to, got {path}")


@contextlib.contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, renamed to it on success and removed on failure or interruption.

    The temporary name keeps the ending, by which writers choose a format. Raises as `check_file` before anything else.
    """
    check_file(path)
    path = Path(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".partial-", suffix="".join(path.suffixes))
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
