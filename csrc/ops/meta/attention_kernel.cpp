#include <torch/library.h>

#include "ops/attention_shape.h"

namespace elattn {
namespace {

at::Tensor attention(const AttentionArguments& a, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
  return new_output(attention_shape(a, q, k, v), q);
}

OutAndState attention_with_state(const AttentionArguments& a, const at::Tensor& q, const at::Tensor& k,
                                 const at::Tensor& v) {
  const AttentionShape shape = attention_shape(a, q, k, v);
  return {new_output(shape, q), new_final_state(shape, q)};
}

Gradients attention_backward(const AttentionArguments& a, const at::Tensor& grad_out, const OptionalTensor& grad_state,
                             const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
  const AttentionShape shape = attention_shape(a, q, k, v);
  check_gradients(shape, a, q, grad_out, grad_state);
  return new_gradients(shape, a, q, k, v);
}

}  // namespace

TORCH_LIBRARY_IMPL(elattn, Meta, m) { implement_attention<attention, attention_with_state, attention_backward>(m); }

}  // namespace elattn
