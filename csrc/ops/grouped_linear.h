#pragma once

#include <ATen/core/Tensor.h>

#include "../library.h"

namespace elattn {

/// Linear layers of groups of rows: x (T, in), weight (E, out, in) -> (T, out). Group e is the rows from offsets[e - 1]
/// (0 for e = 0) to offsets[e], and is multiplied by the transpose of weight[e]. `offsets` (E,) int32 holds the ends of
/// the groups, which may be empty; the last is T, as in `torch.nn.functional.grouped_mm`. Differentiable any number of
/// times.
ELATTN_API at::Tensor grouped_linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& offsets);

}  // namespace elattn
