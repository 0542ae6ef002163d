"""Files are replaced at once: a reader, or a process that is killed, sees the old content or the new one, never half of it."""

from __future__ import annotations

import os
from pathlib import Path


def replace_file(path: Path, content: str | bytes) -> None:
    """Write a file, in place of an existing one; nothing is left of the attempt if it fails.

    Args:
        path: of the file; its folder must exist.
        content: text is written as UTF-8.
    Raises:
        OSError: if it cannot be written.
    """
    draft = path.with_name(f".{path.name}.draft-{os.getpid()}")
    try:
        draft.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
