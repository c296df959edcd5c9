#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/chunked/fragments.cuh"
#include "cuda/recurrence/recurrence.h"

/// Where states have their parts, and how calls cut the work.
namespace elattn::cuda::chunked {

inline constexpr int kLargestDim = 128;

/// Of a state, in floats.
struct StateOffsets {
  int64_t matrix, z, m, r, size;

  explicit StateOffsets(const AttentionParams& p) {
    const StateLayout layout = state_layout(KernelKind::HadamardExp);
    const auto offset = [&](const char* field) { return layout.offset(field, p.head_dim, p.value_dim); };
    matrix = offset("S");
    z = offset("z");
    m = offset("m");
    r = offset("r");
    size = layout.size(p.head_dim, p.value_dim);
  }
};

/// Chunks [begin, end).
struct Chunks {
  int begin, end;
};

inline __host__ __device__ int64_t chunks_of(int64_t tokens) { return (tokens + kChunk - 1) / kChunk; }

/// Few long sequences are cut into pieces so that every multiprocessor has work. Three launches: the states of the keys
/// of single pieces; each of them merged with all before it; then the results, which begin at the merged states. On the
/// way back the same with gradients of states and all after them.
struct Plan {
  StateOffsets state;
  int64_t heads;  // of all sequences
  int64_t pieces = 1;
  int64_t slots = 0;  // states per head in the workspace

  Plan(const AttentionParams& p, const Device& device) : state(p), heads(p.sequences * p.kv_heads) {
    if (p.cu_seqlens || heads == 0) return;
    const int64_t chunks = chunks_of(std::max(p.query_len, p.key_len));
    const int64_t wanted = kBlocksPerMultiprocessor * device.multiprocessors / heads;
    pieces = std::clamp<int64_t>(wanted, 1, std::max<int64_t>(chunks / kLeastChunks, 1));
    // Causal: the last piece is before no other.
    if (pieces > 1) slots = p.is_causal ? pieces - 1 : pieces;
  }

  size_t workspace() const { return static_cast<size_t>(heads * slots * state.size) * sizeof(float); }

  /// Slot i of head `row` of all sequences.
  __host__ __device__ float* slot(float* states, int64_t row, int64_t i) const {
    return states + (row * slots + i) * state.size;
  }

  __host__ __device__ Chunks piece(int64_t tokens, int64_t i) const {
    const int64_t all = chunks_of(tokens), each = (all + pieces - 1) / pieces;
    const auto bounded = [&](int64_t chunk) { return static_cast<int>(chunk < all ? chunk : all); };
    return {bounded(i * each), bounded((i + 1) * each)};
  }

 private:
  static constexpr int64_t kBlocksPerMultiprocessor = 2;
  static constexpr int64_t kLeastChunks = 4;  // of a piece, whose state costs the traffic of about two
};

}  // namespace elattn::cuda::chunked
