#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/library.h>

#include "ops/grouped_linear.h"
#include "ops/grouped_linear_shape.h"

namespace elattn {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

/// A factor is kept for the gradient of the other one only.
void save_factors(AutogradContext* ctx, const at::Tensor& a, const at::Tensor& b, const at::Tensor& offsets) {
  ctx->save_for_backward({b.requires_grad() ? a : at::Tensor(), a.requires_grad() ? b : at::Tensor(), offsets});
}

/// Both gradients are grouped products again, so derivatives of any order follow from these two functions.
class GroupedLinearFunction : public torch::autograd::Function<GroupedLinearFunction> {
 public:
  static constexpr bool is_traceable = true;

  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& weight,
                            const at::Tensor& offsets) {
    save_factors(ctx, x, weight, offsets);
    at::AutoDispatchBelowADInplaceOrView guard;
    return grouped_linear(x, weight, offsets);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const at::Tensor &x = saved[0], &weight = saved[1], &offsets = saved[2], &grad_out = grads[0];
    at::Tensor grad_x, grad_weight;
    if (ctx->needs_input_grad(0)) grad_x = grouped_linear(grad_out, weight.transpose(1, 2), offsets);
    if (ctx->needs_input_grad(1)) grad_weight = grouped_outer(grad_out, x, offsets);
    return {grad_x, grad_weight, at::Tensor()};
  }
};

class GroupedOuterFunction : public torch::autograd::Function<GroupedOuterFunction> {
 public:
  static constexpr bool is_traceable = true;

  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& grad_out, const at::Tensor& x,
                            const at::Tensor& offsets) {
    save_factors(ctx, grad_out, x, offsets);
    at::AutoDispatchBelowADInplaceOrView guard;
    return grouped_outer(grad_out, x, offsets);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const at::Tensor &grad_out = saved[0], &x = saved[1], &offsets = saved[2], &grad = grads[0];  // grad (E, out, in)
    at::Tensor grad_grad_out, grad_x;
    if (ctx->needs_input_grad(0)) grad_grad_out = grouped_linear(x, grad, offsets);
    if (ctx->needs_input_grad(1)) grad_x = grouped_linear(grad_out, grad.transpose(1, 2), offsets);
    return {grad_grad_out, grad_x, at::Tensor()};
  }
};

/// Whether a gradient may flow through the call; refuses forward-mode differentiation.
bool differentiates(const at::Tensor& a, const at::Tensor& b) {
  for (const at::Tensor& input : {a, b}) {
    TORCH_CHECK(!input._fw_grad(0).defined(),
                "elattn::grouped_linear: forward-mode differentiation is not supported; use reverse mode");
  }
  return torch::autograd::compute_requires_grad(a, b);
}

at::Tensor grouped_linear_autograd(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& offsets) {
  if (differentiates(x, weight)) return GroupedLinearFunction::apply(x, weight, offsets);
  at::AutoDispatchBelowADInplaceOrView guard;
  return grouped_linear(x, weight, offsets);
}

at::Tensor grouped_outer_autograd(const at::Tensor& grad_out, const at::Tensor& x, const at::Tensor& offsets) {
  if (differentiates(grad_out, x)) return GroupedOuterFunction::apply(grad_out, x, offsets);
  at::AutoDispatchBelowADInplaceOrView guard;
  return grouped_outer(grad_out, x, offsets);
}

}  // namespace

TORCH_LIBRARY_IMPL(elattn, Autograd, m) {
  m.impl("grouped_linear", grouped_linear_autograd);
  m.impl("_grouped_outer", grouped_outer_autograd);
}

}  // namespace elattn
