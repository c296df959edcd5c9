"""Token files: the documents of a corpus as ids, mapped into memory when read.

Layout: ids of the documents, zero bytes up to a multiple of 8, where each document begins and the last ends (int64),
bytes predicted in each document (int64), a JSON object that has the counts, its length (uint64), and eight bytes that
only a complete file has. Numbers are little-endian.
"""

import json
import os
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from elattn._files import replacing

__all__ = ["open_tokens", "token_dtype", "write_tokens"]

_MAGIC = b"elattok1"
_TAIL = struct.Struct("<Q8s")


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest unsigned type for ids below `vocab_size`."""
    return np.dtype(np.min_scalar_type(vocab_size - 1)).newbyteorder("<")


@contextmanager
def write_tokens(path: Path, dtype: np.dtype) -> Iterator["TokenWriter"]:
    """A file to add documents to, put in its place when the block ends without an error."""
    with replacing(path) as partial, partial.open("wb") as file:
        writer = TokenWriter(file, dtype)
        yield writer
        writer.finish()


class TokenWriter:
    """Adds documents to a file; `info` (JSON) is written with them."""

    def __init__(self, file: BinaryIO, dtype: np.dtype) -> None:
        self.file, self.dtype = file, dtype
        self.offsets, self.bytes = [0], []
        self.info: dict[str, Any] = {}

    def add(self, documents: Iterable[tuple[np.ndarray, int]]) -> None:
        """Documents as ids (L,) and the number of bytes that all of them but the first cover."""
        for ids, predicted in documents:
            self.file.write(ids.astype(self.dtype, copy=False).tobytes())
            self.offsets.append(self.offsets[-1] + ids.size)
            self.bytes.append(predicted)

    def finish(self) -> None:
        self.file.write(bytes(-self.file.tell() % 8))
        for numbers in (self.offsets, self.bytes):
            self.file.write(np.array(numbers, "<i8").tobytes())
        counts = {"dtype": self.dtype.str, "documents": len(self.bytes), "tokens": self.offsets[-1]}
        content = json.dumps(counts | {"info": self.info}).encode()
        self.file.write(content + _TAIL.pack(len(content), _MAGIC))


def open_tokens(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, Any]] | None:
    """Ids (N,), mapped; offsets (documents + 1,), bytes (documents,) and the writer's info.

    None if there is no file, or it is not complete.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            file.seek(-_TAIL.size, os.SEEK_END)
            length, magic = _TAIL.unpack(file.read())
            if magic != _MAGIC or length > size:
                return None
            end = size - _TAIL.size - length
            file.seek(end)
            counts = json.loads(file.read(length))
        dtype, documents, tokens = np.dtype(counts["dtype"]), counts["documents"], counts["tokens"]
        table = tokens * dtype.itemsize + -(tokens * dtype.itemsize) % 8  # where offsets begin
        if end != table + 8 * (2 * documents + 1):
            return None
        ids = np.memmap(path, dtype, "r", shape=(tokens,)) if tokens else np.empty(0, dtype)
        numbers = np.fromfile(path, "<i8", 2 * documents + 1, offset=table)
        return ids, numbers[: documents + 1], numbers[documents + 1 :], counts["info"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
