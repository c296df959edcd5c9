#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "ops/kernel_kind.h"

namespace elattn {

/// Checks that `state` is (..., state_size) of float32 or float64.
void check_state(const char* op, const char* name, const at::Tensor& state, KernelKind kernel,
                 const c10::SymInt& head_dim, const c10::SymInt& value_dim);

/// Views of the fields of a checked state, in the order of its layout.
std::vector<at::Tensor> state_views(const at::Tensor& state, KernelKind kernel, const c10::SymInt& head_dim,
                                    const c10::SymInt& value_dim);

}  // namespace elattn
