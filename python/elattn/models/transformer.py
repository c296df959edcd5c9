"""A language model whose only mixing of tokens is exact linear attention (docs/modules.md)."""

from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elattn._files import write_file
from elattn.models.config import ELAConfig
from elattn.nn import ExactLinearAttention

__all__ = ["ELATransformer"]


class SwiGLU(nn.Module):
    """W_down (silu(W_gate x) * W_up x)."""

    def __init__(self, d_model: int, d_hidden: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(d_model, 2 * d_hidden, bias=False)
        self.down = nn.Linear(d_hidden, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(self, config: ELAConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.d_model)
        self.attention = ExactLinearAttention(
            config.d_model,
            config.num_heads,
            num_kv_heads=config.num_kv_heads,
            kernel=config.kernel,
            is_causal=True,
            rotary=config.rotary,
            decay=config.decay,
            short_conv=config.short_conv,
            gate=config.gate,
        )
        self.ffn_norm = nn.RMSNorm(config.d_model)
        self.ffn = SwiGLU(config.d_model, config.d_hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.ffn(self.ffn_norm(x))

    @torch.jit.export
    def prefill(self, x: Tensor, state: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        y, state = self.attention.prefill(self.attention_norm(x), state)
        x = x + y
        return x + self.ffn(self.ffn_norm(x)), state

    @torch.jit.export
    def step(self, x: Tensor, state: list[Tensor]) -> Tensor:
        x = x + self.attention.step(self.attention_norm(x), state)
        return x + self.ffn(self.ffn_norm(x))


class ELATransformer(nn.Module):
    """Embedding, blocks of causal exact linear attention and gated feed-forward networks, output layer.

    `torch.jit.script(model)` has `forward`, `new_state`, `prefill` and `step`, which is all that generation in C++
    needs. The state is a flat list of tensors, three a layer, whose size does not depend on the number of tokens.
    """

    def __init__(self, config: ELAConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList([Block(config) for _ in range(config.num_layers)])
        self.final_norm = nn.RMSNorm(config.d_model) if config.final_norm else None
        self.output = None if config.tie_embeddings else nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.apply(_initialise)
        # Each block adds two terms to the stream; smaller ones keep its variance near 1 at the start.
        for layer in self.layers:
            for projection in (layer.attention.out_proj, layer.ffn.down):
                nn.init.normal_(projection.weight, std=0.02 / (2 * config.num_layers) ** 0.5)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits (B, L, vocab_size) of the token after each of ids (B, L)."""
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x)
        return self._logits(x)

    def loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Mean cross entropy in nats of targets (B, L), the tokens that follow ids; -100 is not counted."""
        return F.cross_entropy(self(ids).flatten(0, 1), targets.flatten())

    @torch.jit.export
    def new_state(self, batch: int) -> list[Tensor]:
        """The state before the first token, of `batch` sequences."""
        state: list[Tensor] = []
        for layer in self.layers:
            state.extend(layer.attention.new_state(batch))
        return state

    @torch.jit.export
    def prefill(self, ids: Tensor, state: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Logits (B, L, vocab_size) for the next tokens ids (B, L), and the state after them.

        The state given is not changed.
        """
        x = self.embedding(ids)
        after: list[Tensor] = []
        for i, layer in enumerate(self.layers):
            x, layer_state = layer.prefill(x, state[3 * i : 3 * i + 3])
            after.extend(layer_state)
        return self._logits(x), after

    @torch.jit.export
    def step(self, ids: Tensor, state: list[Tensor]) -> Tensor:
        """Logits (B, vocab_size) for the next token ids (B,), which `state` then includes: it is updated in place."""
        with torch.no_grad():
            x = self.embedding(ids)
            for i, layer in enumerate(self.layers):
                x = layer.step(x, state[3 * i : 3 * i + 3])
            return self._logits(x)

    @torch.jit.unused
    @torch.no_grad()
    def generate(
        self,
        ids: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos_id: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The prompt ids (B, L) and its continuation, (B, L + n) with n <= max_new_tokens.

        Args:
            temperature: divides the logits; 0 takes the likeliest token.
            top_k: sample only from the k likeliest tokens.
            top_p: sample only from the fewest likeliest tokens that have at least this probability together.
            eos_id: ends a sequence, which is then filled with it; generation stops when all have ended.
            generator: source of randomness.

        Raises:
            ValueError: the prompt is empty, or an option is out of range.
        """
        _check_sampling(ids, max_new_tokens, temperature, top_k, top_p)
        if max_new_tokens == 0:
            return ids
        logits, state = self.prefill(ids, self.new_state(ids.size(0)))
        token = sample(logits[:, -1], temperature, top_k, top_p, generator)
        tokens = [ids, token[:, None]]
        ended = torch.zeros_like(token, dtype=torch.bool)
        for _ in range(max_new_tokens - 1):
            if eos_id is not None:
                ended = ended | (token == eos_id)
                if bool(ended.all()):
                    break
            token = sample(self.step(token, state), temperature, top_k, top_p, generator)
            if eos_id is not None:
                token = token.masked_fill(ended, eos_id)
            tokens.append(token[:, None])
        return torch.cat(tokens, 1)

    @torch.jit.unused
    def save_pretrained(self, directory: str | Path) -> None:
        """Writes config.json and model.safetensors; each replaces an older one only when it is complete."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        weights = {name: value.detach().contiguous() for name, value in self.state_dict().items()}
        write_file(directory / "model.safetensors", safetensors.torch.save(weights))
        write_file(directory / "config.json", self.config.to_json() + "\n")

    @classmethod
    @torch.jit.unused
    def from_pretrained(cls, directory: str | Path) -> "ELATransformer":
        """The model that `save_pretrained` wrote.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is damaged or does not fit the other.
        """
        directory = Path(directory)
        model = cls(ELAConfig.from_json((directory / "config.json").read_text()))
        path = directory / "model.safetensors"
        try:
            model.load_state_dict(safetensors.torch.load_file(path))
        except (safetensors.SafetensorError, RuntimeError) as error:
            raise ValueError(f"ELATransformer: {path} is damaged or of another model ({error})") from error
        return model

    def _logits(self, x: Tensor) -> Tensor:
        if self.final_norm is not None:
            x = self.final_norm(x)
        if self.output is not None:
            return self.output(x)
        return F.linear(x, self.embedding.weight)


def sample(
    logits: Tensor,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Token ids (B,) drawn from softmax(logits / temperature), logits (B, V); see `ELATransformer.generate`."""
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = (logits.float() / temperature).softmax(-1)
    if top_k is not None and top_k < logits.size(-1):
        least = probabilities.topk(top_k).values[:, -1:]
        probabilities = probabilities.masked_fill(probabilities < least, 0)
    if top_p is not None and top_p < 1:
        ordered, order = probabilities.sort(-1, descending=True)
        ordered = ordered / ordered.sum(-1, keepdim=True)
        # A token stays if those before it do not reach top_p yet, so one always does.
        dropped = ordered.cumsum(-1) - ordered >= top_p
        probabilities = probabilities.masked_fill(dropped.scatter(-1, order, dropped), 0)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)


def _check_sampling(
    ids: Tensor, max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None
) -> None:
    if ids.dim() != 2 or ids.size(1) == 0:
        raise ValueError(f"generate: ids must be (batch, length) with at least one token (got {tuple(ids.shape)})")
    if max_new_tokens < 0:
        raise ValueError(f"generate: max_new_tokens must not be negative (got {max_new_tokens})")
    if temperature < 0:
        raise ValueError(f"generate: temperature must not be negative (got {temperature})")
    if top_k is not None and top_k < 1:
        raise ValueError(f"generate: top_k must be at least 1 (got {top_k})")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"generate: top_p must be in (0, 1] (got {top_p})")


def _initialise(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    elif isinstance(module, ExactLinearAttention):
        module.reset_parameters()  # after its projections, which `apply` visits first
