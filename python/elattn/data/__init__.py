"""Text as bytes, and the simple byte models that a language model has to beat."""

from elattn.data.baselines import bigram_bits_per_byte, unigram_bits_per_byte
from elattn.data.text import ByteBatches, load_text, split_text

__all__ = ["ByteBatches", "bigram_bits_per_byte", "load_text", "split_text", "unigram_bits_per_byte"]
