#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <numeric>

#include "ops/cpu/fill_params.h"

namespace elattn::cpu {
namespace {

/// (N + 1,) int64, contiguous, values checked.
at::Tensor checked_cu_seqlens(const AttentionArguments& a, int64_t total) {
  const char* op = attention_name(a.kernel);
  at::Tensor cu_seqlens = a.cu_seqlens->to(at::kLong).contiguous();
  const int64_t* ends = cu_seqlens.const_data_ptr<int64_t>();
  const int64_t sequences = cu_seqlens.numel() - 1;
  TORCH_CHECK(ends[0] == 0, op, ": cu_seqlens must start at 0 but starts at ", ends[0]);
  for (int64_t i = 1; i <= sequences; ++i) {
    TORCH_CHECK(ends[i] >= ends[i - 1], op, ": cu_seqlens must not decrease but cu_seqlens[", i, "] is ", ends[i],
                " after ", ends[i - 1]);
  }
  TORCH_CHECK(ends[sequences] == total, op, ": cu_seqlens must end at the length of the keys, ", total,
              ", but ends at ", ends[sequences]);
  return cu_seqlens;
}

/// The inputs as the kernels read them, and their owner while the kernels run.
struct Inputs {
  AttentionShape shape;
  at::Tensor q, k, v, cu_seqlens, decay, state;
  const AttentionArguments& arguments;

  Inputs(const AttentionArguments& a, const at::Tensor& q_in, const at::Tensor& k_in, const at::Tensor& v_in)
      : shape(attention_shape(a, q_in, k_in, v_in)),
        q(dense_rows(q_in)),
        k(dense_rows(k_in)),
        v(dense_rows(v_in)),
        arguments(a) {
    if (a.cu_seqlens) cu_seqlens = checked_cu_seqlens(a, shape.key_len.expect_int());
    if (a.decay) decay = a.decay->to(accumulation_type(q));
    if (a.state) state = dense_rows(*a.state);
  }

  bool packed() const { return cu_seqlens.defined(); }

  /// Rows of all sequences when packed, so that `batch` does not count.
  Rows input_rows(const at::Tensor& tensor) const {
    Rows result = rows(tensor);
    if (packed()) result.batch = 0;
    return result;
  }

  void fill(AttentionParams& params) const {
    fill_sizes(params, shape, arguments.kernel, q);
    params.is_causal = arguments.is_causal;
    params.scale = arguments.scale;
    params.eps = arguments.eps;
    params.q = input_rows(q);
    params.k = input_rows(k);
    params.v = input_rows(v);
    if (arguments.key_padding_mask) {
      const at::Tensor& mask = *arguments.key_padding_mask;
      params.padding = mask.const_data_ptr<bool>();
      params.padding_batch = mask.stride(0);
      params.padding_row = mask.stride(1);
    }
    if (packed()) params.cu_seqlens = cu_seqlens.const_data_ptr<int64_t>();
    if (decay.defined()) {
      params.decay = decay_rates(decay);
      if (packed()) params.decay.batch = 0;
    }
    if (state.defined()) params.state_in = state_rows(state);
  }
};

/// Multiply-adds of one sequence and kv head, of average length when packed.
int64_t work_per_head(const AttentionParams& p) {
  const int64_t tokens = p.key_len + p.query_len * p.group;
  return tokens * p.head_dim * p.value_dim / (p.cu_seqlens ? std::max<int64_t>(1, p.sequences) : 1);
}

/// Each block of value columns repeats the work on q and k, so heads are only split where threads would wait.
int64_t column_blocks(const AttentionParams& p) {
  const int64_t heads = p.sequences * p.kv_heads;
  const int64_t threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  if (heads == 0 || heads >= 4 * threads || heads * work_per_head(p) < 2 * kWorkPerThread) return 1;
  return std::min(recurrence().max_column_blocks(p.dtype, p.value_dim), threads / std::gcd(heads, threads));
}

/// Whether every head is to be shared by all threads.
bool needs_team(const AttentionParams& p) {
  constexpr int64_t kLong = 2048;  // tokens, several blocks of a team
  return p.is_causal && !is_squared(p.kernel) && !at::in_parallel_region() && p.key_len >= kLong * p.sequences &&
         p.sequences * p.kv_heads < at::get_num_threads();
}

void run_forward(const Inputs& inputs, const at::Tensor& out, const at::Tensor& final_state) {
  AttentionParams params;
  inputs.fill(params);
  params.out = inputs.input_rows(out);
  if (final_state.defined()) params.state_out = state_rows(final_state);
  if (needs_team(params)) {
    const Parallel parallel = [](int64_t parts, const std::function<void(int64_t)>& f) {
      at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) f(i);
      });
    };
    for (int64_t i = 0; i < params.sequences * params.kv_heads; ++i) {
      recurrence().team(params, i / params.kv_heads, i % params.kv_heads, at::get_num_threads(), parallel);
    }
    return;
  }
  params.column_blocks = column_blocks(params);
  at::parallel_for(0, params.sequences * params.kv_heads * params.column_blocks,
                   grain_size(work_per_head(params) / params.column_blocks),
                   [&](int64_t begin, int64_t end) { recurrence().forward(params, begin, end); });
}

