"""Text as tokens for training, and the simple byte models that a language model has to beat."""

from elattn.data.baselines import ByteCounts, bigram_bits_per_byte, unigram_bits_per_byte
from elattn.data.batches import Batch, Batches, Documents
from elattn.data.corpus import Corpus, load_corpus
from elattn.data.documents import Source
from elattn.data.tokenizer import (
    ByteTokenizer,
    SubwordTokenizer,
    Tokenizer,
    decode_stream,
    load_tokenizer,
    save_tokenizer,
    train_tokenizer,
)

__all__ = [
    "Batch",
    "Batches",
    "ByteCounts",
    "ByteTokenizer",
    "Corpus",
    "Documents",
    "Source",
    "SubwordTokenizer",
    "Tokenizer",
    "bigram_bits_per_byte",
    "decode_stream",
    "load_corpus",
    "load_tokenizer",
    "save_tokenizer",
    "train_tokenizer",
    "unigram_bits_per_byte",
]
