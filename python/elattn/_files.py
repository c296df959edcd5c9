"""Files that are either the old one or the new one, never half of it; and folders."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from elattn.errors import UserError

__all__ = ["check_target", "make_folder", "replacing", "write_file"]


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A name beside `path`, whose file takes the place of `path` at the end, or goes if anything failed.

    It is this process's own, so that several may make the same file at once.
    """
    partial = Path(f"{path}.{os.getpid()}.partial")
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())  # or the new name might outlive a power cut without the content
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_file(path: str | Path, content: bytes | str) -> None:
    """Writes `content` beside `path` and then puts it in its place."""
    with replacing(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


def check_target(file: Path, overwrite: bool) -> None:
    """To be asked before work whose result goes to `file`.

    Raises:
        UserError: it is there already and is not to be replaced, or its folder is not there.
    """
    if file.exists() and not overwrite:
        raise UserError(f"{file} exists already: replace it with --overwrite, or choose another name")
    if not file.parent.is_dir():
        raise UserError(f"cannot write {file}: there is no folder {file.parent}")


def make_folder(path: Path) -> None:
    """Makes a folder, and those that it lies in, unless it is there.

    Raises:
        UserError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {path}: {error.strerror}") from None
