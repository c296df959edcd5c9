"""A language model of exact linear attention, softmax attention, or both (docs/modules.md)."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elattn._files import write_file
from elattn.models import generation
from elattn.models import state as state_files
from elattn.models.config import ELAConfig
from elattn.nn import ExactLinearAttention, HyperLink, MemoryLobe, MoE, SoftmaxAttention, SwiGLU
from elattn.nn._projections import values_readable

__all__ = ["ELATransformer"]


class Layer(nn.Module):
    """What one layer adds to the representation x.

    With a = attention(norm(x)): a + ffn(a), or a + ffn(ffn_norm(x + a)) where there is an ffn_norm, which makes it the
    ordinary Pre-Norm block. The answer of the memory lobe, if there is one, is added.

    `deltas` are the embedding and the contributions of the layers before; only a memory lobe reads them. The
    load-balance loss of a mixture of experts is appended to `losses`.
    """

    is_softmax: Final[bool]
    has_experts: Final[bool]

    def __init__(self, config: ELAConfig, index: int) -> None:
        super().__init__()
        self.is_softmax = config.is_softmax(index)
        self.has_experts = config.num_experts > 1
        shared: dict[str, Any] = {
            "num_kv_heads": config.num_kv_heads,
            "is_causal": True,
            "rotary": config.rotary,
            "short_conv": config.short_conv,
            "gate": config.gate,
        }
        self.attention_norm = nn.RMSNorm(config.d_model)
        if self.is_softmax:
            self.attention = SoftmaxAttention(
                config.d_model, config.num_heads, max_seq_len=config.max_seq_len, **shared
            )
        else:
            self.attention = ExactLinearAttention(
                config.d_model, config.num_heads, kernel=config.kernel, decay=config.decay, **shared
            )
        self.ffn_norm = nn.RMSNorm(config.d_model) if config.hyper_link == "residual" else None
        if self.has_experts:
            self.ffn = MoE(
                config.d_model,
                config.d_hidden,
                config.num_experts,
                top_k=config.top_k,
                bias_mode=config.moe_bias,
                tie_labels=config.tie_labels,
            )
        else:
            self.ffn = SwiGLU(config.d_model, config.d_hidden)
        self.memory_lobe: MemoryLobe | None = None
        if config.memory_lobe is not None:
            self.memory_lobe = MemoryLobe(
                config.d_model, config.num_heads, scope=config.memory_lobe, kernel=config.kernel
            )
        # The first tensors of the layer's state are the attention's, the rest are the lobe's.
        self.attention_tensors = 4 if self.is_softmax else 3

    def forward(self, x: Tensor, deltas: list[Tensor], losses: list[Tensor], cu_seqlens: Tensor | None) -> Tensor:
        a = self.attention(self.attention_norm(x), None, None, cu_seqlens)
        delta = self._contribution(x, a, losses)
        if self.memory_lobe is not None:
            delta = delta + self.memory_lobe(deltas, None, cu_seqlens)
        return delta

    @torch.jit.export
    def new_state(self, batch: int, capacity: int | None) -> list[Tensor]:
        if self.is_softmax:
            state = self.attention.new_state(batch, capacity)
        else:
            state = self.attention.new_state(batch)
        if self.memory_lobe is not None:
            state = state + self.memory_lobe.new_state(batch)
        return state

    @torch.jit.export
    def prefill(
        self, x: Tensor, deltas: list[Tensor], state: list[Tensor], lengths: Tensor | None
    ) -> tuple[Tensor, list[Tensor]]:
        a, after = self.attention.prefill(self.attention_norm(x), state[: self.attention_tensors], lengths)
        losses: list[Tensor] = []
        delta = self._contribution(x, a, losses)
        if self.memory_lobe is not None:
            answer, lobe_state = self.memory_lobe.prefill(deltas, state[self.attention_tensors :], lengths)
            delta, after = delta + answer, after + lobe_state
        return delta, after

    @torch.jit.export
    def step(self, x: Tensor, deltas: list[Tensor], state: list[Tensor]) -> Tensor:
        a = self.attention.step(self.attention_norm(x), state[: self.attention_tensors])
        h = self._ffn_input(x, a)
        if self.has_experts:
            delta = a + self.ffn.step(h)
        else:
            delta = a + self.ffn(h)
        if self.memory_lobe is not None:
            delta = delta + self.memory_lobe.step(deltas, state[self.attention_tensors :])
        return delta

    def _contribution(self, x: Tensor, a: Tensor, losses: list[Tensor]) -> Tensor:
        h = self._ffn_input(x, a)
        if self.has_experts:
            y, loss = self.ffn(h)
            losses.append(loss)
        else:
            y = self.ffn(h)
        return a + y

    def _ffn_input(self, x: Tensor, a: Tensor) -> Tensor:
        if self.ffn_norm is None:
            return a
        return self.ffn_norm(x + a)


class ELATransformer(nn.Module):
    """Embedding, layers of causal attention and gated feed-forward networks, output layer; options in `ELAConfig`.

    `torch.jit.script(model)` has `forward`, `new_state`, `prefill` and `step`, which is all that generation in C++
    needs. The state is one flat list of tensors, in which each layer has a run: of a linear layer the attention's sums,
    the convolution's last inputs and the position, of a softmax layer keys, values, last inputs and position, and then
    the sums of a causal memory lobe. All have the batch first. Only the keys and values of softmax layers grow.
    """

    is_causal: Final[bool]
    max_seq_len: int | None
    state_shapes: list[list[int]]

    def __init__(self, config: ELAConfig) -> None:
        super().__init__()
        self.config = config
        self.is_causal = True
        self.vocab_size = config.vocab_size
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList([Layer(config, index) for index in range(config.num_layers)])
        self.link: HyperLink | None = None
        if config.hyper_link in ("dense", "gated"):
            self.link = HyperLink(config.num_layers, mode=config.hyper_link, d_model=config.d_model)
        self.final_norm = nn.RMSNorm(config.d_model) if config.final_norm else None
        self.output = None if config.tie_embeddings else nn.Linear(config.d_model, config.vocab_size, bias=False)
        has_softmax = any(config.is_softmax(index) for index in range(config.num_layers))
        self.max_seq_len = config.max_seq_len if has_softmax else None
        self._lobes_changed()
        self._initialise()

    @torch.jit.unused
    def _initialise(self) -> None:
        """Initial values of the embedding and the matrices; the other parameters have those of their modules.

        Normal, with the standard deviation 1 / sqrt(columns) that keeps the size of what a matrix is applied to.
        The matrices whose products are added to the representation, two a layer, have 1 / sqrt(2 num_layers) of it, so
        that its size does not grow with the number of layers.
        """
        nn.init.normal_(self.embedding.weight, std=self.config.d_model**-0.5)
        for name, matrix in self._matrices().items():
            added = not {"out_proj", "down"}.isdisjoint(name.split("."))
            std = matrix.size(-1) ** -0.5
            nn.init.normal_(matrix, std=std * (2 * self.config.num_layers) ** -0.5 if added else std)

    def forward(self, ids: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """Logits (B, L, vocab_size) of the token after each of ids (B, L).

        Args:
            cu_seqlens: (N + 1,) int32 or int64, the ends of N sequences packed along L, with B = 1. No token sees
                another sequence.

        Raises:
            ValueError: a sequence is longer than max_seq_len, in a model with softmax layers.
        """
        x, _ = self._hidden(ids, cu_seqlens)
        return self._logits(x)

    def loss(self, ids: Tensor, targets: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """Mean cross entropy in nats of targets (B, L), the tokens that follow ids; -100 is not counted (0 if all are).

        With experts, plus aux_coef times the mean of the layers' load-balance losses.
        """
        x, losses = self._hidden(ids, cu_seqlens)
        logits, targets = self._logits(x).flatten(0, 1), targets.flatten()
        # The mean of no target is 0 here, and NaN with reduction="mean".
        loss = F.cross_entropy(logits, targets, reduction="sum") / (targets != -100).sum().clamp(min=1)
        if losses:
            loss = loss + self.config.aux_coef * torch.stack(losses).mean()
        return loss

    @torch.jit.export
    def new_state(self, batch: int, capacity: int | None = None) -> list[Tensor]:
        """The state before the first token, of `batch` sequences.

        capacity: tokens that softmax layers have room for, by default max_seq_len. Linear layers need none.

        Raises:
            ValueError: there are softmax layers, and neither capacity nor max_seq_len is given; or capacity is larger.
        """
        most = self.max_seq_len
        if most is not None and capacity is not None and capacity > most:
            raise ValueError(f"ELATransformer: capacity must be at most max_seq_len = {most} (got {capacity})")
        state: list[Tensor] = []
        for layer in self.layers:
            state.extend(layer.new_state(batch, capacity))
        return state

    @torch.jit.export
    def prefill(self, ids: Tensor, state: list[Tensor], lengths: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """Logits (B, L, vocab_size) for the next tokens ids (B, L), and the state after them.

        The state given is not changed. With lengths (B,) int64, row b has lengths[b] <= L tokens and then padding,
        which does not enter the state; logits there mean nothing.

        Raises:
            ValueError: an id is not in the vocabulary (checked on the CPU), the state is of another model or batch, or
                a softmax layer has no room for the tokens.
        """
        x, state = self._prefill_hidden(ids, state, lengths)
        return self._logits(x), state

    @torch.jit.export
    def step(self, ids: Tensor, state: list[Tensor]) -> Tensor:
        """Logits (B, vocab_size) for the next token ids (B,), which `state` then includes: it is updated in place.

        Runs without gradient.

        Raises:
            ValueError: the state is of another model or batch, or a softmax layer has no room for a token.
        """
        with torch.no_grad():
            self._check_state(state, ids.size(0))
            x = self.embedding(ids)
            deltas, terms = [x], [x]
            begin = 0
            for layer in self.layers:
                end = begin + layer.state_tensors
                x = self._next(x, layer.step(x, deltas, state[begin:end]), deltas, terms)
                begin = end
            return self._logits(x)

    @torch.jit.unused
    def generate(
        self,
        ids: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos_id: int | list[int] | None = None,
        generator: torch.Generator | None = None,
        *,
        repetition_penalty: float = 1.0,
        key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """The prompts ids (B, L) and their continuations, (B, L + n) with n <= max_new_tokens.

        Args:
            temperature: divides the logits; 0 takes the likeliest token.
            top_k: sample only from the k likeliest tokens.
            top_p: sample only from the fewest likeliest tokens that have at least this probability together.
            eos_id: a token that ends a sequence, or a list of them. The rest of its row is filled with the first;
                generation stops when all rows have ended.
            generator: source of randomness.
            repetition_penalty: of tokens that occur in the row, positive logits are divided by it and negative ones
                multiplied (Keskar et al. 2019, CTRL); 1 for none.
            key_padding_mask: (B, L) bool, True for padding, before or after the prompt of a row, for prompts of
                different length. A row continues as it would alone; its continuation begins in column L.

        Raises:
            ValueError: a prompt is empty, an id is not in the vocabulary, an option is out of range, or prompt and
                continuation are longer than max_seq_len.
        """
        return generation.generate(
            self,
            ids,
            max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            eos_id=eos_id,
            generator=generator,
            repetition_penalty=repetition_penalty,
            key_padding_mask=key_padding_mask,
        )

    @torch.jit.unused
    def stream(
        self,
        ids: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos_id: int | list[int] | None = None,
        generator: torch.Generator | None = None,
        *,
        repetition_penalty: float = 1.0,
        key_padding_mask: Tensor | None = None,
    ) -> Iterator[Tensor]:
        """The new tokens of `generate`, (B,) each, as they come. Same arguments and errors."""
        return generation.stream(
            self,
            ids,
            max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            eos_id=eos_id,
            generator=generator,
            repetition_penalty=repetition_penalty,
            key_padding_mask=key_padding_mask,
        )

    @torch.jit.unused
    def save_state(self, path: str | Path, state: list[Tensor]) -> None:
        """Writes a state with what it belongs to; see `load_state`. An older file is replaced once it is complete."""
        state_files.save_state(self, path, state)

    @torch.jit.unused
    def load_state(self, path: str | Path, capacity: int | None = None) -> list[Tensor]:
        """The state that `save_state` wrote, bit for bit, on the model's device.

        Args:
            capacity: tokens that softmax layers have room for; by default what they had.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is no state file or damaged, or the state is of a model with another configuration or dtype.
        """
        return state_files.load_state(self, path, capacity)

    @torch.jit.unused
    def state_names(self) -> list[str]:
        """Names of the tensors of a state, in their order: layers.0.attention.linear, ..."""
        names: list[str] = []
        for index, layer in enumerate(self.layers):
            parts = ("keys", "values") if layer.is_softmax else ("linear",)
            names += [f"layers.{index}.attention.{part}" for part in (*parts, "last_inputs", "position")]
            if layer.state_tensors > layer.attention_tensors:
                names.append(f"layers.{index}.memory_lobe.linear")
        return names

    @torch.jit.unused
    def memory_lobes(self) -> list[MemoryLobe | None]:
        """The memory lobe of each layer."""
        return [layer.memory_lobe for layer in self.layers]

    @torch.jit.unused
    def set_memory_lobe(self, layer: int, lobe: MemoryLobe | None) -> None:
        """Puts a lobe into a layer, or takes it out. `MemoryLobe.attach` and `detach` call it."""
        self.layers[layer].memory_lobe = lobe
        self._lobes_changed()

    @torch.jit.unused
    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """All parameters for an optimizer: matrices with weight decay, the rest without.

        The rest are norms, biases, the embedding, labels of experts, convolutions, forgetting rates and what computes
        them, and the weights of the links.
        """
        matrices = self._matrices()
        others = [p for name, p in self.named_parameters() if name not in matrices]
        return [
            {"params": list(matrices.values()), "weight_decay": weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]

    @torch.jit.unused
    def save_pretrained(self, directory: str | Path) -> None:
        """Writes config.json and model.safetensors; each replaces an older one only when it is complete.

        Raises:
            ValueError: a memory lobe is attached that the configuration does not have.
        """
        scopes = {None if lobe is None else lobe.scope for lobe in self.memory_lobes()}
        if scopes != {self.config.memory_lobe}:
            raise ValueError("ELATransformer: detach memory lobes that were attached, and save them by themselves")
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        # Copies, because a lobe may serve several layers, and the format knows no shared memory.
        weights = {n: x.detach().clone(memory_format=torch.contiguous_format) for n, x in self.state_dict().items()}
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

    @torch.jit.unused
    def _matrices(self) -> dict[str, nn.Parameter]:
        """The parameters that multiply vectors, by name; of experts one matrix for each in (E, rows, columns)."""
        return {
            name: parameter
            for name, parameter in self.named_parameters()
            if parameter.dim() >= 2 and _NO_MATRICES.isdisjoint(name.split("."))
        }

    def _lobes_changed(self) -> None:
        """Sets what depends on the lobes: whether deltas are kept, and the shapes of the state (-1: any size)."""
        lobes = [layer.memory_lobe for layer in self.layers]
        self.keeps_deltas = any(lobe is not None for lobe in lobes)
        self.state_shapes = []
        for layer, lobe in zip(self.layers, lobes, strict=True):
            # A bidirectional lobe has no state: it makes the model one without prefill and step.
            layer.state_tensors = layer.attention_tensors + (lobe is not None and lobe.scope == "causal")
            for tensor in layer.attention.new_state(0, 0) if layer.is_softmax else layer.attention.new_state(0):
                self.state_shapes.append(list(tensor.shape[1:]))
            if layer.is_softmax:
                self.state_shapes[-4][1] = self.state_shapes[-3][1] = -1
            if lobe is not None and lobe.scope == "causal":
                self.state_shapes.append(list(lobe.new_state(0)[0].shape[1:]))

    def _hidden(self, ids: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """What the output layer reads, (B, L, d_model), and the load-balance losses of the layers."""
        self._check_length(ids, cu_seqlens)
        x = self.embedding(ids)
        deltas, terms = [x], [x]
        losses: list[Tensor] = []
        for layer in self.layers:
            x = self._next(x, layer(x, deltas, losses, cu_seqlens), deltas, terms)
        return x, losses

    def _prefill_hidden(self, ids: Tensor, state: list[Tensor], lengths: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """`prefill` up to what the output layer reads, (B, L, d_model)."""
        self._check_state(state, ids.size(0))
        self._check_ids(ids)
        x = self.embedding(ids)
        deltas, terms = [x], [x]
        after: list[Tensor] = []
        begin = 0
        for layer in self.layers:
            end = begin + layer.state_tensors
            delta, layer_state = layer.prefill(x, deltas, state[begin:end], lengths)
            x = self._next(x, delta, deltas, terms)
            after.extend(layer_state)
            begin = end
        return x, after

    def _next(self, x: Tensor, delta: Tensor, deltas: list[Tensor], terms: list[Tensor]) -> Tensor:
        """The next layer's x. `terms` are the deltas as the link takes them."""
        if self.keeps_deltas:
            deltas.append(delta)
        if self.link is None:
            return x + delta
        terms.append(self.link.gate(delta, len(terms)))
        return self.link.combine(terms)

    def _logits(self, x: Tensor) -> Tensor:
        if self.final_norm is not None:
            x = self.final_norm(x)
        if self.output is not None:
            return self.output(x)
        return F.linear(x, self.embedding.weight)

    def _check_length(self, ids: Tensor, cu_seqlens: Tensor | None) -> None:
        most = self.max_seq_len
        if most is None:
            return
        longest = ids.size(1)
        if cu_seqlens is not None:
            if cu_seqlens.numel() < 2 or not values_readable(cu_seqlens):
                return
            longest = int(cu_seqlens.diff().max())
        if longest > most:
            raise ValueError(f"ELATransformer: sequences must have at most max_seq_len = {most} tokens (got {longest})")

    def _check_ids(self, ids: Tensor) -> None:
        if ids.numel() > 0 and values_readable(ids):
            low, high = torch.aminmax(ids)
            if int(low) < 0 or int(high) >= self.vocab_size:
                raise ValueError(
                    f"ELATransformer: ids must be in 0..vocab_size - 1 = {self.vocab_size - 1} "
                    f"(got {int(low)} to {int(high)})"
                )

    def _check_state(self, state: list[Tensor], batch: int) -> None:
        if len(state) != len(self.state_shapes):
            raise ValueError(
                f"ELATransformer: the state is of another model: it has {len(state)} tensors, "
                f"this model's has {len(self.state_shapes)}"
            )
        for i, expected in enumerate(self.state_shapes):
            shape = state[i].shape
            fits = len(shape) == len(expected) + 1
            if fits:
                for j, size in enumerate(expected):
                    fits = fits and (size < 0 or shape[j + 1] == size)
            if not fits:
                sizes = ", ".join(["any" if size < 0 else str(size) for size in expected])
                raise ValueError(
                    f"ELATransformer: the state is of another model: tensor {i} has shape {list(shape)}, "
                    f"this model's has [batch, {sizes}]"
                )
            if shape[0] != batch:
                raise ValueError(f"ELATransformer: the state is of {shape[0]} sequences, but ids of {batch}")


# Parts of the names of parameters with two dimensions that are no matrices, or that compute forgetting rates.
_NO_MATRICES = {"embedding", "link", "conv_weight", "decay_rate", "decay_proj", "labels", "expert_bias"}
