#pragma once

#include "cuda/async_copy.cuh"
#include "cuda/chunked/keys.cuh"
#include "cuda/recurrence/rows.cuh"

/// Chunks of rows between the caller's tensors and shared memory.
namespace elattn::cuda::chunked {

/// Of a chunk of a sequence.
__device__ __forceinline__ int tokens_of(int64_t length, int chunk) {
  const int64_t rest = length - int64_t{kChunk} * chunk;
  return rest < kChunk ? static_cast<int>(rest) : kChunk;
}

/// The rows of a tensor from `token` of one head on.
__device__ __forceinline__ bf16* row_at(const Rows& rows, int64_t batch, int64_t head, int64_t token) {
  return static_cast<bf16*>(rows.data) + batch * rows.batch + head * rows.head + token * rows.row;
}

/// How a block's threads share a chunk of rows out: 16 bytes each of kRows rows at a time.
template <int kThreads, int kColumns>
struct RowShare {
  static constexpr int kVectors = kColumns / kVector;  // of a row
  static constexpr int kRows = kThreads / kVectors;
  static_assert(kThreads % kVectors == 0 && kChunk % kRows == 0);
  static __device__ __forceinline__ int row() { return thread() / kVectors; }
  static __device__ __forceinline__ int column() { return thread() % kVectors * kVector; }
};

/// Copies `count` rows of `dim` elements, `stride` apart; what a chunk has beyond them becomes zero.
template <int kThreads, int kColumns>
__device__ __forceinline__ void fetch(const Tile<bf16>& to, const bf16* from, int64_t stride, int count, int64_t dim) {
  using Share = RowShare<kThreads, kColumns>;
  const int r = Share::row(), c = Share::column(), rows = c < dim ? count : 0;
  const bf16* row = from + static_cast<unsigned>(r) * stride + static_cast<unsigned>(c);
#pragma unroll
  for (int i = 0; i < kChunk; i += Share::kRows, row += Share::kRows * stride) {
    const bool inside = r + i < rows;
    cp_async<16>(to.at(r, c) + i * to.ld, inside ? row : from, inside ? 16 : 0);
  }
}

/// Copies the rows of a piece; `to` is where the first row of the chunk goes.
template <int kThreads, int kColumns>
__device__ __forceinline__ void store(bf16* to, int64_t stride, const Tile<bf16>& from, const Piece& piece,
                                      int64_t dim) {
  using Share = RowShare<kThreads, kColumns>;
  const int r = Share::row(), c = Share::column(), end = c < dim ? piece.end : 0;
  bf16* row = to + static_cast<unsigned>(r) * stride + static_cast<unsigned>(c);
#pragma unroll 2
  for (int i = 0; i < kChunk; i += Share::kRows, row += Share::kRows * stride) {
    if (r + i >= piece.begin && r + i < end) {
      *reinterpret_cast<uint4*>(row) = *reinterpret_cast<const uint4*>(from.at(r, c) + i * from.ld);
    }
  }
}

/// Whether the thread's token of a chunk that begins at `token` of the batch entry, and has `count`, is a key.
__device__ __forceinline__ bool is_key(const AttentionParams& p, const Sequence& s, int64_t token, int count) {
  if (thread() >= count) return false;
  return !p.padding || !p.padding[s.batch * p.padding_batch + (token + thread()) * p.padding_row];
}

/// Leaves a bit for each token of a chunk; a barrier must follow.
__device__ __forceinline__ void share_valid(bool is_valid, uint32_t* words) {
  if (warp() >= kChunk / kWarpSize) return;
  const uint32_t bits = __ballot_sync(kFullMask, is_valid);
  if (lane() == 0) words[warp()] = bits;
}

__device__ __forceinline__ uint64_t shared_valid(const uint32_t* words) {
  return words[0] | static_cast<uint64_t>(words[1]) << 32;
}

/// What lies under a mask may be NaN.
template <int kThreads, int kColumns>
__device__ __forceinline__ void clear_padding(const Tile<bf16>& rows, uint64_t valid) {
#pragma unroll 1
  for (int i = thread(); i < kChunk * kColumns / kVector; i += kThreads) {
    const int r = i / (kColumns / kVector), c = i % (kColumns / kVector) * kVector;
    if (!(valid >> r & 1)) *reinterpret_cast<uint4*>(rows.at(r, c)) = uint4{0, 0, 0, 0};
  }
}

}  // namespace elattn::cuda::chunked
