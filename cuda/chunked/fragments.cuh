#pragma once

#include "cuda/mma.cuh"
#include "cuda/recurrence/block.cuh"
#include "cuda/tile.cuh"

/// 16x16 blocks of bfloat16 matrices as operands of the matrix instruction. One layout serves for all: the four 8x8
/// matrices of a block in the order top left, bottom left, top right, bottom right of the left operand. As a right
/// operand it is two blocks of eight columns, whose registers are 0, 2 and 1, 3.
namespace elattn::cuda::chunked {

using bf16 = __nv_bfloat16;

inline constexpr int kChunk = 64;  // tokens that are taken together
inline constexpr int kTile = 16;   // rows and columns of a block
inline constexpr int kTiles = kChunk / kTile;
inline constexpr int kVector = 16 / sizeof(bf16);  // elements in 16 bytes

using Fragment = uint32_t[4];

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

/// The block at (row, column) as a left operand, or transposed as a right operand.
__device__ __forceinline__ void load_fragment(Fragment& to, const Tile<bf16>& tile, int row, int column) {
  ldmatrix_x4(to, in_block(tile, row, column, lane() % 16, lane() / 16 * 8));
}

/// The same block as a right operand, or transposed as a left operand.
__device__ __forceinline__ void load_transposed(Fragment& to, const Tile<bf16>& tile, int row, int column) {
  ldmatrix_x4_trans(to, in_block(tile, row, column, lane() / 16 * 8 + lane() % 8, lane() / 8 % 2 * 8));
}

/// 16x16 of float: two accumulators of eight columns.
using Accumulator = float[2][4];

/// c += a b.
__device__ __forceinline__ void multiply(Accumulator& c, const Fragment& a, const Fragment& b) {
  mma_m16n8k16<bf16>(c[0], a, b[0], b[2]);
  mma_m16n8k16<bf16>(c[1], a, b[1], b[3]);
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
