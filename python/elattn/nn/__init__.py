"""Modules built on the operators: thin, scriptable, without arithmetic of their own that an operator should do."""

from elattn.nn.attention import ExactLinearAttention
from elattn.nn.feed_forward import SwiGLU
from elattn.nn.hyper_link import HyperLink
from elattn.nn.memory_lobe import MemoryLobe
from elattn.nn.moe import MoE, MoEReport
from elattn.nn.softmax_attention import SoftmaxAttention

__all__ = ["ExactLinearAttention", "HyperLink", "MemoryLobe", "MoE", "MoEReport", "SoftmaxAttention", "SwiGLU"]
