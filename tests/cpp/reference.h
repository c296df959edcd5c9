#pragma once

#include "catch.h"
#include "elattn.h"

/// Attention by its definition: pair by pair, in float64, differentiable (docs/math.md, sections 1, 3, 4 and 9).
namespace elattn::tests {

/// x / |x|, and 0 for 0.
inline at::Tensor unit_vector(const at::Tensor& x) {
  const at::Tensor square = x.square().sum(-1, true);
  const at::Tensor zero = square == 0;
  return x / square.masked_fill(zero, 1).sqrt() * zero.logical_not();
}

inline at::Tensor elu_plus_one(const at::Tensor& x) { return at::where(x > 0, x + 1, x.clamp_max(0).exp()); }

/// Total forgetting up to and including each token, (B or 1, Hkv, L, D or 1).
inline at::Tensor total_decay(const at::Tensor& decay, int64_t length) {
  at::Tensor rates = decay.to(at::kDouble);
  if (rates.dim() == 1)
    rates = rates.view({1, -1, 1, 1});
  else if (rates.dim() == 2)
    rates = rates.view({1, rates.size(0), 1, rates.size(1)});
  else if (rates.dim() == 3)
    rates = rates.unsqueeze(-1);
  return rates.expand({rates.size(0), rates.size(1), length, rates.size(3)}).cumsum(2);
}

/// The output for q (B, H, Lq, D), k (B, Hkv, Lk, D), v (B, Hkv, Lk, Dv) in float64. Without state and cu_seqlens;
/// padding and decay exclude each other here.
inline at::Tensor reference_attention(at::Tensor q, at::Tensor k, at::Tensor v, const AttentionOptions& options) {
  const int64_t group = k.size(1) == 0 ? 1 : q.size(1) / k.size(1);
  q = q.to(at::kDouble) * options.scale;
  k = (k.to(at::kDouble) * options.scale).repeat_interleave(group, 1);
  v = v.to(at::kDouble).repeat_interleave(group, 1);

  at::Tensor hidden = at::zeros({1, 1, q.size(2), k.size(2)}, at::kBool);
  if (options.is_causal) hidden = hidden.logical_not().triu(1);
  if (options.key_padding_mask) {
    const at::Tensor padding = options.key_padding_mask->view({k.size(0), 1, 1, k.size(2)});
    hidden = hidden.logical_or(padding);
    k = k.masked_fill(padding.transpose(-1, -2), 0);
    v = v.masked_fill(padding.transpose(-1, -2), 0);
  }

  const at::Tensor qi = q.unsqueeze(3), kj = k.unsqueeze(2);  // (B, H, Lq, 1, D), (B, H, 1, Lk, D)
  at::Tensor weights;                                         // (B, H, Lq, Lk)
  if (options.kernel == "hadamard_exp") {
    at::Tensor logs = qi + kj;
    if (options.decay) {
      const at::Tensor total = total_decay(*options.decay, k.size(2)).repeat_interleave(group, 1);
      logs = logs - (total.unsqueeze(3) - total.unsqueeze(2));
    }
    logs = logs.masked_fill(hidden.unsqueeze(-1), -std::numeric_limits<double>::infinity());
    if (logs.numel() > 0) {
      const at::Tensor row = logs.detach().amax({3, 4}, true);
      logs = logs - row.masked_fill(row.isinf(), 0);
    }
    weights = logs.exp().sum(-1);
  } else {
    if (options.kernel == "elu") {
      weights = elu_plus_one(q).matmul(elu_plus_one(k).transpose(-1, -2));
    } else if (options.kernel == "directional") {
      weights = (unit_vector(qi) + unit_vector(kj)).square().sum(-1) * (kj.square().sum(-1) + 1);
    } else {
      weights = (options.kernel == "sum_sq" ? qi + kj : qi - kj).square().sum(-1) + options.eps;
    }
    if (options.decay) {
      const at::Tensor total = total_decay(*options.decay, k.size(2)).repeat_interleave(group, 1);
      weights = weights * (total.transpose(-1, -2) - total).masked_fill(hidden, 0).exp();
    }
    weights = weights.masked_fill(hidden, 0);
  }
  const at::Tensor sum = weights.sum(-1, true);
  const at::Tensor nothing = sum == 0;
  return (weights.matmul(v) / sum.masked_fill(nothing, 1)).masked_fill(nothing, 0);
}

}  // namespace elattn::tests
