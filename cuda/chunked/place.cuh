#pragma once

#include "cuda/chunked/plan.h"
#include "cuda/recurrence/rows.cuh"

namespace elattn::cuda::chunked {

/// What a block works on. It lies in shared memory: needed once a chunk, it is not worth the registers.
struct Place {
  Sequence sequence;
  int64_t row;             // of all heads of all sequences
  int index, head, piece;  // of the sequence, the kv head, and the plan
  Chunks keys;             // of the piece
};

/// That of block number `block`, of as many pieces of each head. Ends with a barrier.
__device__ __forceinline__ const Place& find_place(Place* place, const AttentionParams& p, const Plan& plan,
                                                   int64_t pieces, int64_t block) {
  if (thread() == 0) {
    const int64_t row = block / pieces, index = row / p.kv_heads, piece = block % pieces;
    const Sequence s = sequence(p, index);
    *place = {s,
              row,
              static_cast<int>(index),
              static_cast<int>(row % p.kv_heads),
              static_cast<int>(piece),
              plan.piece(s.key_len, piece)};
  }
  __syncthreads();
  return *place;
}

}  // namespace elattn::cuda::chunked
