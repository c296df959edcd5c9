#include "cuda/chunked/merge.h"
#include "cuda/launch.cuh"
#include "cuda/recurrence/rows.cuh"

namespace elattn::cuda::chunked {
namespace {

constexpr int kThreads = kLargestDim;

/// One channel of a state: S of this thread's value column, z and the gauge.
struct Channel {
  float s = 0, z = 0, m = -INFINITY;

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

/// Where a block has its channel, and a thread its value column.
struct ChannelPlace {
  int64_t row, d;  // row: of all heads of all sequences
  int64_t element;
  bool has_column;

  __device__ __forceinline__ explicit ChannelPlace(const AttentionParams& p)
      : row(blockIdx.x / p.head_dim),
        d(blockIdx.x % p.head_dim),
        element(d * p.value_dim + thread()),
        has_column(thread() < p.value_dim) {}

  template <class T>
  __device__ __forceinline__ T* head_of(const AttentionParams& p, const State& state) const {
    return state_row<T>(state, row / p.kv_heads, row % p.kv_heads);
  }
};

__global__ void __launch_bounds__(kThreads) merge_states_kernel(AttentionParams p, Plan plan, float* states) {
  const ChannelPlace place(p);
  const StateOffsets& at = plan.state;
  const int64_t d = place.d;
  const auto channel = [&](const float* state) {
    const float factor = expf(state[at.r + d]);
    return Channel{place.has_column ? state[at.matrix + place.element] * factor : 0, state[at.z + d] * factor,
                   state[at.m + d]};
  };
  const float* initial = place.head_of<const float>(p, p.state_in);
  Channel sum = initial ? channel(initial) : Channel();
  Channel next = channel(plan.slot(states, place.row, 0));
  for (int64_t i = 0; i < plan.slots; ++i) {
    float* slot = plan.slot(states, place.row, i);
    sum = sum.merged(next);
    if (i + 1 < plan.slots) next = channel(slot + at.size);
    __syncthreads();  // all threads have read z and the gauge
    if (place.has_column) slot[at.matrix + place.element] = sum.s;
    if (thread() == 0) {
      slot[at.z + d] = sum.z;
      slot[at.m + d] = sum.z == 0 ? -INFINITY : sum.m;
    }
  }
}

__global__ void __launch_bounds__(kThreads)
    merge_gradients_kernel(AttentionBackwardParams p, Plan plan, float* states) {
  const ChannelPlace place(p);
  const StateOffsets& at = plan.state;
  const int64_t d = place.d;
  struct Part {
    float s, z, factor;
  };
  const auto part = [&](const float* state) {
    return Part{place.has_column ? state[at.matrix + place.element] : 0, state[at.z + d], state[at.m + d]};
  };
  const float* final = place.head_of<const float>(p, p.grad_state_out);
  float s = final && place.has_column ? final[at.matrix + place.element] : 0, z = final ? final[at.z + d] : 0;
  Part next = part(plan.slot(states, place.row, plan.slots - 1));
  for (int64_t i = plan.slots - 1; i >= 0; --i) {
    float* slot = plan.slot(states, place.row, i);
    s = next.s + next.factor * s;
    z = next.z + next.factor * z;
    if (i > 0) next = part(slot - at.size);
    __syncthreads();  // all threads have read z
    if (place.has_column) slot[at.matrix + place.element] = s;
    if (thread() == 0) slot[at.z + d] = z;
  }
}

template <class P>
cudaError_t run(void (*kernel)(P, Plan, float*), const P& p, const Plan& plan, float* states, cudaStream_t stream) {
  return launch(kernel, grid(plan.heads * p.head_dim), dim3(kThreads), 0, stream, p, plan, states);
}

}  // namespace

cudaError_t merge_states(const AttentionParams& p, const Plan& plan, float* states, cudaStream_t stream) {
  return run(merge_states_kernel, p, plan, states, stream);
}

cudaError_t merge_gradients(const AttentionBackwardParams& p, const Plan& plan, float* states, cudaStream_t stream) {
  return run(merge_gradients_kernel, p, plan, states, stream);
}

}  // namespace elattn::cuda::chunked
