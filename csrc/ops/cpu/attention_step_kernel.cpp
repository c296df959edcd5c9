#include <ATen/Parallel.h>
#include <c10/util/SmallVector.h>
#include <torch/library.h>

#include <algorithm>

#include "ops/attention_inputs.h"
#include "ops/cpu/grain_size.h"
#include "ops/cpu/recurrence/params.h"

namespace elattn::cpu {
namespace {

using Slots = c10::SmallVector<int64_t, 32>;

template <class Int>
Slots read_slots(const at::Tensor& slots) {
  const Int* data = slots.const_data_ptr<Int>();
  const int64_t stride = slots.stride(0);
  Slots result(slots.size(0));
  for (size_t i = 0; i < result.size(); ++i) result[i] = data[i * stride];
  return result;
}

/// The pool row of each batch entry; every row at most once.
Slots checked_slots(const StepArguments& a, int64_t pool) {
  const char* op = step_name(a.kernel);
  Slots slots = a.slots->scalar_type() == at::kInt ? read_slots<int32_t>(*a.slots) : read_slots<int64_t>(*a.slots);
  for (size_t i = 0; i < slots.size(); ++i) {
    TORCH_CHECK(slots[i] >= -1 && slots[i] < pool, op, ": slots must be -1 or a row of state, which has ", pool,
                ", but slots[", i, "] is ", slots[i]);
  }
  Slots sorted = slots;
  std::sort(sorted.begin(), sorted.end());
  const auto active = std::upper_bound(sorted.begin(), sorted.end(), -1);
  const auto twice = std::adjacent_find(active, sorted.end());
  TORCH_CHECK(twice == sorted.end(), op, ": slots must name a row of state only once but names ", *twice, " twice");
  return slots;
}

at::Tensor attention_step(const StepArguments& a, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                          const at::Tensor& state) {
  const StepInputs in(a, q, k, v, state);
  AttentionParams params;
  in.fill(params);
  Slots slots;
  if (a.slots) {
    slots = checked_slots(a, state.size(0));
    params.slots = slots.data();
  }
  const int64_t work = params.head_dim * params.value_dim * (1 + params.group);
  at::parallel_for(0, params.sequences * params.kv_heads, grain_size(work),
                   [&](int64_t begin, int64_t end) { recurrence().step(params, begin, end); });
  return in.out();
}

}  // namespace

TORCH_LIBRARY_IMPL(elattn, CPU, m) {
  m.impl("attention_step", Unpacked<attention_step>::attention);
  m.impl("feature_attention_step", Unpacked<attention_step>::feature_attention);
}

}  // namespace elattn::cpu
