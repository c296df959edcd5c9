"""What an ELATransformer is made of."""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from elattn.ops import kernels

__all__ = ["ELAConfig"]


@dataclass(frozen=True, kw_only=True)
class ELAConfig:
    """Sizes and options of `ELATransformer`; checked when made, read and written as JSON.

    Attributes:
        vocab_size: number of token ids.
        d_model: width of the residual stream, a multiple of num_heads.
        num_layers: number of blocks.
        num_heads: query heads.
        num_kv_heads: key and value heads, a divisor of num_heads; None for num_heads.
        d_hidden: width of the gated feed-forward network.
        kernel, rotary, decay, short_conv, gate: options of `elattn.nn.ExactLinearAttention`.
        final_norm: a norm before the output layer.
        tie_embeddings: the output layer is the transposed embedding.

    Raises:
        ValueError: a field breaks a rule; the message has the rule and the value met.
    """

    vocab_size: int
    d_model: int
    num_layers: int
    num_heads: int
    num_kv_heads: int | None = None
    d_hidden: int
    kernel: str = "hadamard_exp"
    rotary: bool = False
    decay: str = "none"
    short_conv: int = 0
    gate: bool = False
    final_norm: bool = False
    tie_embeddings: bool = True

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            expected: Any = field.type
            # bool is an int to isinstance, but a width of True is a mistake.
            if not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool):
                name = getattr(expected, "__name__", str(expected))
                raise ValueError(f"ELAConfig: {field.name} must be of type {name} (got {value!r})")
        for name in ("vocab_size", "d_model", "num_layers", "num_heads", "d_hidden"):
            self._require(getattr(self, name) > 0, f"{name} must be positive", getattr(self, name))
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
        self._require(self.kernel in kernels(), f"kernel must be one of {', '.join(kernels())}", self.kernel)
        self._require(
            self.decay in ("none", "head", "channel", "token"),
            "decay must be one of none, head, channel, token",
            self.decay,
        )
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

    @staticmethod
    def _require(condition: bool, rule: str, value: object) -> None:
        if not condition:
            raise ValueError(f"ELAConfig: {rule} (got {value!r})")

    def to_json(self) -> str:
        """The fields as a JSON object."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> "ELAConfig":
        """The inverse of `to_json`. Raises ValueError for text that is no such object, or has an unknown key."""
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
