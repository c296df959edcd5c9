#pragma once

#include "cuda/async_copy.cuh"
#include "cuda/grouped_linear/grouped_linear.cuh"
#include "cuda/mma.cuh"

namespace elattn::cuda::grouped {

/// Which elements of a factor (rows, depth) are neighbours in memory.
enum class Along { Depth, Rows };

/// Pieces of kRows x kDepth of a factor of 16-bit numbers in shared memory, kStages of them. A piece lies as in memory:
/// in lines along depth or along rows, of packs of 16 bytes.
template <class T, Along kAlong, int kRows, int kDepth, int kStages, int kThreads>
class StagedFactor {
  static constexpr int kPack = Pack<T>::kSize;
  static constexpr int kLines = kAlong == Along::Depth ? kRows : kDepth;
  static constexpr int kLine = kAlong == Along::Depth ? kDepth : kRows;
  static constexpr int kPacks = kLine / kPack;  // of a line
  static constexpr int kPiece = kLines * kLine;

 public:
  __host__ __device__ explicit StagedFactor(Arena& arena) : data_(arena.take<T>(kStages * kPiece)) {}

  /// Copies the pieces of rows [first, first + kRows) in turn. A thread copies the same pack of every kStep-th line.
  class Source {
   public:
    __device__ __forceinline__ Source(const Matrix<const T>& factor, int64_t first) : valid_(factor.data) {
      const Matrix<const T> lines = kAlong == Along::Depth ? factor : factor.transposed();
      rows_ = static_cast<int>(factor.rows - first < kRows ? factor.rows - first : kRows);
      from_ =
          kAlong == Along::Depth ? lines.at(first + line(), pack() * kPack) : lines.at(line(), first + pack() * kPack);
      step_ = kStep * lines.row;
      piece_ = kAlong == Along::Depth ? kDepth : kDepth * lines.row;
    }

    /// Begins to copy the next piece, of which `depth` terms exist, or all if that is more; zero where nothing exists.
    __device__ __forceinline__ void copy(const StagedFactor& to, int stage, int64_t depth) {
      const int terms = static_cast<int>(depth < kDepth ? depth : kDepth);
      const int lines = (kAlong == Along::Depth ? rows_ : terms) - line();
      const bool whole = pack() * kPack < (kAlong == Along::Depth ? terms : rows_);
      const T* from = from_;
#pragma unroll
      for (int n = 0; n < kLines; n += kStep, from += step_) {
        const bool exists = whole && n < lines;
        cp_async<16>(to.at(stage, line() + n, pack()), exists ? from : valid_, exists ? 16 : 0);
      }
      from_ += piece_;
    }

   private:
    static constexpr int kStep = kThreads / kPacks;
    static_assert(kThreads % kPacks == 0 && kLines % kStep == 0);

    static __device__ __forceinline__ int line() { return thread() / kPacks; }
    static __device__ __forceinline__ int pack() { return thread() % kPacks; }

    const T* valid_;        // an address for copies of nothing
    const T* from_;         // the first pack
    int64_t step_, piece_;  // in memory, from pack to pack and from piece to piece
    int rows_;              // that exist
  };

  /// The 16x16 block at (row, k) as a left operand.
  __device__ __forceinline__ void left_operand(uint32_t (&to)[4], int stage, int row, int k) const {
    load_matrices(to, stage, row + lane() / 8 % 2 * 8, k + lane() / 16 * 8);
  }

  /// The block at (row, k), transposed, as two right operands of eight columns: registers 0 and 1, and 2 and 3, as the
  /// instruction takes neighbours.
  __device__ __forceinline__ void right_operands(uint32_t (&to)[4], int stage, int row, int k) const {
    load_matrices(to, stage, row + lane() / 16 * 8, k + lane() / 8 % 2 * 8);
  }

 private:
  /// Four 8x8 matrices; lane l names the corner (row, k) of matrix l / 8.
  __device__ __forceinline__ void load_matrices(uint32_t (&to)[4], int stage, int row, int k) const {
    if constexpr (kAlong == Along::Depth) {
      ldmatrix_x4(to, at(stage, row + lane() % 8, k / kPack));
    } else {
      ldmatrix_x4_trans(to, at(stage, k + lane() % 8, row / kPack));
    }
  }

  /// A pack of a line. Within 128 bytes, which are all banks, packs lie in an order of their own, so that the same pack
  /// of eight lines below one another, which ldmatrix reads at once, lies in different banks. So do the packs that
  /// eight neighbouring threads copy.
  __device__ __forceinline__ T* at(int stage, int line, int pack) const {
    ELATTN_EMULATION_CHECK(stage >= 0 && stage < kStages && line >= 0 && line < kLines && pack >= 0 && pack < kPacks);
    constexpr int kAcross = kPacks < 8 ? kPacks : 8;  // packs of one line in 128 bytes
    static_assert(8 % kAcross == 0 && kPacks % kAcross == 0 && kLines % 8 == 0);
    // The stage comes last: then what depends on the thread is computed once.
    return data_ + (line * kLine + (pack ^ line / (8 / kAcross) % kAcross) * kPack) + stage * kPiece;
  }

  T* data_;  // (stages, lines, line)
};

/// A tile of a b^T on tensor cores, for factors of 16-bit numbers whose lines are made of whole, aligned packs. Sums
/// are float.
template <class T, Along kLeft, Along kRight>
class MmaProduct {
 public:
  using Type = T;
  // Not more rows: groups are often small, and what a tile has beyond its group is lost.
  static constexpr int kRows = 64, kColumns = 128;
  static constexpr int kThreads = 128;
  static constexpr int kBlocks = 4;  // that share a multiprocessor

