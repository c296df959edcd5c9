"""Modules built on the operators: thin, scriptable, without arithmetic of their own that an operator should do."""

from elattn.nn.attention import ExactLinearAttention

__all__ = ["ExactLinearAttention"]
