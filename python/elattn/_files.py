"""Files that are either the old one or the new one, never half of it."""

import os
from pathlib import Path

__all__ = ["write_file"]


def write_file(path: str | Path, content: bytes | str) -> None:
    """Writes `content` beside `path` and then puts it in its place."""
    partial = Path(f"{path}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())  # or the new name might outlive a power cut without the content
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
