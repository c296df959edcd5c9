#pragma once

#include <type_traits>

#include "cuda/grouped_linear/grouped_linear.cuh"

namespace elattn::cuda::grouped {

/// A tile of a b^T by fused multiply-adds in the accumulation type: every dtype, stride and alignment. The factors pass
/// through shared memory kDepth terms at a time, in two stages: the next terms are read while the present ones are
/// multiplied.
template <class T>
class FmaProduct {
  using A = std::conditional_t<std::is_same_v<T, double>, double, float>;

  // A thread computes kPatchRows x kPatchColumns. Fewer in double, for which the registers would not do.
  static constexpr int kPatchRows = sizeof(A) == sizeof(float) ? 8 : 4, kPatchColumns = 4;
  static constexpr int kSize = 64, kDepth = 8;
  static constexpr int kSide = kSize / kPatchColumns;

 public:
  using Type = T;
  static constexpr int kRows = kSize, kColumns = kSize;
  static constexpr int kThreads = kSize / kPatchRows * kSide;
  static constexpr int kBlocks = 512 / kThreads;  // that share a multiprocessor

  static size_t bytes() {
    Arena arena(nullptr);
    FmaProduct{arena};
    return arena.bytes();
  }

  /// Rows [first_row, first_row + kRows) and columns [first_column, first_column + kColumns), as far as they exist, of
  /// to (rows, columns) = a (rows, depth) b (columns, depth)^T.
  static __device__ __forceinline__ void run(const Matrix<T>& to, const Matrix<const T>& a, const Matrix<const T>& b,
                                             int64_t first_row, int64_t first_column) {
    Arena arena(shared_memory());
    const FmaProduct product(arena);
    const int row = thread() / kSide * kPatchRows, column = thread() % kSide * kPatchColumns;
    Reader left(a, first_row), right(b, first_column);
    A sum[kPatchRows][kPatchColumns] = {};
    left.read(a.columns);
    right.read(a.columns);
    int stage = 0;
    for (int64_t depth = a.columns; depth > 0; depth -= kDepth) {
      left.put(product.left_, stage);
      right.put(product.right_, stage);
      // The stage is whole, and nobody reads the other one any more.
      __syncthreads();
      left.read(depth - kDepth);
      right.read(depth - kDepth);
      product.multiply(sum, stage, row, column);
      stage = 1 - stage;
    }
    store(to, sum, first_row + row, first_column + column);
  }

 private:
  __host__ __device__ explicit FmaProduct(Arena& arena)
      : left_(arena.tile<A>(2 * kDepth, kSize)), right_(arena.tile<A>(2 * kDepth, kSize)) {}

  /// Brings a factor from memory to a tile, in pieces of kSize rows and kDepth terms, through registers. Of a piece a
  /// thread moves kLoads elements; neighbouring threads take neighbours in memory.
  class Reader {
   public:
    __device__ __forceinline__ Reader(const Matrix<const T>& factor, int64_t first) {
      const bool along_depth = factor.column == 1;
      i_ = along_depth ? thread() / kDepth : thread() % kSize;
      k_ = along_depth ? thread() % kDepth : thread() / kSize;
      step_i_ = along_depth ? kThreads / kDepth : 0;
      step_k_ = along_depth ? 0 : kThreads / kSize;
      rows_ = static_cast<int>(factor.rows - first < kSize ? factor.rows - first : kSize);
      from_ = factor.at(first + i_, k_);
      step_ = step_i_ * factor.row + step_k_ * factor.column;
      piece_ = kDepth * factor.column;
    }

    /// The next piece, of which `depth` terms exist, or all if that is more; zero where nothing exists.
    __device__ __forceinline__ void read(int64_t depth) {
      const int terms = static_cast<int>(depth < kDepth ? depth : kDepth);
      const T* from = from_;
#pragma unroll
      for (int n = 0; n < kLoads; ++n, from += step_) {
        elements_[n] = i_ + n * step_i_ < rows_ && k_ + n * step_k_ < terms ? Element<T>::load(*from) : A(0);
      }
      from_ += piece_;
    }

    __device__ __forceinline__ void put(const Tile<A>& to, int stage) const {
#pragma unroll
      for (int n = 0; n < kLoads; ++n) to(stage * kDepth + k_ + n * step_k_, i_ + n * step_i_) = elements_[n];
    }

   private:
    static constexpr int kLoads = kSize * kDepth / kThreads;
    static_assert(kThreads % kSize == 0 && kThreads % kDepth == 0);

    int i_, k_;             // of the first element in the piece
    int step_i_, step_k_;   // from one element to the next
    int rows_;              // of the piece that exist
    const T* from_;         // the first element
    int64_t step_, piece_;  // in memory, from element to element and from piece to piece
    A elements_[kLoads];
  };

  /// `kCount` neighbours of a tile, in packs.
  template <int kCount>
  static __device__ __forceinline__ void load(A (&to)[kCount], const Tile<A>& from, int r, int c) {
#pragma unroll
    for (int i = 0; i < kCount; i += Pack<A>::kSize) {
      const Pack<A> pack = *reinterpret_cast<const Pack<A>*>(from.at(r, c + i));
#pragma unroll
      for (int e = 0; e < Pack<A>::kSize; ++e) to[i + e] = pack.elements[e];
    }
  }

  __device__ __forceinline__ void multiply(A (&sum)[kPatchRows][kPatchColumns], int stage, int row, int column) const {
#pragma unroll
    for (int k = 0; k < kDepth; ++k) {
      A left[kPatchRows], right[kPatchColumns];
      load(left, left_, stage * kDepth + k, row);
      load(right, right_, stage * kDepth + k, column);
#pragma unroll
      for (int i = 0; i < kPatchRows; ++i) {
#pragma unroll
        for (int j = 0; j < kPatchColumns; ++j) sum[i][j] += left[i] * right[j];
      }
    }
  }

  /// The patch of `sum` whose first element is (row, column).
  static __device__ __forceinline__ void store(const Matrix<T>& to, const A (&sum)[kPatchRows][kPatchColumns],
                                               int64_t row, int64_t column) {
    // Packs of 16-bit numbers are longer than a row of the patch.
    constexpr int kStep = Pack<T>::kSize <= kPatchColumns ? Pack<T>::kSize : 1;
    const bool in_packs = kStep > 1 && to.in_packs();
#pragma unroll
    for (int i = 0; i < kPatchRows; ++i) {
#pragma unroll
      for (int j = 0; j < kPatchColumns; j += kStep) {
        if (row + i >= to.rows) continue;
        if (in_packs) {
          if (column + j >= to.columns) continue;
          Pack<T> pack;
#pragma unroll
          for (int e = 0; e < kStep; ++e) pack.elements[e] = Element<T>::store(sum[i][j + e]);
          *reinterpret_cast<Pack<T>*>(to.at(row + i, column + j)) = pack;
        } else {
#pragma unroll
          for (int e = 0; e < kStep; ++e) {
            if (column + j + e < to.columns) *to.at(row + i, column + j + e) = Element<T>::store(sum[i][j + e]);
          }
        }
      }
    }
  }

  Tile<A> left_, right_;  // (2 depth, rows), (2 depth, columns)
};

}  // namespace elattn::cuda::grouped
