#include <torch/library.h>

#include "ops/grouped_linear_shape.h"

namespace elattn {
namespace {

at::Tensor grouped_linear_meta(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& offsets) {
  return new_grouped_linear(grouped_linear_shape(x, weight, offsets), x);
}

at::Tensor grouped_outer_meta(const at::Tensor& grad_out, const at::Tensor& x, const at::Tensor& offsets) {
  return new_grouped_outer(grouped_outer_shape(grad_out, x, offsets), x);
}

}  // namespace

TORCH_LIBRARY_IMPL(elattn, Meta, m) {
  m.impl("grouped_linear", grouped_linear_meta);
  m.impl("_grouped_outer", grouped_outer_meta);
}

}  // namespace elattn