at::Tensor attention(const AttentionArguments& a, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
  const Inputs inputs(a, q, k, v);
  const at::Tensor out = new_output(inputs.shape, q);
  run_forward(inputs, out, {});
  return out;
}

OutAndState attention_with_state(const AttentionArguments& a, const at::Tensor& q, const at::Tensor& k,
                                 const at::Tensor& v) {
  const Inputs inputs(a, q, k, v);
  const at::Tensor out = new_output(inputs.shape, q);
  const at::Tensor final_state = new_final_state(inputs.shape, q);
  run_forward(inputs, out, final_state);
  return {out, final_state};
}

/// The gradient of decay before the sum over what decay was broadcast to:
/// (1 or sequences, Hkv, 1 or L, 1 or D), in the accumulation type.
at::Tensor new_partial_grad_decay(const Inputs& inputs, const AttentionParams& params) {
  const int64_t dims = inputs.decay.dim();
  const bool per_token = dims >= 3;
  const bool per_channel = dims == 2 || dims == 4;
  return at::empty({inputs.packed() && per_token ? 1 : params.sequences, params.kv_heads,
                    per_token ? params.key_len : 1, per_channel ? params.head_dim : 1},
                   inputs.decay.options());
}

Gradients attention_backward(const AttentionArguments& a, const at::Tensor& grad_out_in,
                             const OptionalTensor& grad_state_in, const at::Tensor& q, const at::Tensor& k,
                             const at::Tensor& v) {
  const Inputs inputs(a, q, k, v);
  check_gradients(inputs.shape, a, q, grad_out_in, grad_state_in);
  Gradients gradients = new_gradients(inputs.shape, a, q, k, v);
  auto& [grad_q, grad_k, grad_v, grad_decay, grad_state] = gradients;

  AttentionBackwardParams params;
  inputs.fill(params);
  const at::Tensor grad_out = dense_rows(grad_out_in);
  params.grad_out = inputs.input_rows(grad_out);
  at::Tensor grad_final_state;
  if (grad_state_in) {
    grad_final_state = dense_rows(*grad_state_in);
    params.grad_state_out = state_rows(grad_final_state);
  }
  params.grad_q = inputs.input_rows(grad_q);
  params.grad_k = inputs.input_rows(grad_k);
  params.grad_v = inputs.input_rows(grad_v);
  if (a.state) params.grad_state_in = state_rows(grad_state);
  at::Tensor partial;
  if (a.decay) {
    partial = new_partial_grad_decay(inputs, params);
    params.grad_decay_data = partial.mutable_data_ptr();
    params.grad_decay = decay_rates(partial);
    if (a.decay->dim() < 3) params.grad_decay.row = 0;
    if (a.decay->dim() % 2 == 1) params.grad_decay.channel = 0;
    if (inputs.packed() && a.decay->dim() >= 3) params.grad_decay.batch = 0;
  }

  at::parallel_for(0, params.sequences * params.kv_heads, grain_size(4 * work_per_head(params)),
                   [&](int64_t begin, int64_t end) { recurrence().backward(params, begin, end); });

  if (a.decay) {
    if (a.decay->dim() < 3) partial = partial.sum(0);
    grad_decay.copy_(partial.view(a.decay->sizes()));
  }
  return gradients;
}

}  // namespace

TORCH_LIBRARY_IMPL(elattn, CPU, m) { implement_attention<attention, attention_with_state, attention_backward>(m); }

}  // namespace elattn::cpu
