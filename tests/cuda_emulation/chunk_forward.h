#pragma once

#include <cuda_bf16.h>
#include <driver_types.h>

#include <cstddef>
#include <string_view>

namespace elattn::cuda::example {

/// Mistakes that people make in such a kernel, each planted in an instance of its own.
enum class Planted {
  kNothing,
  kNoBarrierAfterLoad,
  kNoBarrierAtEnd,
  kNoSyncwarp,
  kWaitTooWeak,
  kFragmentRow,
  kMatricesSwapped,
  kTailStored,
  kTailLoaded,
  kDivergentBarrier,
  kSharedTooSmall,
};

constexpr std::string_view kPlantedNames[] = {
    "nothing",       "no_barrier_after_load", "no_barrier_at_end", "no_syncwarp",
    "wait_too_weak", "fragment_row",          "matrices_swapped",  "tail_stored",
    "tail_loaded",   "divergent_barrier",     "shared_too_small",
};

constexpr int kDim = 64;  // of keys and of values

/// o_i = scale * sum over j <= i of (q_i . k_j) v_j for each of `heads` sequences of `length` tokens.
struct ChunkForward {
  const __nv_bfloat16* q;  // (heads, length, 64), as k, v and o
  const __nv_bfloat16* k;
  const __nv_bfloat16* v;
  __nv_bfloat16* o;
  float* final_state;  // (heads, 64, 64): sum of k_j v_j^T
  int heads;
  int length;
  float scale;
};

cudaError_t chunk_forward(const ChunkForward& p, Planted planted);

}  // namespace elattn::cuda::example
