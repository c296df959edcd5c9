#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

#include "../library.h"

namespace elattn {

/// The keyword arguments of `feature_attention`, with the names and defaults of `torch.ops.elattn.feature_attention`.
struct FeatureAttentionOptions {
  bool is_causal = false;
  bool enable_gqa = false;
  std::optional<at::Tensor> key_padding_mask = {};  // (B, Lk) bool, true = padding
  std::optional<at::Tensor> cu_seqlens = {};        // (N + 1,) int32 or int64
  std::optional<at::Tensor> state = {};             // (B or N, Hkv, state_size)
};

/// Linear attention with the kernel phi . psi of the caller's non-negative features:
/// phi (B, H, Lq, D), psi (B, Hkv, Lk, D), v (B, Hkv, Lk, Dv) -> (B, H, Lq, Dv).
ELATTN_API at::Tensor feature_attention(const at::Tensor& phi, const at::Tensor& psi, const at::Tensor& v,
                                        const FeatureAttentionOptions& options = {});

/// The same with the state after the last key, (B or N, Hkv, state_size).
ELATTN_API std::tuple<at::Tensor, at::Tensor> feature_attention_with_state(const at::Tensor& phi, const at::Tensor& psi,
                                                                           const at::Tensor& v,
                                                                           const FeatureAttentionOptions& options = {});

}  // namespace elattn
