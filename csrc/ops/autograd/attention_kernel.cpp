#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/library.h>

#include "ops/attention_shape.h"

namespace elattn {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

at::Tensor or_undefined(const OptionalTensor& tensor) { return tensor.value_or(at::Tensor()); }

OptionalTensor or_nothing(const at::Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : OptionalTensor();
}

/// Saves the inputs and nothing else.
class AttentionFunction : public torch::autograd::Function<AttentionFunction> {
 public:
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, const AttentionArguments& a, bool with_state, const at::Tensor& q,
                               const at::Tensor& k, const at::Tensor& v, const OptionalTensor& decay,
                               const OptionalTensor& state) {
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({q, k, v, or_undefined(a.key_padding_mask), or_undefined(a.cu_seqlens), or_undefined(decay),
                            or_undefined(state)});
    ctx->saved_data["kernel"] = static_cast<int64_t>(a.kernel);
    ctx->saved_data["is_causal"] = a.is_causal;
    ctx->saved_data["scale"] = a.scale;
    ctx->saved_data["eps"] = a.eps;
    ctx->saved_data["enable_gqa"] = a.enable_gqa;
    at::AutoDispatchBelowADInplaceOrView guard;
    if (!with_state) return {dispatch::attention(a, q, k, v)};
    auto [out, final_state] = dispatch::attention_with_state(a, q, k, v);
    return {out, final_state};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const at::Tensor &q = saved[0], &k = saved[1], &v = saved[2];
    const AttentionArguments a{.kernel = static_cast<KernelKind>(ctx->saved_data["kernel"].toInt()),
                               .is_causal = ctx->saved_data["is_causal"].toBool(),
                               .scale = ctx->saved_data["scale"].toDouble(),
                               .eps = ctx->saved_data["eps"].toDouble(),
                               .enable_gqa = ctx->saved_data["enable_gqa"].toBool(),
                               .key_padding_mask = or_nothing(saved[3]),
                               .cu_seqlens = or_nothing(saved[4]),
                               .decay = or_nothing(saved[5]),
                               .state = or_nothing(saved[6])};
    const OptionalTensor grad_state = grads.size() > 1 ? or_nothing(grads[1]) : OptionalTensor();
    const at::Tensor grad_out =
        grads[0].defined()
            ? grads[0]
            : at::zeros_symint({q.sym_size(0), q.sym_size(1), q.sym_size(2), v.sym_size(3)}, q.options());
    auto [grad_q, grad_k, grad_v, grad_decay, grad_state_in] =
        dispatch::attention_backward(a, grad_out, grad_state, q, k, v);
    if (!a.decay) grad_decay = at::Tensor();
    if (!a.state) grad_state_in = at::Tensor();
    return {at::Tensor(), at::Tensor(), grad_q, grad_k, grad_v, grad_decay, grad_state_in};
  }
};

/// Whether a gradient may flow through the call; refuses forward-mode differentiation.
bool differentiates(const AttentionArguments& a, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
  for (const at::Tensor& input : {q, k, v, or_undefined(a.decay), or_undefined(a.state)}) {
    TORCH_CHECK(!input.defined() || !input._fw_grad(0).defined(), attention_name(a.kernel),
                ": forward-mode differentiation is not supported; use reverse mode");
  }
  return torch::autograd::compute_requires_grad(q, k, v, or_undefined(a.decay), or_undefined(a.state));
}

at::Tensor attention(const AttentionArguments& a, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
  if (differentiates(a, q, k, v)) return AttentionFunction::apply(a, false, q, k, v, a.decay, a.state)[0];
  at::AutoDispatchBelowADInplaceOrView guard;
  return dispatch::attention(a, q, k, v);
}

OutAndState attention_with_state(const AttentionArguments& a, const at::Tensor& q, const at::Tensor& k,
                                 const at::Tensor& v) {
  if (differentiates(a, q, k, v)) {
    const variable_list outputs = AttentionFunction::apply(a, true, q, k, v, a.decay, a.state);
    return {outputs[0], outputs[1]};
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return dispatch::attention_with_state(a, q, k, v);
}

Gradients attention_backward(const AttentionArguments& a, const at::Tensor& grad_out, const OptionalTensor& grad_state,
                             const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
  TORCH_CHECK(
      !differentiates(a, q, k, v) && !torch::autograd::compute_requires_grad(grad_out, or_undefined(grad_state)),
      attention_name(a.kernel), ": a second derivative is not supported; call backward without create_graph");
  at::AutoDispatchBelowADInplaceOrView guard;
  return dispatch::attention_backward(a, grad_out, grad_state, q, k, v);
}

}  // namespace

TORCH_LIBRARY_IMPL(elattn, Autograd, m) { implement_attention<attention, attention_with_state, attention_backward>(m); }

}  // namespace elattn
