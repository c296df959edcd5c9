"""Checks for models of your own, and the slow reference that the operators are tested against."""

from elattn.testing.checks import assert_causal, assert_mixes_tokens, assert_padding_invariant, check_kernel
from elattn.testing.reference import gauge_free, reference_attention

__all__ = [
    "assert_causal",
    "assert_mixes_tokens",
    "assert_padding_invariant",
    "check_kernel",
    "gauge_free",
    "reference_attention",
]
