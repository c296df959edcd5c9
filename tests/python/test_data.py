"""Documents, tokenizers, the token cache, and batches in which no document sees another."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from elattn.data import (
    Batches,
    ByteCounts,
    ByteTokenizer,
    Corpus,
    Documents,
    Source,
    SubwordTokenizer,
    bigram_bits_per_byte,
    decode_stream,
    load_corpus,
    load_tokenizer,
    save_tokenizer,
    train_tokenizer,
    unigram_bits_per_byte,
)
from elattn.data import corpus as corpus_module
from elattn.data import tokenizer as tokenizer_module
from elattn.errors import UserError
from elattn.models import ELAConfig, ELATransformer

pytestmark = pytest.mark.usefixtures("one_thread")

TEXTS = ["the cat sat on the mat. ", "Größe: ☃ und 🙂.\n\n  tabs\tand\r\nlines\n", "the dog ran after the cat"]


@pytest.fixture(scope="module")
def tokenizer() -> SubwordTokenizer:
    return train_tokenizer(TEXTS * 20, 300)


def documents(lengths: list[int], vocab_size: int = 256) -> Documents:
    tokens = np.random.default_rng(0).integers(vocab_size, size=sum(lengths), dtype=np.uint8)
    return Documents(tokens, np.cumsum([0, *lengths]), sum(lengths) - len(lengths))


def jsonl(path: Path, texts: list[str], field: str = "text") -> Path:
    path.write_text("".join(json.dumps({"id": i, field: text}) + "\n" for i, text in enumerate(texts)))
    return path


def texts_of(part: Documents, corpus: Corpus) -> list[str]:
    bounds = zip(part.offsets[:-1], part.offsets[1:], strict=True)
    return [corpus.tokenizer.decode(part.tokens[a:b].tolist()) for a, b in bounds]


# Documents


def test_a_text_is_one_document_and_its_end_is_held_out(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("ä" * 500)
    corpus = load_corpus(tmp_path / "a.txt", held_out=0.1005)
    assert texts_of(corpus.train, corpus) == ["ä" * 450]  # not inside a character
    assert texts_of(corpus.held_out, corpus) == ["ä" * 50]


def test_a_folder_gives_its_text_files_in_order(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / ".git").mkdir()
    files = {"b.txt": "B", "a.md": "A", "sub/c.txt": "C", ".hidden": "no", ".git/x": "no", "blank.txt": " \n"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\r\n\0\xff\xff")
    jsonl(tmp_path / "d.jsonl", ["D", "", "E"])
    assert list(Source(tmp_path).documents()) == ["A", "B", "D", "E", "C"]


def test_json_lines_and_their_field(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", TEXTS, "content")
    assert list(Source(path, "content").documents()) == TEXTS


def test_the_last_documents_are_held_out(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [f"document {i}" for i in range(10)])
    corpus = load_corpus(path, held_out=0.3)
    assert texts_of(corpus.train, corpus) == [f"document {i}" for i in range(7)]
    assert texts_of(corpus.held_out, corpus) == [f"document {i}" for i in range(7, 10)]
    few = load_corpus(jsonl(tmp_path / "b.jsonl", ["long " * 100, "short"]), held_out=0.5)
    assert texts_of(few.train, few) == ["long " * 100] and texts_of(few.held_out, few) == ["short"]


def test_mistakes_name_the_file_and_the_line(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    cases = {
        "missing.txt": (None, "cannot read"),
        "latin.txt": (b"one\ntwo\xe4\n", "not UTF-8 text (line 2)"),
        "zeros.txt": (b"one\n\n\0", "zero bytes (line 3)"),
        "empty.txt": (b"", "is empty"),
        "blank.txt": (b" \n\t", "is empty"),
        "folder": (None, "no text files"),
        "json.jsonl": (b'{"text": "a"}\n{"text": \n', "line 2 is not JSON"),
        "latin.jsonl": (b'{"text": "a"}\n\n{"text": "\xe4"}\n', "not UTF-8 text (line 3)"),
        "field.jsonl": (b'{"text": "a"}\n{"title": "b", "body": "c"}\n', "no field 'text' (it has: title, body)"),
        "list.jsonl": (b'["a"]\n', "line 1 has no field 'text' (it has: list)"),
        "number.jsonl": (b'{"text": 1}\n', "line 1: the field 'text' must be text (got 1)"),
        "half.jsonl": (b'{"text": "\\ud800"}\n', "line 1: the field 'text' holds half a surrogate pair"),
        "blank.jsonl": (b'{"text": " "}\n', "is empty"),
    }
    for name, (content, message) in cases.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError) as error:
            load_corpus(tmp_path / name, cache=tmp_path / "cache")
        assert message in str(error.value) and name in str(error.value), (name, str(error.value))
    assert not (tmp_path / "cache").exists()
    (tmp_path / "folder" / "bad.md").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"bad\.md is not UTF-8 text \(line 1\)"):
        load_corpus(tmp_path / "folder")


# Tokenizers


@pytest.mark.parametrize("text", [*TEXTS, "", "never seen: Ελλάδα \x7f"])
def test_tokenizers_round_trip(text: str, tokenizer: SubwordTokenizer) -> None:
    for one in (ByteTokenizer(), tokenizer):
        ids = one.encode(text)
        assert one.decode(ids) == text
        assert all(0 <= i < one.vocab_size for i in ids)
        assert "".join(decode_stream(one, ids)) == text
        assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in decode_stream(one, ids))


def test_a_stream_of_arbitrary_tokens_gives_the_text_of_all_of_them(tokenizer: SubwordTokenizer) -> None:
    for one in (ByteTokenizer(), tokenizer):
        for _ in range(20):
            ids = torch.randint(one.vocab_size, (60,)).tolist()
            assert "".join(decode_stream(one, ids)) == one.decode(ids)


def test_a_trained_tokenizer_compresses_and_is_read_back(tokenizer: SubwordTokenizer, tmp_path: Path) -> None:
    assert 257 < tokenizer.vocab_size <= 300 and tokenizer.eos_id == 0
    assert len(tokenizer.encode(TEXTS[0])) < len(TEXTS[0]) / 2
    save_tokenizer(tokenizer, tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.digest == tokenizer.digest and again.encode(TEXTS[1]) == tokenizer.encode(TEXTS[1])
    assert isinstance(load_tokenizer(tmp_path.parent), ByteTokenizer), "a folder without tokenizer.json"


def test_long_texts_are_encoded_in_pieces_with_the_same_tokens(
    tokenizer: SubwordTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "".join(TEXTS) * 10
    whole = tokenizer.encode(text)
    monkeypatch.setattr(tokenizer_module, "_PIECE", 50)
    assert len(tokenizer._pieces(text)) > 5
    assert tokenizer.encode(text) == whole


def test_bad_tokenizers(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{}")
    (tmp_path / "b.json").write_bytes(b"\xff")
    for name in ("a.json", "b.json", "missing.json"):
        with pytest.raises(UserError, match=name):
            load_tokenizer(tmp_path / name)
    with pytest.raises(UserError, match=r"more than the 256 bytes \(got 256\)"):
        train_tokenizer(TEXTS, 256)


def test_subword_documents_end_with_the_end_token_and_count_bytes(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [*TEXTS * 20, "☃ held out"])
    corpus = load_corpus(path, held_out=0.001, vocab_size=300)
    assert all(corpus.train.tokens[corpus.train.offsets[1:] - 1] == corpus.tokenizer.eos_id)
    assert texts_of(corpus.train, corpus) == TEXTS * 20
    assert corpus.train.tokens.dtype == np.uint16
    first = corpus.tokenizer.decode(corpus.held_out.tokens[:1].tolist())
    expected = len("☃ held out".encode()) - (3 if "\N{REPLACEMENT CHARACTER}" in first else len(first.encode()))
    assert corpus.held_out.predicted_bytes == expected


# The cache


def equal(a: Corpus, b: Corpus) -> bool:
    parts = ((a.train, b.train), (a.held_out, b.held_out))
    same = all(
        np.array_equal(x.tokens, y.tokens)
        and np.array_equal(x.offsets, y.offsets)
        and x.predicted_bytes == y.predicted_bytes
        for x, y in parts
    )
    return same and (a.unigram, a.bigram) == (b.unigram, b.bigram)


def test_the_cache_is_used_again_and_rebuilt_when_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, cache = jsonl(tmp_path / "a.jsonl", TEXTS * 10), tmp_path / "cache"
    first = load_corpus(path, vocab_size=300, cache=cache)
    assert isinstance(first.train.tokens.base, np.memmap) or isinstance(first.train.tokens, np.memmap)
    (file,) = cache.glob("*.bin")
    written = file.read_bytes()

    def refuse(*_: object) -> None:
        raise AssertionError("the documents were read again")

    with monkeypatch.context() as patch:
        patch.setattr(corpus_module, "_Split", refuse)
        assert equal(load_corpus(path, vocab_size=300, cache=cache), first)
    for damaged in (b"", written[:-1], written[: len(written) // 2], written[8:], written + b"x", b"garbage" * 100):
        file.unlink()
        file.write_bytes(damaged)
        assert equal(load_corpus(path, vocab_size=300, cache=cache), first)
        assert file.read_bytes() == written
    assert len(list(cache.iterdir())) == 2, "tokens and tokenizer"


def test_the_cache_depends_on_content_split_and_tokenizer(tmp_path: Path) -> None:
    path, cache = jsonl(tmp_path / "a.jsonl", TEXTS * 10), tmp_path / "cache"
    for held_out in (0.1, 0.2):
        load_corpus(path, cache=cache, held_out=held_out)
    for vocab_size in (280, 300):
        load_corpus(path, cache=cache, vocab_size=vocab_size)
    jsonl(path, TEXTS * 11)
    load_corpus(path, cache=cache)
    assert len(list(cache.glob("*.bin"))) == 5


def test_a_failed_tokenisation_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, cache = jsonl(tmp_path / "a.jsonl", TEXTS), tmp_path / "cache"
    monkeypatch.setattr(ByteTokenizer, "encode_documents", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        load_corpus(path, cache=cache)
    assert not list(cache.iterdir())


# Byte models


def test_byte_models_count_inside_documents() -> None:
    train, held_out = ByteCounts([b"abab", b"ba"]), ByteCounts([b"ab", b"", b"a"])
    assert train.bytes[ord("a")] == 3 == train.bytes[ord("b")]
    assert train.pairs[ord("a"), ord("b")] == 2 and train.pairs[ord("b"), ord("a")] == 2
    assert train.pairs[ord("b"), ord("b")] == 0, "a pair across a border"
    unigram = -np.log2(4 / 262)
    assert unigram_bits_per_byte(train, held_out) == pytest.approx(unigram)
    assert bigram_bits_per_byte(train, held_out) == pytest.approx(-np.log2((2 + 4 / 262) / 3))


# Batches


def test_a_single_document_gives_plain_rows() -> None:
    data = documents([1000])
    batch = Batches(data, 3, 20)[5]
    assert batch.ids.shape == batch.targets.shape == (3, 20) and batch.cu_seqlens is None and batch.count == 60
    assert torch.equal(batch.ids[:, 1:], batch.targets[:, :-1])


def test_packed_rows_follow_the_documents() -> None:
    data = documents([7, 2, 40, 3, 3, 3, 90, 5])
    context, batches = 12, Batches(data, 4, 12)
    starts_of = set(data.offsets.tolist())
    for step in range(30):
        starts, batch = batches.starts(step), batches[step]
        assert batch.ids.shape == batch.targets.shape == (1, 4 * context)
        assert batch.count == int((batch.targets != -100).sum()) == data.count_targets(starts, context)
        ends = set(batch.cu_seqlens.tolist())
        for row, start in enumerate(starts.tolist()):
            for column in range(context):
                position, place = start + column, row * context + column
                assert batch.ids[0, place] == data.tokens[position]
                last = position + 1 in starts_of
                assert batch.targets[0, place] == (-100 if last else data.tokens[position + 1])
                assert (place in ends) == (column == 0 or position in starts_of)


def test_cu_seqlens_has_one_length_and_ends_with_empty_sequences() -> None:
    data = documents([3] * 50 + [200])
    batches = Batches(data, 4, 34)
    found = [batches[step].cu_seqlens for step in range(40)]
    assert len({x.numel() for x in found}) == 1 and found[0].dtype == torch.int32
    assert all(x[0] == 0 and x[-1] == 4 * 34 and (x.diff() >= 0).all() for x in found)
    assert any((x.diff() == 0).any() for x in found)
    worst = data.windows(np.full(4, 2), 34, 4 * (1 + data.most_starts(34)))  # a start at the window's second token
    assert (worst.cu_seqlens.diff() > 0).all(), "no longer than needed"


def test_a_batch_depends_on_seed_and_step_alone() -> None:
    data = documents([50, 60, 70])
    a, b = Batches(data, 4, 16, seed=1), Batches(data, 4, 16, seed=1)
    b[0], b[1]
    assert torch.equal(a[7].ids, b[7].ids) and torch.equal(a[7].cu_seqlens, b[7].cu_seqlens)
    assert not torch.equal(a[7].ids, a[8].ids)
    assert not torch.equal(a[7].ids, Batches(data, 4, 16, seed=2)[7].ids)


def test_windows_beyond_the_end_are_filled_without_targets() -> None:
    data = documents([10, 13])
    batch = data.windows(np.arange(0, 22, 8), 8)
    assert batch.count == data.predicted_tokens == 21
    assert (batch.ids[0, 23:] == 0).all() and (batch.targets[0, 22:] == -100).all()


@pytest.mark.parametrize(
    "options",
    [{"decay": "token", "short_conv": 4, "gate": True}, {"rotary": True, "full_attention_every": 2}],
    ids=["linear", "hybrid"],
)
def test_documents_do_not_see_each_other(options: dict[str, object]) -> None:
    """A token of document A changes no logit of document B, in the same row or in another."""
    config = ELAConfig(vocab_size=32, d_model=16, num_layers=2, num_heads=2, d_hidden=16, **options)  # type: ignore[arg-type]
    model = ELATransformer(config)
    data = documents([11, 9, 14, 30], 32)
    starts = np.array([3, 5, 20])
    batch = data.windows(starts, 24, 20)
    for place in (0, 9, 30, 47, 60):
        changed = batch.ids.clone()
        changed[0, place] = (changed[0, place] + 1) % 32
        with torch.no_grad():
            differs = (model(batch.ids, batch.cu_seqlens) != model(changed, batch.cu_seqlens)).any(-1)[0]
        begin = int(batch.cu_seqlens[batch.cu_seqlens <= place].max())
        end = int(batch.cu_seqlens[batch.cu_seqlens > place].min())
        assert differs[place], "the test would see a change"
        assert not differs[:place].any() and not differs[end:].any(), (place, begin, end)


def test_texts_shorter_than_a_window_are_refused() -> None:
    with pytest.raises(UserError, match="10 tokens to train on, but one window needs 11"):
        Batches(documents([10]), 1, 10)
