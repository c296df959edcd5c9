"""The models that are compared: each a name, what it is, and the fields of `ELAConfig` that make it."""

import functools
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.paper.presets import Recall, Text
from elattn.models import ELAConfig, ELATransformer

Options = dict[str, Any]

TOLERANCE = 0.02  # of the parameters, between forms of equal size
KERNELS = ("hadamard_exp", "sum_sq", "sub_sq", "directional", "elu")

EXPERTS: Options = {"num_experts": 4, "top_k": 2}
BIAS: Options = {"moe_bias": "outer"}
NORM: Options = {"final_norm": True}
PAPER: Options = {"rotary": True}
SOFTMAX: Options = {"attention": "softmax", "rotary": True}
CHOSEN = ("kernel", "rotary", "decay", "short_conv", "gate", "hyper_link", "final_norm")
RECOMMENDED: Options = {name: getattr(ELAConfig.recommended(), name) for name in CHOSEN}
CONV: Options = {"short_conv": RECOMMENDED["short_conv"]}
FAIR_SOFTMAX = SOFTMAX | CONV | {"gate": RECOMMENDED["gate"]}
OTHER_ROTARY: Options = {"rotary": not RECOMMENDED["rotary"]}
ROTARY_TITLE = "without rotary" if RECOMMENDED["rotary"] else "with rotary"
# Channels of the other kernels cannot be separated, so they forget by head.
BY_HEAD: Options = {"decay": "token" if RECOMMENDED["decay"] == "token" else "head"}


@dataclass(frozen=True)
class Form:
    """A model of a comparison.

    Attributes:
        name: of its files.
        group: the table it is a row of.
        title: that row.
        options: fields of ELAConfig, beside the sizes.
        experts: the feed-forward network is the paper's mixture of experts.
        equal: d_hidden makes the parameters those of softmax with rotary. Else it is the width of the two experts that
            a token goes to in the mixture of equal parameters, in one dense network.
    """

    name: str
    group: str
    title: str
    options: Options
    experts: bool = False
    equal: bool = True


def _form(name: str, group: str, title: str, options: Options, experts: bool = False, equal: bool = True) -> Form:
    return Form(name, group, title, NORM | options, experts, equal)


TRAIN = [
    Form("fa-gpt", "train", "FA-GPT: softmax, rotary", SOFTMAX | BIAS, experts=True),
    Form("ela-gpt", "train", "ELA-GPT: hadamard_exp, rotary", PAPER | BIAS, experts=True),
    _form("fair-fa-gpt", "train", "softmax, rotary, convolution, gate, final norm", FAIR_SOFTMAX | BIAS, experts=True),
    _form("recommended", "train", "recommended, pure", RECOMMENDED | BIAS, experts=True),
    _form("hybrid", "train", "recommended, hybrid 3:1", RECOMMENDED | BIAS | {"full_attention_every": 4}, experts=True),
]

ABLATE = [
    *(
        _form(name, "attention", title, options)
        for name, title, options in (
            ("softmax", "softmax, rotary", SOFTMAX),
            ("softmax-conv", "softmax, rotary, convolution", SOFTMAX | CONV),
            ("softmax-conv-gate", "softmax, rotary, convolution, gate", FAIR_SOFTMAX),
            ("bare-rotary", "hadamard_exp, rotary: the paper's", PAPER),
            ("bare", "hadamard_exp", {}),
            ("conv", "hadamard_exp, convolution", CONV),
            ("recommended", "recommended", RECOMMENDED),
            *(
                (f"decay-{decay}", f"recommended, decay {decay}", RECOMMENDED | {"decay": decay})
                for decay in ("none", "head", "channel", "token")
                if decay != RECOMMENDED["decay"]
            ),
            ("no-conv", "recommended, no convolution", RECOMMENDED | {"short_conv": 0}),
            ("no-gate", "recommended, no gate", RECOMMENDED | {"gate": False}),
            ("no-norm", "recommended, no final norm", RECOMMENDED | {"final_norm": False}),
            ("rotary", f"recommended, {ROTARY_TITLE}", RECOMMENDED | OTHER_ROTARY),
            ("hybrid", "hybrid 3:1", RECOMMENDED | {"full_attention_every": 4}),
            ("hybrid-rotary", f"hybrid 3:1, {ROTARY_TITLE}", RECOMMENDED | {"full_attention_every": 4} | OTHER_ROTARY),
        )
    ),
    *(_form(f"bare-{kernel}", "kernel", f"{kernel}, rotary", PAPER | {"kernel": kernel}) for kernel in KERNELS[1:]),
    *(
        _form(
            f"kernel-{kernel}",
            "kernel",
            f"recommended, {kernel}, decay {BY_HEAD['decay']}",
            RECOMMENDED | BY_HEAD | {"kernel": kernel},
        )
        for kernel in KERNELS
        if kernel != RECOMMENDED["kernel"]
    ),
    *(
        _form(f"link-{mode}", "link", f"Hyper-Link {mode}", RECOMMENDED | {"hyper_link": mode})
        for mode in ("residual", "sum", "dense", "gated")
        if mode != RECOMMENDED["hyper_link"]
    ),
    *(
        _form(
            f"lobe-{scope}", "lobe", f"lobe of scope {scope}", RECOMMENDED | {"hyper_link": "sum", "memory_lobe": scope}
        )
        for scope in ("depth", "causal")
    ),
    *(
        _form(f"moe-{bias}", "moe", f"experts, bias {bias}", RECOMMENDED | {"moe_bias": bias}, experts=True)
        for bias in ("none", "inner", "outer")
    ),
    _form("moe-active", "moe", "dense, as wide as the experts of a token", RECOMMENDED, equal=False),
]

RECALL = [
    _form("softmax", "recall", "softmax, rotary", SOFTMAX),
    _form("softmax-conv-gate", "recall", "softmax, rotary, convolution, gate", FAIR_SOFTMAX),
    _form("bare-rotary", "recall", "hadamard_exp, rotary: the paper's", PAPER),
    *(_form(f"conv-{kernel}", "recall", f"{kernel}, convolution", CONV | {"kernel": kernel}) for kernel in KERNELS),
    _form("recommended", "recall", "recommended, pure", RECOMMENDED),
    _form("hybrid", "recall", "recommended, hybrid 1:1", RECOMMENDED | {"full_attention_every": 2}),
]


def config(form: Form, sizes: Text | Recall, vocab_size: int) -> ELAConfig:
    """The model of `form`.

    Raises:
        ValueError: no d_hidden brings the parameters within 2% of those of softmax.
    """

    def make(options: Options, d_hidden: int) -> ELAConfig:
        return ELAConfig(
            vocab_size=vocab_size,
            d_model=sizes.d_model,
            num_layers=sizes.num_layers,
            num_heads=sizes.num_heads,
            d_hidden=d_hidden,
            **options,
        )

    options = form.options
    if form.experts or not form.equal:
        options = options | EXPERTS
    goal = count_parameters(make(SOFTMAX, sizes.d_hidden))
    # The count is linear in d_hidden. Small steps, because four experts multiply them.
    least = count_parameters(make(options, 2))
    each = count_parameters(make(options, 4)) - least
    d_hidden = max(2, 2 + 2 * round((goal - least) / each))
    found = count_parameters(make(options, d_hidden))
    if abs(found / goal - 1) > TOLERANCE:
        raise ValueError(f"{form.name}: {found:,} parameters are not within 2% of the {goal:,} of softmax")
    return make(options, d_hidden) if form.equal else make(form.options, 2 * d_hidden)


@functools.cache
def count_parameters(model_config: ELAConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in ELATransformer(model_config).parameters())
