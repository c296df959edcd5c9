"""Links between layers of different depth, instead of residual branches (docs/paper-modules.md)."""

from typing import Final

import torch
from torch import Tensor, nn

__all__ = ["HyperLink"]

_MODES = ("sum", "dense", "gated", "residual")


class HyperLink(nn.Module):
    """x_n = sum_{j=0..n} w_nj delta_j: what layer n reads, from what the layers before it contributed.

    delta_0 is the embedding and delta_j the contribution of the j-th layer, so x_0 = delta_0 and x_num_layers goes to
    the output. Every mode begins as the plain sum.

    Args:
        num_layers: number of layers N.
        mode: "sum" and "residual": all w are 1, no parameter. "dense": w is learned, N (N + 3) / 2 numbers, one for
            each pair n >= 1, j <= n. "gated": as dense, and delta_j of each token is scaled by
            2 sigmoid(g_j . delta_j + b_j) for j >= 1, N (d_model + 1) more numbers.
        d_model: width of the deltas; needed by "gated".

    The paper's form is the sum (arXiv 2605.18848, Hyper-Link).

    Raises:
        ValueError: an option breaks a rule; the message has the rule and the value met.
    """

    dense: Final[bool]

    def __init__(self, num_layers: int, *, mode: str = "sum", d_model: int | None = None) -> None:
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"HyperLink: num_layers must be positive (got {num_layers})")
        if mode not in _MODES:
            raise ValueError(f"HyperLink: mode must be one of {', '.join(_MODES)} (got {mode!r})")
        if mode == "gated" and d_model is None:
            raise ValueError('HyperLink: mode="gated" needs d_model')
        self.num_layers = num_layers
        self.mode = mode
        self.dense = mode in ("dense", "gated")
        # Rows w_1, w_2, ... of 2, 3, ... weights, one after the other.
        self.weight = nn.Parameter(torch.empty(num_layers * (num_layers + 3) // 2)) if self.dense else None
        self.gate_weight = nn.Parameter(torch.empty(num_layers, d_model)) if mode == "gated" else None
        self.gate_bias = nn.Parameter(torch.empty(num_layers)) if mode == "gated" else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights 1 and gates 2 sigmoid(0) = 1: the plain sum."""
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.gate_weight is not None and self.gate_bias is not None:
            nn.init.zeros_(self.gate_weight)
            nn.init.zeros_(self.gate_bias)

    def forward(self, deltas: list[Tensor]) -> Tensor:
        """x_n from the n + 1 tensors delta_0, ..., delta_n, each (..., d_model).

        Raises:
            ValueError: there are none, or more than num_layers + 1.
        """
        return self.combine([self.gate(delta, j) for j, delta in enumerate(deltas)])

    @torch.jit.export
    def gate(self, delta: Tensor, index: int) -> Tensor:
        """delta_index as `combine` takes it: scaled by its gate in mode "gated", otherwise as it is.

        A model calls it once for each delta, and `combine` at every layer; `forward` does both.
        """
        gate_weight, gate_bias = self.gate_weight, self.gate_bias
        if gate_weight is None or gate_bias is None or index == 0 or index > self.num_layers:
            return delta
        score = (delta * gate_weight[index - 1]).sum(-1, keepdim=True) + gate_bias[index - 1]
        return delta * (2 * torch.sigmoid(score)).to(delta.dtype)

    @torch.jit.export
    def combine(self, terms: list[Tensor]) -> Tensor:
        """The weighted sum of the n + 1 results of `gate`."""
        n = len(terms) - 1
        if n < 0 or n > self.num_layers:
            raise ValueError(f"HyperLink: needs 1 to num_layers + 1 = {self.num_layers + 1} deltas (got {n + 1})")
        out = terms[0]
        weight = self.weight
        if weight is None or n == 0:
            for term in terms[1:]:
                out = out + term
            return out
        w = weight.narrow(0, (n - 1) * (n + 2) // 2, n + 1).unbind(0)
        out = out * w[0]
        for j in range(1, n + 1):
            out = torch.addcmul(out, terms[j], w[j])
        return out

    def extra_repr(self) -> str:
        return f"{self.num_layers}, mode={self.mode!r}"
