#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <tuple>

#include "../library.h"

namespace elattn {

/// The keyword arguments of `attention`, with the names and defaults of `torch.ops.elattn.attention`.
struct AttentionOptions {
  std::string kernel = "hadamard_exp";
  bool is_causal = false;
  double scale = 1.0;
  double eps = 0.0;
  bool enable_gqa = false;
  std::optional<at::Tensor> key_padding_mask = {};  // (B, Lk) bool, true = padding
  std::optional<at::Tensor> cu_seqlens = {};        // (N + 1,) int32 or int64
  std::optional<at::Tensor> decay = {};             // (Hkv,), (Hkv, D), (B, Hkv, L) or (B, Hkv, L, D)
  std::optional<at::Tensor> state = {};             // (B or N, Hkv, state_size)
};

/// Exact linear attention: q (B, H, Lq, D), k (B, Hkv, Lk, D), v (B, Hkv, Lk, Dv) -> (B, H, Lq, Dv).
///
///     elattn::attention(q, k, v, {.kernel = "sum_sq", .is_causal = true});
ELATTN_API at::Tensor attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                const AttentionOptions& options = {});

/// The same with the state after the last key, (B or N, Hkv, state_size).
ELATTN_API std::tuple<at::Tensor, at::Tensor> attention_with_state(const at::Tensor& q, const at::Tensor& k,
                                                                   const at::Tensor& v,
                                                                   const AttentionOptions& options = {});

}  // namespace elattn
