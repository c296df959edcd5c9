#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>

#include "../library.h"

namespace elattn {

/// The state of the keys of `a` followed by those of `b`, both (B, Hkv, state_size). `decay`, (Hkv,), (Hkv, D),
/// (B, Hkv, 1) or (B, Hkv, D), is the sum of the rates over the tokens of `b`. Differentiable, at fixed gauge.
ELATTN_API at::Tensor merge_states(const at::Tensor& a, const at::Tensor& b, int64_t head_dim, int64_t value_dim,
                                   std::string_view kernel = "hadamard_exp",
                                   const std::optional<at::Tensor>& decay = {});

}  // namespace elattn
