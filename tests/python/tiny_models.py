"""Small language models for the tests, one for each option that changes what a model computes."""

from typing import Any

import torch
from torch import Tensor

from elattn.models import ELAConfig, ELATransformer

VOCAB = 23

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sum_sq": {"kernel": "sum_sq"},
    "elu-token-decay-conv": {"kernel": "elu", "decay": "token", "short_conv": 3},
    "gqa-rotary-untied": {"num_kv_heads": 2, "rotary": True, "final_norm": True, "tie_embeddings": False},
    "decay-conv-gate": {"decay": "channel", "short_conv": 4, "gate": True, "final_norm": True},
    "softmax": {"attention": "softmax", "rotary": True, "max_seq_len": 40},
    "softmax-conv-gate-gqa": {"attention": "softmax", "short_conv": 4, "gate": True, "num_kv_heads": 1},
    "hybrid": {
        "full_attention_every": 2,
        "decay": "channel",
        "short_conv": 3,
        "gate": True,
        "rotary": True,
        "max_seq_len": 40,
    },
    "sum": {"hyper_link": "sum"},
    "dense": {"hyper_link": "dense", "final_norm": True},
    "gated-experts": {"hyper_link": "gated", "num_experts": 3, "memory_lobe": "depth"},
    "experts-outer": {"num_experts": 4, "moe_bias": "outer"},
    "experts-inner-untied": {"num_experts": 3, "top_k": 1, "moe_bias": "inner", "tie_labels": False},
    "lobe-depth": {"hyper_link": "sum", "memory_lobe": "depth", "kernel": "directional"},
    "lobe-causal": {"hyper_link": "gated", "memory_lobe": "causal", "decay": "head"},
    "lobe-residual-hybrid": {"memory_lobe": "causal", "full_attention_every": 2, "num_experts": 2, "top_k": 2},
}


def config(**options: Any) -> ELAConfig:
    sizes = {"vocab_size": VOCAB, "d_model": 32, "num_layers": 2, "num_heads": 4, "d_hidden": 24}
    return ELAConfig(**(sizes | options))


def model(dtype: torch.dtype = torch.float64, **options: Any) -> ELATransformer:
    """Weights larger than at the start of training, so that every part counts."""
    net = ELATransformer(config(**options)).to(dtype).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return net


def some_ids(batch: int = 2, length: int = 9) -> Tensor:
    return torch.randint(VOCAB, (batch, length))


def close(actual: Tensor, expected: Tensor) -> None:
    """For float64: what differs by rounding only differs by 1e-12."""
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-9)
