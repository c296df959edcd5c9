#pragma once

#include "cuda/recurrence/block.cuh"
#include "cuda/tile.cuh"

/// The blocked recurrence (docs/math.md, section 6) of one block of threads: rank-1 updates of a matrix S in shared
/// memory, each followed by products with it.
///
///     for every token:  S <- scale * S + sum_u coefficient_u vector_u^T;   result_r = sum_row weight_r[row] * S[row]
///
/// A warp covers kRowGroups groups of rows by 32 columns, 4 of them per lane. A lane keeps its part of S in registers
/// while the tokens pass: 16 x 4 floats make 128 fused multiply-adds of the 36 numbers that a token is read from shared
/// memory for. The operations on one element are the same, in the same order, however columns are shared out.
namespace elattn::cuda {

/// What multiplies S before a token's update: one factor per row or one per column.
enum class Scaling { Rows, Columns };

/// With `reverse` the tokens are taken from the last to the first.
template <class A>
struct Products {
  Tile<A> s;                  // (rows, columns)
  int rows = 0, columns = 0;  // columns: whole warps
  int tokens = 0;
  bool reverse = false;
  int updates = 0, reads = 0;  // per token
  Tile<A> coefficients{};      // (tokens * updates, rows)
  Tile<A> vectors{};           // (tokens * updates, columns)
  Tile<A> weights{};           // (tokens * reads, rows)
  Tile<A> results{};           // (tokens * reads, columns)
  Scaling scaling = Scaling::Rows;
  Tile<A> scales{};     // (tokens, rows or columns)
  unsigned scaled = 0;  // bit t: token t has factors
};

inline constexpr int kRowGroups = 4;
inline constexpr int kLaneColumns = 4;

/// Rows of a lane's part of S where there are many, and what is left of them.
template <class A>
inline constexpr int kTallRows = 64 / sizeof(A);
inline constexpr int kShortRows = 4;

/// Rows of S, and of the operands that run along them, are padded to a multiple of this.
inline constexpr int kRowUnit = kRowGroups * kShortRows;

namespace detail {

/// Rows [row, row + kRowGroups * kRows) and columns [column, column + 32) by one warp.
template <int kRows, class A>
__device__ void tile_products(const Products<A>& p, int row, int column) {
  const int group = lane() / 8;
  const bool first = row == 0;
  const int result_column = column + lane() % 8 * kLaneColumns + group;  // as sum_lane_groups has it
  row += group * kRows;
  column += lane() % 8 * kLaneColumns;
  A s[kRows][kLaneColumns];  // (rows, columns) of this lane
#pragma unroll
  for (int i = 0; i < kRows; ++i) read_row<kLaneColumns>(s[i], p.s.at(row + i, column));

  for (int step = 0; step < p.tokens; ++step) {
    const int t = p.reverse ? p.tokens - 1 - step : step;
    if (p.scaled >> t & 1) {
      if (p.scaling == Scaling::Rows) {
        A scale[kRows];
        read_row<kRows>(scale, p.scales.at(t, row));
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
#pragma unroll
          for (int j = 0; j < kLaneColumns; ++j) s[i][j] *= scale[i];
        }
      } else {
        A scale[kLaneColumns];
        read_row<kLaneColumns>(scale, p.scales.at(t, column));
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
#pragma unroll
          for (int j = 0; j < kLaneColumns; ++j) s[i][j] *= scale[j];
        }
      }
    }
    for (int u = t * p.updates; u < (t + 1) * p.updates; ++u) {
      A coefficient[kRows], vector[kLaneColumns];
      read_row<kRows>(coefficient, p.coefficients.at(u, row));
      read_row<kLaneColumns>(vector, p.vectors.at(u, column));
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int j = 0; j < kLaneColumns; ++j) s[i][j] += coefficient[i] * vector[j];
      }
    }
    for (int r = t * p.reads; r < (t + 1) * p.reads; ++r) {
      A weight[kRows], sum[kLaneColumns] = {};
      read_row<kRows>(weight, p.weights.at(r, row));
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int j = 0; j < kLaneColumns; ++j) sum[j] += weight[i] * s[i][j];
      }
      const A total = sum_lane_groups(sum);
      A& result = p.results(r, result_column);
      result = first ? total : result + total;
    }
  }

#pragma unroll
  for (int i = 0; i < kRows; ++i) write_row<kLaneColumns>(p.s.at(row + i, column), s[i]);
}

}  // namespace detail

/// All of S by the block; barriers lie before and after.
template <class A>
__device__ void products(const Products<A>& p) {
  constexpr int kTall = kRowGroups * kTallRows<A>;
  for (int column = warp() * kWarpSize; column < p.columns; column += warps() * kWarpSize) {
    int row = 0;
    for (; row + kTall <= p.rows; row += kTall) detail::tile_products<kTallRows<A>>(p, row, column);
    for (; row < p.rows; row += kRowUnit) detail::tile_products<kShortRows>(p, row, column);
  }
}

}  // namespace elattn::cuda
