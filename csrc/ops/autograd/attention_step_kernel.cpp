#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/library.h>

#include "ops/attention_shape.h"

namespace elattn {
namespace {

at::Tensor attention_step(const StepArguments& a, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                          const at::Tensor& state) {
  TORCH_CHECK(!torch::autograd::compute_requires_grad(q, k, v, state, a.decay.value_or(at::Tensor())),
              step_name(a.kernel),
              ": updates state in place and has no gradient, but an input requires grad; "
              "call it under torch.no_grad(), or use attention with return_state=True");
  at::AutoDispatchBelowAutograd guard;
  return dispatch::attention_step(a, q, k, v, state);
}

/// Tells autograd that `state` changes, so that a backward that has saved it is refused.
at::Tensor attention_step_in_place(const StepArguments& a, const at::Tensor& q, const at::Tensor& k,
                                   const at::Tensor& v, const at::Tensor& state) {
  at::AutoDispatchBelowADInplaceOrView guard;
  at::Tensor out = dispatch::attention_step(a, q, k, v, state);
  if (!state.is_inference()) torch::autograd::increment_version(state);
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(elattn, Autograd, m) {
  m.impl("attention_step", Unpacked<attention_step>::attention);
  m.impl("feature_attention_step", Unpacked<attention_step>::feature_attention);
}

TORCH_LIBRARY_IMPL(elattn, ADInplaceOrView, m) {
  m.impl("attention_step", Unpacked<attention_step_in_place>::attention);
  m.impl("feature_attention_step", Unpacked<attention_step_in_place>::feature_attention);
}

}  // namespace elattn
