#pragma once

#include <ATen/core/Tensor.h>

#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "../library.h"

namespace elattn {

/// Names of the built-in kernels.
ELATTN_API std::vector<std::string> kernels();

/// Elements of a state per (batch, head). Here and below "features" is the kernel of `feature_attention`.
ELATTN_API int64_t state_size(std::string_view kernel, int64_t head_dim, int64_t value_dim);

/// Names of the parts of a state, in memory order.
ELATTN_API std::vector<std::string> state_fields(std::string_view kernel);

/// The empty state (batch, heads, state_size), float32 unless `options` says float64.
ELATTN_API at::Tensor new_state(int64_t batch, int64_t heads, int64_t head_dim, int64_t value_dim,
                                std::string_view kernel = "hadamard_exp", const at::TensorOptions& options = {});

/// Views of the parts of `state` (..., state_size) by name: (...), (..., D), (..., Dv) or (..., D, Dv).
ELATTN_API std::map<std::string, at::Tensor> unpack_state(const at::Tensor& state, int64_t head_dim, int64_t value_dim,
                                                          std::string_view kernel = "hadamard_exp");

}  // namespace elattn
