#pragma once

#include "cuda/chunked/fragments.cuh"

/// Scores of the queries of a piece, which has kCount tiles, and its keys: a lower triangle of blocks of 16 by 16.
namespace elattn::cuda::chunked {

/// f(row of blocks, column of blocks) for the blocks on and below the diagonal, which are shared out among the warps.
template <int kWarps, int kCount, class F>
__device__ __forceinline__ void for_each_block(F&& f) {
#pragma unroll 1
  for (int block = warp(); block < kCount * (kCount + 1) / 2; block += kWarps) {
    const int row = block < 1 ? 0 : block < 3 ? 1 : block < 6 ? 2 : 3, column = block - row * (row + 1) / 2;
    f(row, column);
  }
}

/// f(element, its row, its column) of a block.
template <class F>
__device__ __forceinline__ void for_each_element(Accumulator& block, F&& f) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int e = 0; e < 4; ++e) f(block[half][e], row_of(e & 2), column_of(half) + e % 2);
  }
}

/// Adds the products of the 16 rows of `a` from row i on with the 16 of `b` from row j on.
template <int kColumns>
__device__ __forceinline__ void multiply_rows(Accumulator& sums, const Tile<bf16>& a, int i, const Tile<bf16>& b,
                                              int j) {
#pragma unroll
  for (int column = 0; column < kColumns; column += kTile) {
    Left left;
    Right right;
    load_block(left, a, i, column);
    load_transposed(right, b, j, column);
    multiply(sums, left, right);
  }
}

/// Leaves a block, rounded, with zeros above the diagonal.
__device__ __forceinline__ void save_scores(const Tile<bf16>& to, const Accumulator& block, int row, int column) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int e = 0; e < 4; e += 2) {
      const int i = row_of(e), j = column_of(half);
      const bool all = column < row;
      pair(to, kTile * row, kTile * column, half, e) =
          pack(all || j <= i ? block[half][e] : 0.f, all || j + 1 <= i ? block[half][e + 1] : 0.f);
    }
  }
}

}  // namespace elattn::cuda::chunked
