#include "ops/grouped_linear.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include "ops/grouped_linear_shape.h"

namespace elattn {

at::Tensor grouped_linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& offsets) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("elattn::grouped_linear", "").typed<decltype(grouped_linear)>();
  return op.call(x, weight, offsets);
}

at::Tensor grouped_outer(const at::Tensor& grad_out, const at::Tensor& x, const at::Tensor& offsets) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("elattn::_grouped_outer", "").typed<decltype(grouped_outer)>();
  return op.call(grad_out, x, offsets);
}

TORCH_LIBRARY_FRAGMENT(elattn, m) {
  m.def("grouped_linear(Tensor x, Tensor weight, Tensor offsets) -> Tensor", {at::Tag::pt2_compliant_tag});
  m.def("_grouped_outer(Tensor grad_out, Tensor x, Tensor offsets) -> Tensor", {at::Tag::pt2_compliant_tag});
}

}  // namespace elattn
