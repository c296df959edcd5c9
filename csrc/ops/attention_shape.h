#pragma once

#include <ATen/core/Tensor.h>

#include "ops/arguments.h"

/// Checks and output allocation, once for every backend. Sizes may be symbolic; values are not read here.
namespace elattn {

struct AttentionShape {
  c10::SymInt batch;      // of q, k and v
  c10::SymInt sequences;  // batch, or the number of packed sequences
  c10::SymInt heads, kv_heads;
  c10::SymInt query_len, key_len;  // all packed sequences together
  c10::SymInt head_dim, value_dim, state_size;
};

/// The sizes of a call of attention or feature_attention, or an error that names the rule and the value met.
AttentionShape attention_shape(const AttentionArguments& arguments, const at::Tensor& q, const at::Tensor& k,
                               const at::Tensor& v);

/// Same for attention_step and feature_attention_step; query_len and key_len are 1.
AttentionShape attention_step_shape(const StepArguments& arguments, const at::Tensor& q, const at::Tensor& k,
                                    const at::Tensor& v, const at::Tensor& state);

/// Checks the gradients that arrive at the outputs.
void check_gradients(const AttentionShape& shape, const AttentionArguments& arguments, const at::Tensor& q,
                     const at::Tensor& grad_out, const OptionalTensor& grad_state);

/// Checks the decay of one call of a step, or of a merge: (Hkv,), (Hkv, D), (B, Hkv, 1) or (B, Hkv, D).
void check_step_decay(const char* op, KernelKind kernel, const at::Tensor& decay, const c10::SymInt& batch,
                      const c10::SymInt& kv_heads, const c10::SymInt& head_dim);

/// The type of sums, states and the normaliser: float64 for float64 inputs, else float32.
inline at::ScalarType accumulation_type(const at::Tensor& q) {
  return q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

/// An uninitialised (B, H, L, D) tensor. Where `like` lies in memory as (B, L, H, D), so does the result, so that
/// transposing it back and joining the heads costs no copy.
at::Tensor empty_in_order_of(const at::Tensor& like, const c10::SymInt& batch, const c10::SymInt& heads,
                             const c10::SymInt& len, const c10::SymInt& dim);

/// Uninitialised results of the operators.
at::Tensor new_output(const AttentionShape& shape, const at::Tensor& q);
at::Tensor new_final_state(const AttentionShape& shape, const at::Tensor& q);
at::Tensor new_step_output(const AttentionShape& shape, const at::Tensor& q);
Gradients new_gradients(const AttentionShape& shape, const AttentionArguments& arguments, const at::Tensor& q,
                        const at::Tensor& k, const at::Tensor& v);

}  // namespace elattn
