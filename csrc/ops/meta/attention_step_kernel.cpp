#include <torch/library.h>

#include "ops/attention_shape.h"

namespace elattn {
namespace {

at::Tensor attention_step(const StepArguments& a, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                          const at::Tensor& state) {
  return new_step_output(attention_step_shape(a, q, k, v, state), q);
}

}  // namespace

TORCH_LIBRARY_IMPL(elattn, Meta, m) {
  m.impl("attention_step", Unpacked<attention_step>::attention);
  m.impl("feature_attention_step", Unpacked<attention_step>::feature_attention);
}

}  // namespace elattn
