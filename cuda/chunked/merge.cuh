#pragma once

#include "cuda/chunked/plan.h"
#include "cuda/recurrence/rows.cuh"

namespace elattn::cuda::chunked {

inline constexpr int kMergeThreads = kLargestDim;

/// One channel of a state: S of this thread's value column, z and the gauge.
struct Channel {
  float s = 0, z = 0, m = -INFINITY;

  __device__ __forceinline__ Channel() {}
  __device__ __forceinline__ Channel(const float* state, const StateOffsets& at, int64_t d, int64_t columns,
                                     bool has_column)
      : s(has_column ? state[at.matrix + d * columns + thread()] : 0), z(state[at.z + d]), m(state[at.m + d]) {
    const float factor = expf(state[at.r + d]);
    s *= factor;
    z *= factor;
  }

  /// The keys of both (docs/math.md, 5).
  __device__ __forceinline__ Channel merged(const Channel& other) const {
    if (z == 0) return other;
    if (other.z == 0) return *this;
    Channel both;
    both.m = fmaxf(m, other.m);
    const float a = expf(m - both.m), b = expf(other.m - both.m);
    both.s = a * s + b * other.s;
    both.z = a * z + b * other.z;
    return both;
  }
};

/// States of the pieces of one head become those of the keys up to their ends, the initial state included. A block has
/// one channel, a thread one value column.
__device__ __forceinline__ void merge_channel(const AttentionParams& p, const Plan& plan, float* slots, int64_t block) {
  const StateOffsets& at = plan.state;
  const int64_t d = block % p.head_dim, head = block / p.head_dim;
  const bool has_column = thread() < p.value_dim;
  const auto channel = [&](const float* state) { return Channel(state, at, d, p.value_dim, has_column); };
  const float* initial = state_row<float>(p.state_in, head / p.kv_heads, head % p.kv_heads);
  Channel sum = initial ? channel(initial) : Channel();
  float* slot = slots + head * plan.slots * at.size;
  Channel next = channel(slot);
  for (int64_t i = 0; i < plan.slots; ++i, slot += at.size) {
    sum = sum.merged(next);
    if (i + 1 < plan.slots) next = channel(slot + at.size);
    __syncthreads();  // all threads have read z and the gauge
    if (has_column) slot[at.matrix + d * p.value_dim + thread()] = sum.s;
    if (thread() == 0) {
      slot[at.z + d] = sum.z;
      slot[at.m + d] = sum.z == 0 ? -INFINITY : sum.m;
    }
  }
}

}  // namespace elattn::cuda::chunked
