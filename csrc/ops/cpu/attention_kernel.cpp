#include <ATen/Parallel.h>
#include <torch/library.h>

#include <numeric>

#include "ops/attention_inputs.h"
#include "ops/cpu/grain_size.h"
#include "ops/cpu/recurrence/params.h"

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

AttentionInputs inputs(const AttentionArguments& a, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
  return {a, q, k, v, [&](const AttentionShape& shape) { return checked_cu_seqlens(a, shape.key_len.expect_int()); }};
}

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

/// Whether every head may be shared by all threads.
bool needs_team(const AttentionParams& p) {
  constexpr int64_t kLong = 2048;  // tokens, several blocks of a team
  const int64_t heads = p.sequences * p.kv_heads;
  return p.is_causal && !is_squared(p.kernel) && !at::in_parallel_region() && p.key_len >= kLong * p.sequences &&
         heads > 0 && heads < at::get_num_threads();
}

void at_the_same_time(int64_t parts, const std::function<void(int64_t)>& f) {
  at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i);
  });
}

void run_forward(AttentionParams& params) {
  if (needs_team(params)) {
    return recurrence().forward_team(params, at::get_num_threads(), at_the_same_time);
  }
  params.column_blocks = column_blocks(params);
  at::parallel_for(0, params.sequences * params.kv_heads * params.column_blocks,
                   grain_size(work_per_head(params) / params.column_blocks),
                   [&](int64_t begin, int64_t end) { recurrence().forward(params, begin, end); });
}

void run_backward(AttentionBackwardParams& params) {
  const int64_t heads = params.sequences * params.kv_heads;
  const int64_t members = std::min<int64_t>(at::get_num_threads(),
                                            recurrence().max_members(params.dtype, params.head_dim, params.value_dim));
  // A team is not as fast as its members would be with a head each.
  if (needs_team(params) && 2 * heads <= members) return recurrence().backward_team(params, members, at_the_same_time);
  at::parallel_for(0, heads, grain_size(4 * work_per_head(params)),
                   [&](int64_t begin, int64_t end) { recurrence().backward(params, begin, end); });
}

at::Tensor attention(const AttentionArguments& a, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
  const AttentionInputs in = inputs(a, q, k, v);
  const at::Tensor out = new_output(in.shape(), q);
  in.forward(out, {}, run_forward);
  return out;
}

OutAndState attention_with_state(const AttentionArguments& a, const at::Tensor& q, const at::Tensor& k,
                                 const at::Tensor& v) {
  const AttentionInputs in = inputs(a, q, k, v);
  const at::Tensor out = new_output(in.shape(), q);
  const at::Tensor final_state = new_final_state(in.shape(), q);
  in.forward(out, final_state, run_forward);
  return {out, final_state};
}

Gradients attention_backward(const AttentionArguments& a, const at::Tensor& grad_out, const OptionalTensor& grad_state,
                             const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
  return inputs(a, q, k, v).backward(grad_out, grad_state, q, k, v, run_backward);
}

}  // namespace

TORCH_LIBRARY_IMPL(elattn, CPU, m) { implement_attention<attention, attention_with_state, attention_backward>(m); }

}  // namespace elattn::cpu
