#include "ops/feature_attention_step.h"

#include <torch/library.h>

#include "ops/arguments.h"

namespace elattn {

at::Tensor feature_attention_step(const at::Tensor& phi, const at::Tensor& psi, const at::Tensor& v,
                                  const at::Tensor& state, const FeatureAttentionStepOptions& options) {
  return dispatch::attention_step({.enable_gqa = options.enable_gqa, .slots = options.slots}, phi, psi, v, state);
}

TORCH_LIBRARY_FRAGMENT(elattn, m) {
  m.def(
      "feature_attention_step(Tensor phi, Tensor psi, Tensor v, Tensor(a!) state, *, bool enable_gqa=False, "
      "Tensor? slots=None) -> Tensor",
      {at::Tag::pt2_compliant_tag});
}

}  // namespace elattn
