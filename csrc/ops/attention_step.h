#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>

#include "../library.h"

namespace elattn {

/// The keyword arguments of `attention_step`, with the names and defaults of `torch.ops.elattn.attention_step`.
struct AttentionStepOptions {
  std::string kernel = "hadamard_exp";
  double scale = 1.0;
  double eps = 0.0;
  bool enable_gqa = false;
  std::optional<at::Tensor> decay = {};  // (Hkv,), (Hkv, D), (B, Hkv, 1) or (B, Hkv, D)
  std::optional<at::Tensor> slots = {};  // (B,) int32 or int64, -1 = inactive
};

/// One token of causal attention: q (B, H, D), k (B, Hkv, D), v (B, Hkv, Dv) -> (B, H, Dv). The rows of the pool
/// `state` (P, Hkv, state_size) that `slots` names (default 0..B-1) are updated in place.
ELATTN_API at::Tensor attention_step(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                     const at::Tensor& state, const AttentionStepOptions& options = {});

}  // namespace elattn
