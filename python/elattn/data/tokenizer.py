"""Text to token ids and back: bytes, or a tokenizer.json of the `tokenizers` package."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from elattn._files import write_file
from elattn.errors import UserError

__all__ = [
    "ByteTokenizer",
    "SubwordTokenizer",
    "Tokenizer",
    "decode_stream",
    "load_tokenizer",
    "save_tokenizer",
    "train_tokenizer",
]

_END = "<|endoftext|>"
_END_NAMES = (_END, "<|end_of_text|>", "</s>", "<eos>")
_PIECE = 1 << 20  # characters encoded at once
# Inside a line's beginning no pre-tokenizer joins what lies on the two sides.
_LINE_START = re.compile(r"(?<=\S\n)(?=\S)")


class Tokenizer(Protocol):
    """What training and generation need of a tokenizer.

    Attributes:
        vocab_size: ids are 0..vocab_size - 1.
        eos_id: the token that ends every document, or None if there is none.
        digest: a name that tells tokenizers apart.
    """

    vocab_size: int
    eos_id: int | None
    digest: str

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without the end token."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; bytes that are no UTF-8 become U+FFFD, special tokens nothing."""
        ...

    def encode_documents(self, documents: list[str]) -> Iterator[tuple[np.ndarray, int]]:
        """For each document its ids, with the end token if there is one, and the bytes that its first token covers."""
        ...


class ByteTokenizer:
    """Ids are the bytes of UTF-8."""

    vocab_size = 256
    eos_id = None
    digest = "bytes"

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(ids).decode(errors="replace")

    def encode_documents(self, documents: list[str]) -> Iterator[tuple[np.ndarray, int]]:
        for document in documents:
            yield np.frombuffer(document.encode(), np.uint8), 1


class SubwordTokenizer:
    """A tokenizer.json.

    The end token is the first of `<|endoftext|>`, `<|end_of_text|>`, `</s>` and `<eos>` that it has. Ids are those of
    the text alone: no special token is added, nothing truncated or padded.

    Args:
        text: content of the file.

    Raises:
        ValueError: `text` is no tokenizer.
    """

    def __init__(self, text: str) -> None:
        import tokenizers  # here, because byte models need neither the package nor the time to import it

        try:
            tokenizer = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the package raises nothing narrower
            raise ValueError(f"not a tokenizer.json ({error})") from None
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._lossless = _is_lossless(json.loads(text))
        self.text = text
        # Ids may have holes, so their number is not the bound.
        self.vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        ends = (tokenizer.token_to_id(name) for name in _END_NAMES)
        self.eos_id: int | None = next((i for i in ends if i is not None), None)
        self.digest = hashlib.sha256(text.encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        pieces = self._tokenizer.encode_batch(self._pieces(text), add_special_tokens=False)
        return [i for piece in pieces for i in piece.ids]

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode(list(ids))

    def encode_documents(self, documents: list[str]) -> Iterator[tuple[np.ndarray, int]]:
        pieces = [self._pieces(document) for document in documents]
        encoded = iter(self._tokenizer.encode_batch([p for parts in pieces for p in parts], add_special_tokens=False))
        end = [] if self.eos_id is None else [self.eos_id]
        for parts in pieces:
            encodings = [next(encoded) for _ in parts]
            ids = np.array([i for encoding in encodings for i in encoding.ids] + end, np.uint32)
            span = encodings[0].token_to_chars(0) if encodings[0].ids else None
            yield ids, len(parts[0][: span[1]].encode()) if span else 0

    def _pieces(self, text: str) -> list[str]:
        """`text`, cut where that changes no token if it is so long that its tokens would need too much memory."""
        pieces = []
        while self._lossless and len(text) > _PIECE and (cut := _LINE_START.search(text, _PIECE)):
            pieces.append(text[: cut.start()])
            text = text[cut.start() :]
        return [*pieces, text]


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a tokenizer.json, or of the folder of a training run: bytes if it has no tokenizer.json.

    Raises:
        UserError: the file cannot be read, or is no tokenizer.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "tokenizer.json"
        if not path.exists():
            return ByteTokenizer()
    try:
        return SubwordTokenizer(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the tokenizer {path}: {error.strerror}") from None
    except ImportError:
        raise UserError(f"{path} needs the package tokenizers: pip install tokenizers") from None
    except ValueError as error:
        raise UserError(f"{path}: {str(error) or 'not UTF-8 text'}") from None


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> SubwordTokenizer:
    """A byte-level BPE of at most `vocab_size` tokens: the end token, the 256 bytes, and the commonest merges.

    Every text is encoded without loss. A short text may not have enough pairs to merge for as many tokens as asked.

    Raises:
        UserError: `vocab_size` leaves no room for the bytes, or the package `tokenizers` is missing.
    """
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    except ImportError:
        raise UserError("a subword vocabulary needs the package tokenizers: pip install tokenizers") from None
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size <= len(alphabet):
        raise UserError(f"a subword vocabulary needs more than the {len(alphabet)} bytes (got {vocab_size})")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[_END], initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(documents, trainer)
    return SubwordTokenizer(tokenizer.to_str())


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes tokenizer.json, for `load_tokenizer`; bytes need no file."""
    if isinstance(tokenizer, SubwordTokenizer):
        write_file(folder / "tokenizer.json", tokenizer.text)


def decode_stream(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """The text of `ids`, piece by piece as they come; joined it is `tokenizer.decode(ids)`.

    A character whose bytes lie in several tokens comes with the last of them.
    """
    # Spaces may depend on the token before, so each piece is decoded with the one before it and that one cut off.
    before: list[int] = []
    pending: list[int] = []
    for i in ids:
        pending.append(i)
        shown, text = tokenizer.decode(before), tokenizer.decode(before + pending)
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            continue
        if text != shown:
            yield text[len(shown) :]
            before = []
        before, pending = before + pending, []
    if pending:
        yield tokenizer.decode(before + pending)[len(tokenizer.decode(before)) :]


def _is_lossless(content: dict[str, Any]) -> bool:
    """Whether texts may be encoded in pieces: no space is put before a text, nothing normalised away."""
    stage = content.get("pre_tokenizer") or {}
    stages = stage.get("pretokenizers", [stage])
    byte_level = [s for s in stages if s.get("type") == "ByteLevel"]
    return bool(byte_level) and not any(s.get("add_prefix_space") for s in byte_level) and not content.get("normalizer")
