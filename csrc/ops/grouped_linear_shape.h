#pragma once

#include <ATen/core/Tensor.h>

/// grouped_linear and the gradient of its weights, which are each other's gradients: checks, once for every backend.
/// Sizes may be symbolic; the values of offsets are not read here.
namespace elattn {

/// The gradient of weight, (E, out, in): for each group, the sum of the outer products of the rows of grad_out (T, out)
/// and x (T, in). A typed call through the dispatcher.
at::Tensor grouped_outer(const at::Tensor& grad_out, const at::Tensor& x, const at::Tensor& offsets);

struct GroupedShape {
  c10::SymInt rows, groups;
  c10::SymInt in, out;
};

/// The sizes of a call, or an error that names the rule and the value met.
GroupedShape grouped_linear_shape(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& offsets);
GroupedShape grouped_outer_shape(const at::Tensor& grad_out, const at::Tensor& x, const at::Tensor& offsets);

/// Uninitialised results.
at::Tensor new_grouped_linear(const GroupedShape& shape, const at::Tensor& x);
at::Tensor new_grouped_outer(const GroupedShape& shape, const at::Tensor& x);

}  // namespace elattn
