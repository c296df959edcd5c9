"""Documents out of files: plain text, folders, JSON-lines."""

import functools
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from elattn.errors import UserError

__all__ = ["Source"]

_JSON_LINES = (".jsonl", ".ndjson")


@dataclass(frozen=True)
class Source:
    """Where documents come from; files are read when they are asked for, one at a time.

    A plain text file is one document. A JSON-lines file (.jsonl, .ndjson) has one in `field` of each line's object. A
    folder has those of its files, in the order of their names and those of its folders: hidden files and files with a
    zero byte in their beginning (pictures, archives) are passed over. Documents of white space alone are left out.

    Args:
        path: of a file or a folder; None for Python's own documentation topics, as one document.
        field: name of the text in JSON-lines.
    """

    path: Path | None = None
    field: str = "text"

    @property
    def name(self) -> str:
        return "Python's documentation topics" if self.path is None else str(self.path)

    def documents(self) -> Iterator[str]:
        """The documents, in an order that does not change.

        Raises:
            UserError: a file cannot be read, is not UTF-8 text or not what its name says (the message has file and
                line), or there is no document at all.
        """
        empty = True
        for document in self._documents():
            if document.strip():
                empty = False
                yield document
        if empty:
            raise UserError(f"{self.name} is empty: give at least a few hundred kilobytes of text")

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the names and contents of all files, when first asked for."""
        digest = hashlib.sha256()
        if self.path is None:
            digest.update(_topics().encode())
            return digest.hexdigest()
        for path in self._files():
            name = path.relative_to(self.path).as_posix() if path != self.path else path.suffix
            with _open(path) as file:
                digest.update(f"{name}\0{os.fstat(file.fileno()).st_size}\0".encode(errors="surrogateescape"))
                while chunk := file.read(1 << 20):
                    digest.update(chunk)
        return digest.hexdigest()

    def _documents(self) -> Iterator[str]:
        if self.path is None:
            yield _topics()
            return
        for path in self._files():
            if path.suffix in _JSON_LINES:
                yield from self._json_lines(path)
            else:
                with _open(path) as file:
                    yield _decode(file.read(), path, 1)

    def _files(self) -> list[Path]:
        assert self.path is not None
        if not self.path.is_dir():
            return [self.path]
        found = []
        for folder, folders, names in os.walk(self.path):
            folders[:] = [name for name in folders if not name.startswith(".")]
            paths = [Path(folder) / name for name in names if not name.startswith(".")]
            found.extend(path for path in paths if path.is_file() and not _is_binary(path))
        if not found:
            raise UserError(f"the folder {self.path} holds no text files")
        return sorted(found)

    def _json_lines(self, path: Path) -> Iterator[str]:
        with _open(path) as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                where = f"{path}, line {number}"
                try:
                    entry = json.loads(_decode(line, path, number))
                except json.JSONDecodeError as error:
                    raise UserError(f"{where} is not JSON ({error.msg})") from None
                if not isinstance(entry, dict) or self.field not in entry:
                    keys = ", ".join(entry) if isinstance(entry, dict) else type(entry).__name__
                    raise UserError(f"{where} has no field {self.field!r} (it has: {keys})")
                document = entry[self.field]
                if not isinstance(document, str):
                    raise UserError(f"{where}: the field {self.field!r} must be text (got {document!r:.40})")
                try:
                    document.encode()
                except UnicodeEncodeError:
                    raise UserError(f"{where}: the field {self.field!r} holds half a surrogate pair") from None
                yield document


def _topics() -> str:
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise UserError(f"cannot read the text {path}: {error.strerror}") from None


def _is_binary(path: Path) -> bool:
    with _open(path) as file:
        return b"\0" in file.read(8192)


def _decode(data: bytes, path: Path, first_line: int) -> str:
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = first_line + data.count(b"\n", 0, error.start)
        raise UserError(f"{path} is not UTF-8 text (line {line}): give plain text") from None
    if "\0" in text:
        line = first_line + data.count(b"\n", 0, data.index(b"\0"))
        raise UserError(f"{path} holds zero bytes (line {line}): give plain text")
    return text
