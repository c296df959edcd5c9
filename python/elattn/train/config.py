"""How to train."""

from dataclasses import dataclass

__all__ = ["TrainConfig"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train.

    Attributes:
        data: path of a text, a folder or JSON-lines (`elattn.data.Source`), None for Python's documentation topics.
        field: name of the text in JSON-lines.
        tokenizer: path of a tokenizer.json.
        vocab_size: size of a byte-level BPE to train, if no tokenizer is given; with neither, tokens are bytes.
        held_out: share of the text, its end or its last documents, that only validation sees.
        steps: number of updates.
        batch_size: windows of a process in one forward pass.
        accumulate: forward passes per update.
        context: tokens per window.
        learning_rate, warmup: the peak, reached after `warmup` steps, from where a cosine falls to a tenth.
        weight_decay: of the matrices; norms, embeddings, convolutions and forgetting rates have none.
        clip: largest norm of the gradient.
        eval_every: steps between validations; each also writes checkpoints.
        seed: of the initial weights and the batches.
        precision: "float32", or "bfloat16": autocast, with weights and optimizer in float32.
        compile: run the model through `torch.compile`.
        device: "cpu" or "cuda"; None for CUDA where the library has operators for it.

    Raises:
        ValueError: a field breaks a rule; the message has the rule and the value met.
    """

    data: str | None = None
    field: str = "text"
    tokenizer: str | None = None
    vocab_size: int | None = None
    held_out: float = 0.1
    steps: int = 1000
    batch_size: int = 16
    accumulate: int = 1
    context: int = 256
    learning_rate: float = 3e-3
    warmup: int = 50
    weight_decay: float = 0.1
    clip: float = 1.0
    eval_every: int = 100
    seed: int = 0
    precision: str = "float32"
    compile: bool = False
    device: str | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "learning_rate", "clip", "eval_every"):
            if not getattr(self, name) > 0:
                raise ValueError(f"TrainConfig: {name} must be positive (got {getattr(self, name)})")
        for name in ("warmup", "weight_decay", "seed"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"TrainConfig: {name} must not be negative (got {getattr(self, name)})")
        if self.context < 2:
            raise ValueError(f"TrainConfig: context must be at least 2 (got {self.context})")
        if not 0 < self.held_out < 1:
            raise ValueError(f"TrainConfig: held_out must lie between 0 and 1 (got {self.held_out})")
        if self.precision not in ("float32", "bfloat16"):
            raise ValueError(f"TrainConfig: precision must be float32 or bfloat16 (got {self.precision!r})")
        if self.device not in (None, "cpu", "cuda"):
            raise ValueError(f"TrainConfig: device must be cpu or cuda (got {self.device!r})")
        if self.tokenizer is not None and self.vocab_size is not None:
            raise ValueError(
                f"TrainConfig: vocab_size is for a tokenizer to train, not for a given one (got {self.vocab_size})"
            )
