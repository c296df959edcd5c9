#pragma once

#include "cuda/chunked/fragments.cuh"

namespace elattn::cuda::chunked {

/// A matrix that a block carries in registers from chunk to chunk: S, the gradient of S, or one of them transposed.
/// Each warp has 16 rows, in the layout in which they are, transposed, a right operand.
template <int kColumns>
class Carried {
 public:
  /// The first row of this warp.
  static __device__ __forceinline__ int row() { return kTile * warp(); }

  /// f(element, row, column).
  template <class F>
  __device__ __forceinline__ void for_each(F&& f) {
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) f(x_[n][e], row() + row_of(e & 2), 8 * n + column_of(0) + e % 2);
    }
  }

  __device__ __forceinline__ void scale_columns(const float* factors) {
    for_each([&](float& x, int, int column) { x *= factors[column]; });
  }

  __device__ __forceinline__ void scale_rows(const float* factors) {
    const float upper = factors[row() + row_of(0)], lower = factors[row() + row_of(2)];
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) x_[n][e] *= e < 2 ? upper : lower;
    }
  }

  /// Adds rows^T columns: sums over the kCount tiles of tokens from token `first` on.
  template <int kCount>
  __device__ __forceinline__ void add(const Tile<bf16>& rows, const Tile<bf16>& columns, int first) {
#pragma unroll
    for (int token = 0; token < kTile * kCount; token += kTile) {
      Left left;
      load_transposed(left, rows, first + token, row());
#pragma unroll
      for (int column = 0; column < kColumns; column += kTile) {
        Right right;
        load_block(right, columns, first + token, column);
        mma_m16n8k16<bf16>(x_[column / 8], left.x, right.x[0], right.x[1]);
        mma_m16n8k16<bf16>(x_[column / 8 + 1], left.x, right.x[2], right.x[3]);
      }
    }
  }

  /// Adds `left` times the transposed matrix, which is taken as the sum of two bfloat16: kCount tiles of tokens by the
  /// rows of this warp.
  template <int kCount>
  __device__ __forceinline__ void multiply(Accumulator (&sums)[kCount], const Tile<bf16>& left, int first) const {
#pragma unroll
    for (int column = 0; column < kColumns; column += kTile) {
      const float(&a)[4] = x_[column / 8], (&b)[4] = x_[column / 8 + 1];
      const float pairs[4][2] = {{a[0], a[1]}, {b[0], b[1]}, {a[2], a[3]}, {b[2], b[3]}};
      Right rounded, rest;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        rounded.x[i] = pack(pairs[i][0], pairs[i][1]);
        rest.x[i] = pack(pairs[i][0] - low(rounded.x[i]), pairs[i][1] - high(rounded.x[i]));
      }
#pragma unroll
      for (int tile = 0; tile < kCount; ++tile) {
        Left tokens;
        load_block(tokens, left, first + kTile * tile, column);
        chunked::multiply(sums[tile], tokens, rounded);
        chunked::multiply(sums[tile], tokens, rest);
      }
    }
  }

 private:
  float x_[kColumns / 8][4] = {};  // blocks of eight columns
};

}  // namespace elattn::cuda::chunked
