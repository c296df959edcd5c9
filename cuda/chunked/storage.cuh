#pragma once

#include "cuda/chunked/fragments.cuh"
#include "cuda/chunked/place.cuh"
#include "cuda/exp2.cuh"

namespace elattn::cuda::chunked {

/// The shared memory of a block as far as its keys go. kSize is head_dim rounded up, kValues below value_dim; columns
/// beyond the real ones are zero.
template <int kSize, int kWarps>
struct KeyStorage {
  static constexpr int kThreads = kWarps * kWarpSize;

  Tile<bf16> psi;              // (tokens, size)
  float* by_tile;              // (tiles, size): maxima of keys until the tile's psi is known, then sums of psi
  float *gauge, *z, *factors;  // (size): as the queries of the piece see them, and how S comes there
  uint32_t* valid;             // (2): a bit for each token that is no padding
  unsigned* words;             // (warps), for block_or
  Place* place;

  __host__ __device__ explicit KeyStorage(Arena& arena) {
    psi = arena.tile<bf16>(kChunk, kSize);
    by_tile = arena.take<float>(kTiles * kSize);
    gauge = arena.take<float>(kSize);
    z = arena.take<float>(kSize);
    factors = arena.take<float>(kSize);
    valid = arena.take<uint32_t>(2);
    words = arena.take<unsigned>(kWarps);
    place = arena.take<Place>(1);
  }
};

/// Blocks that share a multiprocessor.
template <int kSize, int kValues>
inline constexpr int kBlocks = kSize + kValues <= 128 ? 3 : 1;

/// Of a forward.
template <int kSize, int kValues>
struct Storage : KeyStorage<kSize, kValues / kTile> {
  // Two chunks of each: one is in work while the next is loaded. Queries become phi, and then the outputs.
  Tile<bf16> q, k, v;  // (2 tokens, size), (2 tokens, size), (2 tokens, values)
  Tile<bf16> scores;   // (queries, keys)
  float* past;         // (tokens): phi . z

  static constexpr int kWarps = kValues / kTile;

  __host__ __device__ explicit Storage(Arena& arena) : KeyStorage<kSize, kWarps>(arena) {
    q = arena.tile<bf16>(2 * kChunk, kSize > kValues ? kSize : kValues);
    k = arena.tile<bf16>(2 * kChunk, kSize);
    v = arena.tile<bf16>(2 * kChunk, kValues);
    scores = arena.tile<bf16>(kChunk, kChunk);
    past = arena.take<float>(kChunk);
  }
};

/// The size of a kind of storage.
template <class Tiles>
size_t bytes_of() {
  Arena arena(nullptr);
  Tiles{arena};
  return arena.bytes();
}

/// One of two chunks.
__device__ __forceinline__ Tile<bf16> chunk_of(const Tile<bf16>& tile, int stage) {
  return {tile.at(stage * kChunk, 0), tile.ld, kChunk, tile.cols};
}

/// The gauge of a channel without keys: below every key, yet k - none is a number. Queries see -infinity, which they
/// can be added to without a number that is one.
inline constexpr float kNone = -largest_number<float>();

inline constexpr float kLog2E = 1.44269504f;

/// exp(x) for a result that is rounded to bfloat16: its relative error, 2^-17 for x = -60, does not show.
__device__ __forceinline__ float feature(float x) { return fast_exp2(x * kLog2E); }

}  // namespace elattn::cuda::chunked
