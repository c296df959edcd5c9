#pragma once

#include "cuda/grouped_linear/grouped_linear.h"
#include "cuda/recurrence/rows.cuh"

/// Where groups and tiles lie. The products themselves: fma_product.cuh, mma_product.cuh.
namespace elattn::cuda::grouped {

/// A matrix of the caller: elements (i, j) for i < rows and j < columns.
template <class T>
struct Matrix {
  T* data;
  int64_t rows, columns;
  int64_t row, column;  // strides

  __device__ __forceinline__ T* at(int64_t i, int64_t j) const { return data + i * row + j * column; }
  __host__ __device__ Matrix transposed() const { return {data, columns, rows, column, row}; }

  /// Whether every row is made of whole, aligned packs.
  __host__ __device__ bool in_packs() const {
    constexpr int64_t kBytes = sizeof(T);
    return column == 1 && (reinterpret_cast<int64_t>(data) | row * kBytes | columns * kBytes) % 16 == 0;
  }
};

template <class T>
__host__ __device__ Matrix<T> matrix(const GroupedMatrix& m, int64_t offset, int64_t rows, int64_t columns) {
  return {static_cast<T*>(m.data) + offset, rows, columns, m.row, m.column};
}

/// Of group e; within the rows of the call whatever the ends hold.
__device__ __forceinline__ int64_t group_end(const GroupedParams& p, int64_t e) {
  const int64_t end = p.ends[e * p.ends_stride];
  return end < 0 ? 0 : end < p.rows ? end : p.rows;
}

struct GroupRows {
  int64_t begin, count;
};

__device__ __forceinline__ GroupRows group_rows(const GroupedParams& p, int64_t e) {
  const int64_t begin = e == 0 ? 0 : group_end(p, e - 1), end = group_end(p, e);
  return {begin, end > begin ? end - begin : 0};
}

__host__ __device__ constexpr int64_t tiles(int64_t size, int tile) { return (size + tile - 1) / tile; }

/// Row tiles are numbered through the groups so that the number of a group's last tile follows from its end alone:
/// group e has those from begin / kRows + e to end / kRows + e, of which the last may be empty.
__host__ __device__ constexpr int64_t last_row_tile(int64_t e, int64_t end, int rows) { return end / rows + e; }

/// The group that row tile `tile` is of, or the number of groups if it is of none. Each warp walks all ends, 32 at
/// once.
template <int kRows>
__device__ __forceinline__ int64_t group_of(const GroupedParams& p, int64_t tile) {
  for (int64_t first = 0;; first += kWarpSize) {
    const int64_t e = first + lane();
    const bool reached = e >= p.groups || last_row_tile(e, group_end(p, e), kRows) >= tile;
    const unsigned lanes = __ballot_sync(kFullMask, reached);
    if (lanes != 0) return first + __ffs(static_cast<int>(lanes)) - 1;
  }
}

}  // namespace elattn::cuda::grouped
