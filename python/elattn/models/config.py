"""What an ELATransformer is made of."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any

from elattn.ops import kernels

__all__ = ["ELAConfig"]

_CHOICES = {
    "decay": ("none", "head", "channel", "token"),
    "attention": ("linear", "softmax"),
    "hyper_link": ("residual", "sum", "dense", "gated"),
    "memory_lobe": (None, "depth", "causal"),
    "moe_bias": ("none", "inner", "outer"),
}
# The setting of arXiv 2605.18848.
_PAPER: dict[str, Any] = {
    "vocab_size": 6400,
    "d_model": 256,
    "num_layers": 4,
    "num_heads": 4,
    "d_hidden": 256,
    "num_experts": 4,
    "top_k": 2,
    "moe_bias": "outer",
    "rotary": True,
}


@dataclass(frozen=True, kw_only=True)
class ELAConfig:
    """Sizes and options of `ELATransformer`; checked when made, read and written as JSON.

    Attributes:
        vocab_size: number of token ids.
        d_model: width of the representation, a multiple of num_heads.
        num_layers: number of layers.
        num_heads: query heads.
        num_kv_heads: key and value heads, a divisor of num_heads; None for num_heads.
        d_hidden: width of the gated feed-forward network, or of each expert.
        num_experts: experts of a layer; 1 for one feed-forward network without a router.
        top_k: experts that a token goes to.
        moe_bias, tie_labels: options of `elattn.nn.MoE`.
        kernel, decay: options of `elattn.nn.ExactLinearAttention`. Softmax layers have neither.
        rotary, short_conv, gate: options of both kinds of attention.
        attention: "linear", or "softmax" for `elattn.nn.SoftmaxAttention` in every layer.
        full_attention_every: n > 0 makes layer i (from 0) softmax where (i + 1) % n == 0, in a linear stack.
        hyper_link: "residual" for the ordinary block with a norm and a residual before and after the feed-forward
            network; the other modes of `elattn.nn.HyperLink` have one norm and one contribution per layer.
        memory_lobe: scope of an `elattn.nn.MemoryLobe` in every layer, None for none. Its kernel is `kernel`.
        aux_coef: weight of the experts' load-balance loss in `ELATransformer.loss`.
        final_norm: a norm before the output layer.
        tie_embeddings: the output layer is the transposed embedding.
        max_seq_len: most tokens that a softmax layer takes; longer sequences are an error. None: `forward` takes any
            length, and `new_state` asks for a capacity. Linear layers have no limit.

    Raises:
        ValueError: a field breaks a rule; the message has the rule and the value met.
    """

    vocab_size: int
    d_model: int
    num_layers: int
    num_heads: int
    num_kv_heads: int | None = None
    d_hidden: int
    num_experts: int = 1
    top_k: int = 2
    moe_bias: str = "none"
    tie_labels: bool = True
    kernel: str = "hadamard_exp"
    rotary: bool = False
    decay: str = "none"
    short_conv: int = 0
    gate: bool = False
    attention: str = "linear"
    full_attention_every: int = 0
    hyper_link: str = "residual"
    memory_lobe: str | None = None
    aux_coef: float = 0.01
    final_norm: bool = False
    tie_embeddings: bool = True
    max_seq_len: int | None = None

    @classmethod
    def paper(cls, **overrides: Any) -> "ELAConfig":
        """The setting of arXiv 2605.18848: 5,838,864 parameters.

        A memory lobe belongs to the paper's links: with one, hyper_link is "sum" unless it is given.
        """
        if overrides.get("memory_lobe") is not None:
            overrides = {"hyper_link": "sum"} | overrides
        return cls(**(_PAPER | overrides))

    @classmethod
    def recommended(cls, **overrides: Any) -> "ELAConfig":
        """What trains best at equal size: the kernel with a sense of distance, a convolution and a gate."""
        options: dict[str, Any] = {
            "vocab_size": 6400,
            "d_model": 256,
            "num_layers": 4,
            "num_heads": 4,
            "d_hidden": 512,
            "decay": "token",
            "short_conv": 4,
            "gate": True,
            "hyper_link": "residual",
            "final_norm": True,
        }
        return cls(**(options | overrides))

    def __post_init__(self) -> None:
        if type(self.aux_coef) is int:
            object.__setattr__(self, "aux_coef", float(self.aux_coef))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            expected: Any = field.type
            # bool is an int to isinstance, but a width of True is a mistake.
            if not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool):
                name = getattr(expected, "__name__", str(expected))
                raise ValueError(f"ELAConfig: {field.name} must be of type {name} (got {value!r})")
        for name in ("vocab_size", "d_model", "num_layers", "num_heads", "d_hidden", "num_experts"):
            self._require(getattr(self, name) > 0, f"{name} must be positive", getattr(self, name))
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            self._require(value in choices, f"{name} must be one of {', '.join(map(str, choices))}", value)
        self._require(
            self.d_model % self.num_heads == 0,
            f"d_model must be a multiple of num_heads = {self.num_heads}",
            self.d_model,
        )
        if self.num_kv_heads is not None:
            self._require(
                self.num_kv_heads > 0 and self.num_heads % self.num_kv_heads == 0,
                f"num_kv_heads must be a divisor of num_heads = {self.num_heads}",
                self.num_kv_heads,
            )
        self._require(
            self.num_experts == 1 or 1 <= self.top_k <= self.num_experts,
            f"top_k must be 1..num_experts = {self.num_experts}",
            self.top_k,
        )
        self._require(
            self.num_experts > 1 or self.moe_bias == "none",
            'moe_bias needs num_experts of at least 2, or must be "none"',
            self.moe_bias,
        )
        self._require(
            self.tie_labels or self.moe_bias != "none",
            'tie_labels = False needs moe_bias "inner" or "outer"',
            self.moe_bias,
        )
        self._require(self.kernel in kernels(), f"kernel must be one of {', '.join(kernels())}", self.kernel)
        self._require(
            self.decay != "channel" or self.kernel == "hadamard_exp",
            'decay = "channel" needs kernel = "hadamard_exp"',
            self.kernel,
        )
        self._require(
            self.short_conv == 0 or self.short_conv >= 2, "short_conv must be 0 or at least 2", self.short_conv
        )
        self._require(
            not self.rotary or self.d_model // self.num_heads % 2 == 0,
            "rotary needs an even d_model / num_heads",
            self.d_model // self.num_heads,
        )
        self._require(
            0 <= self.full_attention_every <= self.num_layers,
            f"full_attention_every must be 0..num_layers = {self.num_layers}",
            self.full_attention_every,
        )
        if self.attention == "softmax":
            self._require(
                self.full_attention_every == 0,
                'full_attention_every is for attention = "linear"; with attention = "softmax" it must be 0',
                self.full_attention_every,
            )
            self._require(
                self.decay == "none",
                'decay is for linear attention; with attention = "softmax" it must be none',
                self.decay,
            )
        self._require(self.aux_coef >= 0, "aux_coef must not be negative", self.aux_coef)
        self._require(
            self.max_seq_len is None or self.max_seq_len > 0, "max_seq_len must be positive or None", self.max_seq_len
        )

    @staticmethod
    def _require(condition: bool, rule: str, value: object) -> None:
        if not condition:
            raise ValueError(f"ELAConfig: {rule} (got {value!r})")

    def is_softmax(self, layer: int) -> bool:
        """Whether a layer, counted from 0, has softmax attention."""
        every = self.full_attention_every
        return self.attention == "softmax" or (every > 0 and (layer + 1) % every == 0)

    def require_vocabulary(self, size: int) -> None:
        """Raises ValueError unless the model has an id for each of the `size` tokens of a tokenizer or text."""
        self._require(
            self.vocab_size >= size, f"vocab_size must be at least that of the tokenizer, {size}", self.vocab_size
        )

    def to_json(self) -> str:
        """The fields as a JSON object."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> "ELAConfig":
        """The inverse of `to_json`. A missing key has its default, an unknown one is an error (ValueError)."""
        try:
            fields = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"ELAConfig: not JSON ({error})") from None
        if not isinstance(fields, dict):
            raise ValueError(f"ELAConfig: JSON must hold an object (got {type(fields).__name__})")
        known = {field.name: field for field in dataclasses.fields(cls)}
        if unknown := sorted(set(fields) - set(known)):
            raise ValueError(f"ELAConfig: unknown key {unknown[0]!r}; the keys are {', '.join(known)}")
        missing = [n for n, field in known.items() if field.default is dataclasses.MISSING and n not in fields]
        if missing:
            raise ValueError(f"ELAConfig: missing key {missing[0]!r}")
        return cls(**fields)

    def hash(self) -> str:
        """SHA-256 of the canonical JSON: keys sorted, no spaces, fields that have their default left out.

        So a field that a later version adds does not change the hash of a model without it.
        """
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if getattr(self, f.name) != f.default}
        return hashlib.sha256(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
