"""Atomic writing of files: whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path, sync: bool = True) -> Iterator[Path]:
    """Yield a scratch path beside `path`; move what the block wrote there to `path` in one step.

    If the block fails, `path` keeps its old content and the scratch file is removed.

    Args:
        path: File to write or to replace.
        sync: Bring the content to the disk first, so that a crash of the machine leaves the old content or the new.

    Raises:
        OSError: The file cannot be written.
    """
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield scratch
        if sync:
            with open(scratch, "rb") as file:
                os.fsync(file.fileno())
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def write_whole(path: Path, content: str | bytes, sync: bool = True) -> None:
    """Replace the content of `path`, text as UTF-8, in one step; see `replacing`."""
    with replacing(path, sync) as scratch:
        scratch.write_bytes(content.encode() if isinstance(content, str) else content)
