"""Files that are either the old one or the new one, never half of it."""

import os
from pathlib import Path

__all__ = ["write_file"]


def write_file(path: str | Path, content: bytes | str) -> None:
    """Writes `content` beside `path` and then puts it in its place."""
    partial = Path(f"{path}.partial")
    partial.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(partial, path)
