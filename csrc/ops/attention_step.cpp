#include "ops/attention_step.h"

#include <torch/library.h>

#include "ops/arguments.h"

namespace elattn {

at::Tensor attention_step(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& state,
                          const AttentionStepOptions& o) {
  return dispatch::attention_step(
      {attention_kernel("elattn::attention_step", o.kernel), o.scale, o.eps, o.enable_gqa, o.decay, o.slots}, q, k, v,
      state);
}

TORCH_LIBRARY_FRAGMENT(elattn, m) {
  // `kernel` is not keyword-only for the reason given in attention.cpp.
  m.def(
      "attention_step(Tensor q, Tensor k, Tensor v, Tensor(a!) state, str kernel=\"hadamard_exp\", *, float scale=1.0, "
      "float eps=0.0, bool enable_gqa=False, Tensor? decay=None, Tensor? slots=None) -> Tensor",
      {at::Tag::pt2_compliant_tag, at::Tag::needs_fixed_stride_order});
}

}  // namespace elattn
