#include "tests/cuda_emulation/mma.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstring>

#include "tests/cuda_emulation/block.h"
#include "tests/cuda_emulation/checks.h"

namespace elattn::cuda::emulation {
namespace {

constexpr uint32_t kAll = 0xffffffffu;
constexpr uint32_t kTf32 = 0xffffe000u;  // the bits of a float that tf32 has

struct LoadLane {
  uint32_t* r;
  const void* row;
  const void* pc;
};

void check_row(Block& block, const LoadLane& lane, int id) {
  const size_t offset = block.offset_in_shared(lane.row);
  if (!block.in_shared(lane.row) || offset + 16 > block.shared_bytes()) {
    block.fail([&] { return "ldmatrix of a row outside of shared memory: " + source_of(lane.pc); });
  }
  if (reinterpret_cast<uintptr_t>(lane.row) % 16 != 0) {
    block.fail([&] { return "ldmatrix of a row that is not aligned to 16 bytes: " + source_of(lane.pc); });
  }
  // The lanes that get the row's elements are ordered like the one that names it: they are of one warp.
  if constexpr (kChecked) report_shared(block.record().read(offset, 16, id), lane.pc);
}

template <bool kTransposed>
void load(void* const* lanes, uint32_t) {
  Block& block = Block::running();
  const int first = block.thread().warp() * kWarpLanes;
  uint16_t rows[32][8];
  for (int i = 0; i < 32; ++i) {
    const auto& lane = *static_cast<const LoadLane*>(lanes[i]);
    check_row(block, lane, first + i);
    std::memcpy(rows[i], lane.row, sizeof(rows[i]));
  }
  for (int i = 0; i < 32; ++i) {
    const int g = i / 4, t = i % 4;
    for (int m = 0; m < 4; ++m) {
      const auto* matrix = rows + 8 * m;
      const uint32_t low = kTransposed ? matrix[2 * t][g] : matrix[g][2 * t];
      const uint32_t high = kTransposed ? matrix[2 * t + 1][g] : matrix[g][2 * t + 1];
      static_cast<const LoadLane*>(lanes[i])->r[m] = low | high << 16;
    }
  }
}

struct MmaLane {
  float* c;
  const uint32_t* a;
  uint32_t b[2];
};

template <class T>
float half_of(uint32_t pair, int half) {
  return static_cast<float>(std::bit_cast<T>(static_cast<uint16_t>(pair >> (16 * half))));
}

float tf32(uint32_t bits) { return std::bit_cast<float>(bits & kTf32); }

template <int kDepth>
void multiply(void* const* lanes, const float (&a)[16][kDepth], const float (&b)[kDepth][8]) {
  for (int i = 0; i < 32; ++i) {
    const int g = i / 4, t = i % 4;
    float* c = static_cast<const MmaLane*>(lanes[i])->c;
    for (int e = 0; e < 4; ++e) {
      const int row = g + 8 * (e / 2), column = 2 * t + e % 2;
      double sum = 0;
      for (int k = 0; k < kDepth; ++k) sum += static_cast<double>(a[row][k]) * b[k][column];
      c[e] = static_cast<float>(c[e] + sum);
    }
  }
}

template <class T>
void multiply_16bit(void* const* lanes, uint32_t) {
  float a[16][16], b[16][8];
  for (int i = 0; i < 32; ++i) {
    const auto& lane = *static_cast<const MmaLane*>(lanes[i]);
    const int g = i / 4, t = i % 4;
    for (int half = 0; half < 2; ++half) {
      for (int r = 0; r < 4; ++r) a[g + 8 * (r % 2)][2 * t + half + 8 * (r / 2)] = half_of<T>(lane.a[r], half);
      for (int r = 0; r < 2; ++r) b[2 * t + half + 8 * r][g] = half_of<T>(lane.b[r], half);
    }
  }
  multiply(lanes, a, b);
}

void multiply_tf32(void* const* lanes, uint32_t) {
  float a[16][8], b[8][8];
  for (int i = 0; i < 32; ++i) {
    const auto& lane = *static_cast<const MmaLane*>(lanes[i]);
    const int g = i / 4, t = i % 4;
    for (int r = 0; r < 4; ++r) a[g + 8 * (r % 2)][t + 4 * (r / 2)] = tf32(lane.a[r]);
    for (int r = 0; r < 2; ++r) b[t + 4 * r][g] = tf32(lane.b[r]);
  }
  multiply(lanes, a, b);
}

}  // namespace

void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  LoadLane lane{r, row, __builtin_return_address(0)};
  Block::running().collective(load<false>, &lane, kAll, lane.pc);
}

void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  LoadLane lane{r, row, __builtin_return_address(0)};
  Block::running().collective(load<true>, &lane, kAll, lane.pc);
}

template <class T>
void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  MmaLane lane{c, a, {b0, b1}};
  Block::running().collective(multiply_16bit<T>, &lane, kAll, __builtin_return_address(0));
}
template void mma_m16n8k16<__nv_bfloat16>(float (&)[4], const uint32_t (&)[4], uint32_t, uint32_t);
template void mma_m16n8k16<__half>(float (&)[4], const uint32_t (&)[4], uint32_t, uint32_t);

void mma_m16n8k8_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  MmaLane lane{c, a, {b0, b1}};
  Block::running().collective(multiply_tf32, &lane, kAll, __builtin_return_address(0));
}

uint32_t to_tf32(float x) {
  const auto bits = std::bit_cast<uint32_t>(x);
  constexpr uint32_t kExponent = 0x7f800000u, kHalf = 0x1000u;
  return ((bits & kExponent) == kExponent ? bits : bits + kHalf) & kTf32;
}

}  // namespace elattn::cuda::emulation