  static size_t bytes() {
    Arena factors(nullptr), result(nullptr);
    MmaProduct{factors};
    result_tile(result);
    return factors.bytes() > result.bytes() ? factors.bytes() : result.bytes();
  }

  /// As FmaProduct::run.
  static __device__ __forceinline__ void run(const Matrix<T>& to, const Matrix<const T>& a, const Matrix<const T>& b,
                                             int64_t first_row, int64_t first_column) {
    Arena arena(shared_memory());
    const MmaProduct product(arena);
    typename Left::Source left(a, first_row);
    typename Right::Source right(b, first_column);
    int64_t depth = a.columns;  // not yet copied
    // One group of copies per call, empty when nothing is left, so that waiting for a piece is counting groups.
    const auto copy = [&](int stage) {
      if (depth > 0) {
        left.copy(product.left_, stage, depth);
        right.copy(product.right_, stage, depth);
      }
      cp_async_commit();
      depth -= kDepth;
    };
    for (int stage = 0; stage < kStages - 1; ++stage) copy(stage);
    Sums sums = {};
    int stage = 0;
    for (int64_t k = 0; k < a.columns; k += kDepth) {
      cp_async_wait<kStages - 2>();
      // The piece has landed for all threads, and nobody reads the one before it any more.
      __syncthreads();
      copy(stage == 0 ? kStages - 1 : stage - 1);
      product.multiply(sums, stage);
      stage = stage == kStages - 1 ? 0 : stage + 1;
    }
    __syncthreads();
    store(to, sums, first_row, first_column);
  }

 private:
  static constexpr int kDepth = 32;  // terms of a piece
  static constexpr int kStages = 3;  // pieces: one is multiplied while two arrive
  static constexpr int kBlock = 16;  // rows and columns of a fragment

  // Each warp has a part of the tile: 2 x 2 warps.
  static constexpr int kWarpRows = kRows / 2, kWarpColumns = kColumns / 2;
  static_assert(kThreads == 4 * kWarpSize);

  using Left = StagedFactor<T, kLeft, kRows, kDepth, kStages, kThreads>;
  using Right = StagedFactor<T, kRight, kColumns, kDepth, kStages, kThreads>;
  using Sums = float[kWarpRows / kBlock][kWarpColumns / kBlock][2][4];

  __host__ __device__ explicit MmaProduct(Arena& arena) : left_(arena), right_(arena) {}

  /// The result takes the place of the factors.
  static __host__ __device__ Tile<T> result_tile(Arena& arena) { return arena.tile<T>(kRows, kColumns); }

  static __device__ __forceinline__ int warp_row() { return warp() / 2 * kWarpRows; }
  static __device__ __forceinline__ int warp_column() { return warp() % 2 * kWarpColumns; }

  __device__ __forceinline__ void multiply(Sums& sums, int stage) const {
#pragma unroll
    for (int k = 0; k < kDepth; k += kBlock) {
      uint32_t left[kWarpRows / kBlock][4];
#pragma unroll
      for (int i = 0; i < kWarpRows / kBlock; ++i) left_.left_operand(left[i], stage, warp_row() + i * kBlock, k);
#pragma unroll
      for (int j = 0; j < kWarpColumns / kBlock; ++j) {
        uint32_t right[4];
        right_.right_operands(right, stage, warp_column() + j * kBlock, k);
#pragma unroll
        for (int i = 0; i < kWarpRows / kBlock; ++i) {
          mma_m16n8k16<T>(sums[i][j][0], left[i], right[0], right[1]);
          mma_m16n8k16<T>(sums[i][j][1], left[i], right[2], right[3]);
        }
      }
    }
  }

  /// Through shared memory, so that whole lines are written.
  static __device__ __forceinline__ void store(const Matrix<T>& to, const Sums& sums, int64_t first_row,
                                               int64_t first_column) {
    struct alignas(2 * sizeof(T)) Pair {
      T first, second;
    };
    Arena arena(shared_memory());
    const Tile<T> result = result_tile(arena);
    const int row = warp_row() + lane() / 4, column = warp_column() + lane() % 4 * 2;
#pragma unroll
    for (int i = 0; i < kWarpRows / kBlock; ++i) {
#pragma unroll
      for (int j = 0; j < kWarpColumns / kBlock; ++j) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
          for (int e = 0; e < 4; e += 2) {
            *reinterpret_cast<Pair*>(result.at(row + i * kBlock + 4 * e, column + j * kBlock + 8 * half)) = {
                Element<T>::store(sums[i][j][half][e]), Element<T>::store(sums[i][j][half][e + 1])};
          }
        }
      }
    }
    __syncthreads();
    if (to.in_packs()) {
      copy_out<Pack<T>>(to, result, first_row, first_column);
    } else {
      copy_out<T>(to, result, first_row, first_column);
    }
  }

  template <class Unit>
  static __device__ __forceinline__ void copy_out(const Matrix<T>& to, const Tile<T>& result, int64_t first_row,
                                                  int64_t first_column) {
    constexpr int kElements = sizeof(Unit) / sizeof(T), kUnits = kColumns / kElements;
    for (int n = thread(); n < kRows * kUnits; n += kThreads) {
      const int r = n / kUnits, c = n % kUnits * kElements;
      if (first_row + r >= to.rows || first_column + c >= to.columns) continue;
      *reinterpret_cast<Unit*>(to.at(first_row + r, first_column + c)) =
          *reinterpret_cast<const Unit*>(result.at(r, c));
    }
  }

  Left left_;
  Right right_;
};

}  // namespace elattn::cuda::grouped
