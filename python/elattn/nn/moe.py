"""Mixture of experts whose labels route the tokens and bias the output (docs/moe.md)."""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elattn import _files

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["MoE", "MoEReport"]

_BIAS_MODES = ("outer", "inner", "none")


class MoE(nn.Module):
    """SwiGLU experts chosen by learned labels: y = sum over the top k experts of w_e ffn_e(x), plus their biases.

    Each expert e has a label l_e. s = softmax(x . l_e + b_e) over the experts, w is s of the top k renormalised to sum
    to 1, and B_e is the label again, so that what an expert adds is tied to what it is chosen for:

        outer: y = sum (w_e ffn_e(x) + B_e)      inner: y = sum w_e (ffn_e(x) + B_e)      none: y = sum w_e ffn_e(x)

    With top_k = 1 the weight is 1: the router then learns from the biases and the load-balance loss only.

    Args:
        d_model: width of x and y.
        d_hidden: width of the gated layer of one expert.
        num_experts: E.
        top_k: experts per token, 1 to E.
        bias_mode: "outer", "inner" or "none".
        tie_labels: B_e = l_e; otherwise B is a parameter of its own, `expert_bias`, zero at the start.

    Parameters: labels (E, d_model), router_bias (E,), gate_up (E, 2 d_hidden, d_model), down (E, d_model, d_hidden).

    Tokens are sorted by expert and multiplied in groups by `elattn.grouped_linear`: no token is dropped, and an expert
    without tokens costs nothing. arXiv 2605.18848, MoE with routing-score bias.

    Raises:
        ValueError: an option breaks a rule; the message has the rule and the value met.
    """

    def __init__(
        self,
        d_model: int,
        d_hidden: int,
        num_experts: int,
        *,
        top_k: int = 2,
        bias_mode: str = "outer",
        tie_labels: bool = True,
    ) -> None:
        super().__init__()
        for name, size in (("d_model", d_model), ("d_hidden", d_hidden), ("num_experts", num_experts)):
            _require(size >= 1, f"{name} must be positive (got {size})")
        _require(1 <= top_k <= num_experts, f"top_k must be 1..num_experts = {num_experts} (got {top_k})")
        _require(bias_mode in _BIAS_MODES, f"bias_mode must be one of {', '.join(_BIAS_MODES)} (got {bias_mode!r})")
        _require(tie_labels or bias_mode != "none", 'tie_labels=False needs bias_mode "outer" or "inner" (got "none")')
        self.d_model = d_model
        self.d_hidden = d_hidden
        self.num_experts = num_experts
        self.top_k = top_k
        self.bias_mode = bias_mode
        self.tie_labels = tie_labels

        self.labels = nn.Parameter(torch.empty(num_experts, d_model))
        self.router_bias = nn.Parameter(torch.empty(num_experts))
        self.gate_up = nn.Parameter(torch.empty(num_experts, 2 * d_hidden, d_model))
        self.down = nn.Parameter(torch.empty(num_experts, d_model, d_hidden))
        self.expert_bias: nn.Parameter | None = None if tie_labels else nn.Parameter(torch.empty(num_experts, d_model))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Experts as `nn.Linear`; small labels, so that the experts are nearly equally likely at the start."""
        nn.init.normal_(self.labels, std=0.02)
        nn.init.zeros_(self.router_bias)
        nn.init.uniform_(self.gate_up, -1 / math.sqrt(self.d_model), 1 / math.sqrt(self.d_model))
        nn.init.uniform_(self.down, -1 / math.sqrt(self.d_hidden), 1 / math.sqrt(self.d_hidden))
        if self.expert_bias is not None:
            nn.init.zeros_(self.expert_bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(..., d_model) to (..., d_model), and the load-balance loss of these tokens.

        The loss is E sum_e f_e g_e: f_e the share of the assignments that went to expert e, g_e the mean of s_e. It is
        1 when either is even, and E when all tokens go surely to one expert. A float32 scalar (float64 for float64).
        """
        tokens = self._tokens(x)
        logits, experts, weights = self._route(tokens)
        out = self._mix(tokens, experts, weights).view(x.shape)
        # sum_e f_e g_e is the mean of g over the assignments. Without tokens the loss is 0.
        g = logits.softmax(-1).sum(0) / max(tokens.size(0), 1)
        assignments = experts.flatten()
        aux = g.index_select(0, assignments).sum() * (self.num_experts / max(assignments.size(0), 1))
        return out, aux

    @torch.jit.export
    def step(self, x_t: Tensor) -> Tensor:
        """The first result of `forward`, without the loss and without gradient: for generation."""
        with torch.no_grad():
            tokens = self._tokens(x_t)
            _, experts, weights = self._route(tokens)
            return self._mix(tokens, experts, weights).view(x_t.shape)

    @torch.jit.unused
    @torch.no_grad()
    def explain(self, x: Tensor) -> "MoEReport":
        """Which labels won for x (..., d_model), and how strongly."""
        logits, experts, weights = self._route(self._tokens(x))
        load = torch.bincount(experts.flatten(), minlength=self.num_experts) / max(experts.numel(), 1)
        shape = x.shape[:-1]
        return MoEReport(
            experts.view(*shape, self.top_k),
            weights.view(*shape, self.top_k),
            logits.softmax(-1).view(*shape, self.num_experts),
            load,
        )

    def extra_repr(self) -> str:
        return (
            f"{self.d_model}, {self.d_hidden}, {self.num_experts}, top_k={self.top_k}, bias_mode={self.bias_mode!r}, "
            f"tie_labels={self.tie_labels}"
        )

    def _tokens(self, x: Tensor) -> Tensor:
        """x as (T, d_model)."""
        if x.size(-1) != self.d_model:
            raise ValueError(f"MoE: x must have d_model = {self.d_model} channels (got {x.size(-1)})")
        return x.reshape(-1, self.d_model)

    def _route(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (T, E) in float32 or float64; the top k experts (T, k), the strongest first, and their weights."""
        logits = F.linear(tokens, self.labels, self.router_bias)
        if logits.dtype == torch.bfloat16 or logits.dtype == torch.float16:
            logits = logits.float()
        top, experts = logits.topk(self.top_k, -1)
        return logits, experts, top.softmax(-1)  # the softmax of all, renormalised over the top k

    def _mix(self, tokens: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """Weighted outputs of the experts and their biases, (T, d_model)."""
        by_expert, order = torch.sort(experts.flatten(), stable=True)  # (T k,)
        every_expert = torch.arange(self.num_experts, device=tokens.device)
        offsets = torch.searchsorted(by_expert, every_expert, right=True, out_int32=True)
        token = order // self.top_k
        gate, up = torch.ops.elattn.grouped_linear(tokens.index_select(0, token), self.gate_up, offsets).chunk(2, -1)
        y = torch.ops.elattn.grouped_linear(F.silu(gate) * up, self.down, offsets)
        weights = weights.to(y.dtype)
        y = y * weights.flatten().index_select(0, order)[:, None]
        return self._biases(experts, weights).index_add_(0, token, y)

    def _biases(self, experts: Tensor, weights: Tensor) -> Tensor:
        """What the biases of the top k experts add up to, (T, d_model), in the dtype of the weights."""
        if self.bias_mode == "none":
            return weights.new_zeros([experts.size(0), self.d_model])
        share = weights.new_zeros([experts.size(0), self.num_experts])
        if self.bias_mode == "inner":
            share = share.scatter(1, experts, weights)
        else:
            share = share.scatter(1, experts, 1.0)
        expert_bias = self.expert_bias
        return share @ (self.labels if expert_bias is None else expert_bias)


@dataclass(frozen=True)
class MoEReport:
    """Where the tokens of a call went; `print` it, or `plot` it. Leading dimensions are those of x, say (B, L)."""

    experts: Tensor
    """(B, L, k) int64: the experts of each token, the strongest first."""
    weights: Tensor
    """(B, L, k): their weights, which sum to 1."""
    scores: Tensor
    """(B, L, E): the router's probabilities of all experts."""
    load: Tensor
    """(E,): the share of the B L k assignments that each expert got."""

    def __str__(self) -> str:
        num_experts, top_k = self.scores.size(-1), self.experts.size(-1)
        experts, weights = self.experts.reshape(-1, top_k), self.weights.reshape(-1, top_k).double()
        scores = self.scores.reshape(-1, num_experts).double()
        tokens = max(scores.size(0), 1)
        first = torch.bincount(experts[:, 0], minlength=num_experts) / tokens
        received = torch.zeros(num_experts, dtype=torch.float64, device=weights.device)
        received.index_add_(0, experts.flatten(), weights.flatten())
        weight = received / (self.load.double() * experts.numel()).clamp(min=1)
        mean = scores.sum(0) / tokens
        lines = [
            f"MoE: top {top_k} of {num_experts} experts for {scores.size(0)} tokens",
            "expert    load   first  mean weight  mean score",
        ]
        for e in range(num_experts):
            lines.append(f"{e:6d}  {self.load[e]:6.1%}  {first[e]:6.1%}  {weight[e]:11.3f}  {mean[e]:10.3f}")
        balance = num_experts * (self.load.double() * mean).sum()
        lines.append(f"load-balance loss {balance:.3f} (1 when even, {num_experts} when one expert takes all)")
        return "\n".join(lines)

    def plot(self, path_or_axes: "str | Path | Axes | None" = None, tokens: Sequence[str] | None = None) -> "Figure":
        """Draws the weights: tokens along x, experts along y; white where an expert was not chosen.

        Needs matplotlib. Sequences of a batch are drawn one after the other.

        Args:
            path_or_axes: a file to write (its ending says the format), axes to draw into, or nothing.
            tokens: names of the tokens for the x axis, one for each.

        Returns:
            The figure.

        Raises:
            ValueError: the number of names is not that of the tokens.
        """
        from matplotlib.figure import Figure

        num_experts, top_k = self.scores.size(-1), self.experts.size(-1)
        experts = self.experts.reshape(-1, top_k).cpu()
        weights = self.weights.reshape(-1, top_k).float().cpu()
        count = experts.size(0)
        if tokens is not None and len(tokens) != count:
            raise ValueError(f"MoEReport: tokens must name each of the {count} tokens (got {len(tokens)} names)")
        grid = torch.full((count, num_experts), float("nan")).scatter(1, experts, weights)

        if path_or_axes is None or isinstance(path_or_axes, (str, Path)):
            width = min(max(6.0, 1.8 + count * (0.2 if tokens is not None else 0.02)), 24.0)
            figure = Figure(figsize=(width, 1.6 + 0.3 * num_experts), layout="constrained")
            axes = figure.subplots()
        else:
            axes = path_or_axes
            figure = axes.figure
        image = axes.imshow(grid.T.numpy(), aspect="auto", interpolation="nearest", cmap="viridis_r", vmin=0, vmax=1)
        length = self.experts.size(-2) if self.experts.dim() > 1 else 1
        for start in range(length, count, max(length, 1)):
            axes.axvline(start - 0.5, color="tab:red", linewidth=1)
        axes.set_yticks(range(num_experts), [f"{e}  ({load:.0%})" for e, load in enumerate(self.load.tolist())])
        axes.set(ylabel="expert (load)", xlabel="token", title="weights of the chosen experts")
        if tokens is not None:
            axes.set_xticks(range(count), tokens, rotation=90, fontsize=7)
        figure.colorbar(image, ax=axes, label="weight")
        if isinstance(path_or_axes, (str, Path)):
            content = io.BytesIO()
            figure.savefig(content, format=Path(path_or_axes).suffix[1:] or "png", dpi=150)
            _files.write_file(path_or_axes, content.getvalue())
        return figure


def _require(condition: bool, rule: str) -> None:
    if not condition:
        raise ValueError(f"MoE: {rule}")
