#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "../library.h"

namespace elattn {

/// The keyword arguments of `feature_attention_step`.
struct FeatureAttentionStepOptions {
  bool enable_gqa = false;
  std::optional<at::Tensor> slots = {};  // (B,) int32 or int64, -1 = inactive
};

/// One token of causal feature attention: phi (B, H, D), psi (B, Hkv, D), v (B, Hkv, Dv) -> (B, H, Dv). The rows of the
/// pool `state` (P, Hkv, state_size) that `slots` names (default 0..B-1) are updated in place.
ELATTN_API at::Tensor feature_attention_step(const at::Tensor& phi, const at::Tensor& psi, const at::Tensor& v,
                                             const at::Tensor& state, const FeatureAttentionStepOptions& options = {});

}  // namespace elattn
