#pragma once

#include <cstdint>

#include "ops/kernel_kind.h"

/// What the operators hand to the kernels of every backend. No ATen type here: CPU kernels are compiled once per
/// instruction set, CUDA kernels by another compiler.
/// Strides are in elements, 64-bit, and any of them may be 0 (broadcast) or, for inputs, arbitrary.
namespace elattn {

enum class DType : int8_t { Float, Double, BFloat16, Half };

/// (batch, head, row, dim) with a contiguous last dimension. For packed sequences `batch` is 0 and rows run over all of
/// them.
struct Rows {
  void* data = nullptr;
  int64_t batch = 0, head = 0, row = 0;
};

/// Forgetting rates (batch, kv head, token, channel), already in the accumulation type; a stride of 0 broadcasts.
struct Decay {
  const void* data = nullptr;
  int64_t batch = 0, head = 0, row = 0, channel = 0;
};

/// (batch or slot, kv head, state_size), last dimension contiguous, in the accumulation type.
struct State {
  void* data = nullptr;
  int64_t batch = 0, head = 0;
};

/// Sums, states, decay and the gradients of decay and state are float, or double for double inputs (the accumulation
/// type).
struct AttentionParams {
  KernelKind kernel = KernelKind::HadamardExp;
  DType dtype = DType::Float;  // of q, k, v, out and their gradients
  bool is_causal = false;
  double scale = 1, eps = 0;
  int64_t sequences = 0;               // batch entries, or packed sequences
  int64_t kv_heads = 0, group = 1;     // query head h reads kv head h / group
  int64_t query_len = 0, key_len = 0;  // of each sequence; unused when packed
  int64_t head_dim = 0, value_dim = 0;
  Rows q, k, v, out;              // k holds psi and q holds phi for KernelKind::Features
  const bool* padding = nullptr;  // true = padding, (batch, key)
  int64_t padding_batch = 0, padding_row = 0;
  const int64_t* cu_seqlens = nullptr;  // (sequences + 1), or null
  Decay decay;
  State state_in, state_out;       // either may be absent
  const int64_t* slots = nullptr;  // step only: pool row of each sequence, -1 = inactive
  int64_t column_blocks = 1;       // a head's value columns are shared out among this many work items
};

struct AttentionBackwardParams : AttentionParams {
  Rows grad_out;         // (batch, head, query, Dv)
  State grad_state_out;  // gradient of the final state, or absent
  Rows grad_q, grad_k, grad_v;
  // Partial gradient of decay (sequence, kv head, token or 1, channel or 1): `grad_decay.data` is written, never read
  // before; where a stride is 0 the gradient is summed over that dimension, but never over sequences (for packed
  // sequences with rates per token, `batch` is 0 because the tokens already tell the sequences apart).
  void* grad_decay_data = nullptr;
  Decay grad_decay;     // strides only
  State grad_state_in;  // gradient of the initial state, or absent
};

}  // namespace elattn
