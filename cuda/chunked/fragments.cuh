#pragma once

#include "cuda/mma.cuh"
#include "cuda/recurrence/block.cuh"
#include "cuda/tile.cuh"

/// 16x16 blocks of bfloat16 matrices as operands of the matrix instruction.
namespace elattn::cuda::chunked {

using bf16 = __nv_bfloat16;

inline constexpr int kChunk = 64;  // tokens that are taken together
inline constexpr int kTile = 16;   // rows and columns of a block
inline constexpr int kTiles = kChunk / kTile;
inline constexpr int kVector = 16 / sizeof(bf16);  // elements in 16 bytes

/// The four 8x8 matrices of a block: top left, bottom left, top right, bottom right.
struct Left {
  uint32_t x[4];
};

/// The same order, in which a block is two operands of eight columns, each in neighbouring registers, as the
/// instruction takes them.
struct Right {
  uint32_t x[4];
};

/// Two numbers rounded to bfloat16, the first in the low half.
__device__ __forceinline__ uint32_t pack(float low, float high) {
  const __nv_bfloat162_raw raw = __floats2bfloat162_rn(low, high);
  return raw.x | static_cast<uint32_t>(raw.y) << 16;
}

__device__ __forceinline__ float low(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }

/// Two neighbours in a tile; the column is even.
__device__ __forceinline__ uint32_t& pair(const Tile<bf16>& tile, int row, int column) {
  return *reinterpret_cast<uint32_t*>(tile.at(row, column));
}

/// Element (r, c) of the block at (row, column). What depends on the lane, r and c, is added first: then the addresses
/// of all blocks of a tile are one register and constants.
__device__ __forceinline__ bf16* in_block(const Tile<bf16>& tile, int row, int column, int r, int c) {
  ELATTN_EMULATION_CHECK(row + kTile <= tile.rows && column + kTile <= tile.cols);
  return tile.at(r, c) + (row * tile.ld + column);
}

/// The block at (row, column).
__device__ __forceinline__ void load_block(Left& to, const Tile<bf16>& tile, int row, int column) {
  ldmatrix_x4(to.x, in_block(tile, row, column, lane() % 16, lane() / 16 * 8));
}
__device__ __forceinline__ void load_block(Right& to, const Tile<bf16>& tile, int row, int column) {
  ldmatrix_x4_trans(to.x, in_block(tile, row, column, lane() % 16, lane() / 16 * 8));
}

/// The same block transposed.
__device__ __forceinline__ void load_transposed(Left& to, const Tile<bf16>& tile, int row, int column) {
  ldmatrix_x4_trans(to.x, in_block(tile, row, column, lane() / 16 * 8 + lane() % 8, lane() / 8 % 2 * 8));
}
__device__ __forceinline__ void load_transposed(Right& to, const Tile<bf16>& tile, int row, int column) {
  ldmatrix_x4(to.x, in_block(tile, row, column, lane() / 16 * 8 + lane() % 8, lane() / 8 % 2 * 8));
}

/// 16x16 of float: two accumulators of eight columns.
using Accumulator = float[2][4];

/// c += a b.
__device__ __forceinline__ void multiply(Accumulator& c, const Left& a, const Right& b) {
  mma_m16n8k16<bf16>(c[0], a.x, b.x[0], b.x[1]);
  mma_m16n8k16<bf16>(c[1], a.x, b.x[2], b.x[3]);
}

/// The row, and the even column, of elements e and e + 1 of accumulator c[half] (e = 0 or 2).
__device__ __forceinline__ int row_of(int e) { return lane() / 4 + 4 * e; }
__device__ __forceinline__ int column_of(int half) { return 8 * half + lane() % 4 * 2; }

/// Two neighbours of a block, where this lane has them in accumulators.
__device__ __forceinline__ uint32_t& pair(const Tile<bf16>& tile, int row, int column, int half, int e) {
  return *reinterpret_cast<uint32_t*>(in_block(tile, row, column, row_of(0), column_of(0)) + 4 * e * tile.ld +
                                      8 * half);
}

}  // namespace elattn::cuda::chunked
