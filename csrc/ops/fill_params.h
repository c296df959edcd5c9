#pragma once

#include <ATen/core/Tensor.h>

#include "ops/attention_shape.h"
#include "ops/params.h"

/// From tensors to the structs that the kernels read.
namespace elattn {

inline DType kernel_dtype(const at::Tensor& q) {
  switch (q.scalar_type()) {
    case at::kDouble: return DType::Double;
    case at::kBFloat16: return DType::BFloat16;
    case at::kHalf: return DType::Half;
    default: return DType::Float;
  }
}

/// `tensor`, or a copy of it where the last dimension is not contiguous.
inline at::Tensor dense_rows(const at::Tensor& tensor) {
  return tensor.stride(-1) == 1 || tensor.size(-1) == 1 ? tensor : tensor.contiguous();
}

/// The kernels promise not to write through the inputs' pointers.
inline void* data(const at::Tensor& tensor) { return const_cast<void*>(tensor.const_data_ptr()); }

/// Of a (B, H, L, D) or, in a step, (B, H, D) tensor.
inline Rows rows(const at::Tensor& tensor) {
  return {data(tensor), tensor.stride(0), tensor.stride(1), tensor.dim() == 4 ? tensor.stride(2) : 0};
}

inline State state_rows(const at::Tensor& state) { return {data(state), state.stride(0), state.stride(1)}; }

/// Of rates (Hkv,), (Hkv, D), (B, Hkv, L) or (B, Hkv, L, D).
inline Decay decay_rates(const at::Tensor& decay) {
  const auto stride = [&](int64_t dim) { return dim < decay.dim() ? decay.stride(dim) : 0; };
  if (decay.dim() <= 2) return {data(decay), 0, stride(0), 0, stride(1)};
  return {data(decay), stride(0), stride(1), stride(2), stride(3)};
}

/// Of the rates of one step: (Hkv,), (Hkv, D), (B, Hkv, 1) or (B, Hkv, D).
inline Decay step_decay_rates(const at::Tensor& decay) {
  if (decay.dim() <= 2) return decay_rates(decay);
  return {data(decay), decay.stride(0), decay.stride(1), 0, decay.size(2) == 1 ? 0 : decay.stride(2)};
}

inline void fill_sizes(AttentionParams& params, const AttentionShape& shape, KernelKind kernel, const at::Tensor& q) {
  params.kernel = kernel;
  params.dtype = kernel_dtype(q);
  params.sequences = shape.sequences.expect_int();
  params.kv_heads = shape.kv_heads.expect_int();
  params.group = params.kv_heads == 0 ? 1 : shape.heads.expect_int() / params.kv_heads;
  params.query_len = shape.query_len.expect_int();
  params.key_len = shape.key_len.expect_int();
  params.head_dim = shape.head_dim.expect_int();
  params.value_dim = shape.value_dim.expect_int();
}

}  // namespace elattn
