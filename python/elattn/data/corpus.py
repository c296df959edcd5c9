"""Documents, tokenizer and token cache put together: what training reads."""

import hashlib
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from elattn._files import make_folder, write_file
from elattn.data.baselines import ByteCounts, bigram_bits_per_byte, unigram_bits_per_byte
from elattn.data.batches import Documents
from elattn.data.cache import open_tokens, token_dtype, write_tokens
from elattn.data.documents import Source
from elattn.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer, train_tokenizer
from elattn.errors import UserError

__all__ = ["Corpus", "load_corpus"]

_TOGETHER = 1 << 20  # characters of short documents that are tokenised in one call


@dataclass(frozen=True)
class Corpus:
    """Documents to train on and documents held out, as tokens.

    Attributes:
        tokenizer: that made the tokens.
        train, held_out: the documents of at least two tokens.
        unigram, bigram: bits per byte of the byte models on the documents held out.
    """

    tokenizer: Tokenizer
    train: Documents
    held_out: Documents
    unigram: float
    bigram: float


def load_corpus(
    data: str | Path | Source | None = None,
    *,
    field: str = "text",
    held_out: float = 0.1,
    tokenizer: Tokenizer | None = None,
    vocab_size: int | None = None,
    cache: str | Path | None = None,
) -> Corpus:
    """Reads documents (see `Source`) and splits them; tokens come from a file of an earlier call where there is one.

    Of several documents the last ones are held out, as many as fit into a share of `held_out` of the bytes and at least
    one; of a single document its end.

    Args:
        data: path of a text, a folder or JSON-lines; None for Python's documentation topics; or a `Source`, with a
            field of its own.
        field: of JSON-lines.
        held_out: share of the bytes for validation.
        tokenizer: the tokenizer; None for bytes.
        vocab_size: size of a byte-level BPE to train on the training documents, if no tokenizer is given.
        cache: folder for the token file and the trained tokenizer, by content; None keeps neither.

    Raises:
        UserError: there is no text, or a file is not as it should be.
    """
    source = data if isinstance(data, Source) else Source(None if data is None else Path(data), field)
    content = _hash(source.digest, source.field, held_out)
    if cache is None:
        with tempfile.TemporaryDirectory() as folder:  # an open mapping outlives its file
            return _load(source, content, held_out, tokenizer, vocab_size, Path(folder))
    return _load(source, content, held_out, tokenizer, vocab_size, Path(cache))


def _load(
    source: Source, content: str, held_out: float, tokenizer: Tokenizer | None, vocab_size: int | None, cache: Path
) -> Corpus:
    split = None
    if tokenizer is None and vocab_size is not None:
        trained = cache / f"tokenizer-{_hash(content, vocab_size)[:16]}.json"
        if trained.exists():
            tokenizer = load_tokenizer(trained)
        else:
            split = _Split(source, held_out)
            tokenizer = train_tokenizer((text for text, training in split if training), vocab_size)
            make_folder(cache)
            write_file(trained, tokenizer.text)
    tokenizer = tokenizer or ByteTokenizer()
    path = cache / f"tokens-{_hash(content, tokenizer.digest)[:16]}.bin"
    found = open_tokens(path)
    if found is None:
        split = split or _Split(source, held_out)
        make_folder(cache)
        _write(path, split, tokenizer)
        found = open_tokens(path)
        if found is None:
            raise UserError(f"the token file {path} could not be read back")
    tokens, offsets, sizes, info = found
    count, border = info["training_documents"], offsets[info["training_documents"]]
    return Corpus(
        tokenizer,
        Documents(tokens[:border], offsets[: count + 1], int(sizes[:count].sum())),
        Documents(tokens[border:], offsets[count:] - border, int(sizes[count:].sum())),
        info["unigram"],
        info["bigram"],
    )


class _Split:
    """Iterates over (document, whether it is for training); made once, which reads and checks every document."""

    def __init__(self, source: Source, held_out: float) -> None:
        self.source, self.held_out = source, held_out
        ends = np.cumsum([len(document.encode()) for document in source.documents()], dtype=np.int64)
        fitting = int((ends <= ends[-1] - int(ends[-1] * held_out)).sum())
        self.single = ends.size == 1
        self.training = min(max(fitting, 1), ends.size - 1)

    def __iter__(self) -> Iterator[tuple[str, bool]]:
        for i, document in enumerate(self.source.documents()):
            if self.single:
                data = document.encode()
                end = len(data) - int(len(data) * self.held_out)
                while end < len(data) and data[end] & 0xC0 == 0x80:  # inside a character
                    end -= 1
                yield data[:end].decode(), True
                yield data[end:].decode(), False
            else:
                yield document, i < self.training

    def batches(self) -> Iterator[tuple[list[str], bool]]:
        """Documents of one part together, up to about `_TOGETHER` characters."""
        documents: list[str] = []
        size, part = 0, True
        for document, training in self:
            if documents and (training != part or size + len(document) > _TOGETHER):
                yield documents, part
                documents, size = [], 0
            documents.append(document)
            size, part = size + len(document), training
        if documents:
            yield documents, part


def _write(path: Path, split: _Split, tokenizer: Tokenizer) -> None:
    counts = {True: ByteCounts(), False: ByteCounts()}
    training_documents = 0
    with write_tokens(path, token_dtype(tokenizer.vocab_size)) as writer:
        for documents, training in split.batches():
            raw = [document.encode() for document in documents]
            counts[training].add(raw)
            # A document of one token has nothing to predict.
            encoded = [
                (ids, len(data) - first)
                for data, (ids, first) in zip(raw, tokenizer.encode_documents(documents), strict=True)
                if ids.size > 1
            ]
            writer.add(encoded)
            training_documents += len(encoded) * training
        writer.info = {
            "training_documents": training_documents,
            "unigram": unigram_bits_per_byte(counts[True], counts[False]),
            "bigram": bigram_bits_per_byte(counts[True], counts[False]),
        }


def _hash(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
