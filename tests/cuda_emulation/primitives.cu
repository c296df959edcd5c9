#include "cuda/async_copy.cuh"
#include "cuda/launch.cuh"
#include "cuda/mma.cuh"
#include "cuda/tile.cuh"
#include "tests/cuda_emulation/primitives.h"

namespace elattn::cuda::primitives {
namespace {

template <class T>
__global__ void mma_16bit_kernel(const uint32_t* a, const uint32_t* b, float* c) {
  const int lane = static_cast<int>(threadIdx.x);
  uint32_t operand[4];
  float sum[4];
  for (int i = 0; i < 4; ++i) operand[i] = a[4 * lane + i];
  for (int i = 0; i < 4; ++i) sum[i] = c[4 * lane + i];
  mma_m16n8k16<T>(sum, operand, b[2 * lane], b[2 * lane + 1]);
  for (int i = 0; i < 4; ++i) c[4 * lane + i] = sum[i];
}

__global__ void mma_tf32_kernel(const uint32_t* a, const uint32_t* b, float* c) {
  const int lane = static_cast<int>(threadIdx.x);
  uint32_t operand[4];
  float sum[4];
  for (int i = 0; i < 4; ++i) operand[i] = a[4 * lane + i];
  for (int i = 0; i < 4; ++i) sum[i] = c[4 * lane + i];
  mma_m16n8k8_tf32(sum, operand, b[2 * lane], b[2 * lane + 1]);
  for (int i = 0; i < 4; ++i) c[4 * lane + i] = sum[i];
}

__host__ __device__ Tile<uint16_t> carve_matrices(Arena& arena, int ld) { return arena.tile<uint16_t>(32, 8, ld); }

__global__ void load_matrices_kernel(const uint16_t* matrices, int ld, bool transposed, uint32_t* r) {
  Arena arena(shared_memory());
  const Tile<uint16_t> rows = carve_matrices(arena, ld);
  const int lane = static_cast<int>(threadIdx.x);
  for (int i = 0; i < 8; ++i) rows(lane, i) = matrices[8 * lane + i];
  __syncwarp();
  uint32_t registers[4];
  if (transposed) {
    ldmatrix_x4_trans(registers, rows.at(lane, 0));
  } else {
    ldmatrix_x4(registers, rows.at(lane, 0));
  }
  for (int i = 0; i < 4; ++i) r[4 * lane + i] = registers[i];
}

__global__ void round_to_tf32_kernel(const float* x, uint32_t* bits, int count) {
  for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x)) bits[i] = to_tf32(x[i]);
}

template <int kBytes>
__device__ void copy_row(const Tile<uint32_t>& to, const uint32_t* rows, int row, int valid) {
  constexpr int kWords = kBytes / 4;
  for (int i = 0; i < 4; i += kWords) cp_async<kBytes>(to.at(row, i), rows + 4 * row + i, valid);
}

__global__ void copy_rows_kernel(const uint32_t* rows, uint32_t* out, int count, int bytes, int valid) {
  Arena arena(shared_memory());
  const Tile<uint32_t> tile = arena.tile<uint32_t>(count, 4);
  const int half = count / 2, thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  for (int group = 0; group < 2; ++group) {
    for (int row = group * half + thread; row < (group + 1) * half; row += threads) {
      if (bytes == 16) copy_row<16>(tile, rows, row, valid);
      if (bytes == 8) copy_row<8>(tile, rows, row, valid);
      if (bytes == 4) copy_row<4>(tile, rows, row, valid);
    }
    cp_async_commit();
  }
  for (int group = 0; group < 2; ++group) {
    if (group == 0) {
      cp_async_wait<1>();
    } else {
      cp_async_wait<0>();
    }
    __syncthreads();
    for (int i = thread; i < 4 * half; i += threads) {
      const int row = group * half + i / 4;
      out[4 * row + i % 4] = tile(row, i % 4);
    }
  }
}

template <class T>
__global__ void shuffle_kernel(Shuffle kind, const T* in, T* out, int argument, int width) {
  const T value = in[threadIdx.x];
  T result = value;
  switch (kind) {
    case Shuffle::kIndex: result = __shfl_sync(kFullMask, value, argument, width); break;
    case Shuffle::kUp: result = __shfl_up_sync(kFullMask, value, static_cast<unsigned>(argument), width); break;
    case Shuffle::kDown: result = __shfl_down_sync(kFullMask, value, static_cast<unsigned>(argument), width); break;
    case Shuffle::kXor: result = __shfl_xor_sync(kFullMask, value, argument, width); break;
  }
  out[threadIdx.x] = result;
}

__global__ void shuffle_halves_kernel(int* out) {
  const int lane = static_cast<int>(threadIdx.x);
  int value = lane;
  if (lane < 16) {
    value = __shfl_xor_sync(0x0000ffffu, value, 1);
  } else {
    value = __shfl_xor_sync(0xffff0000u, value, 2);
    value = __shfl_xor_sync(0xffff0000u, value, 1);
  }
  out[lane] = value;
}

__global__ void votes_kernel(const int* in, int* out) {
  const int value = in[threadIdx.x];
  const auto bits = static_cast<unsigned>(value);
  const unsigned ballot = __ballot_sync(kFullMask, value > 0);
  const int any = __any_sync(kFullMask, value > 100), all = __all_sync(kFullMask, value > -100);
  const int add = __reduce_add_sync(kFullMask, value);
  const int least = __reduce_min_sync(kFullMask, value), most = __reduce_max_sync(kFullMask, value);
  const unsigned least_bits = __reduce_min_sync(kFullMask, bits);
  const unsigned conjunction = __reduce_and_sync(kFullMask, bits), disjunction = __reduce_or_sync(kFullMask, bits);
  const unsigned parity = __reduce_xor_sync(kFullMask, bits);
  if (threadIdx.x != 7) return;
  out[0] = static_cast<int>(ballot);
  out[1] = any != 0;
  out[2] = all != 0;
  out[3] = add;
  out[4] = least;
  out[5] = most;
  out[6] = static_cast<int>(least_bits);
  out[7] = static_cast<int>(conjunction);
  out[8] = static_cast<int>(disjunction);
  out[9] = static_cast<int>(parity);
}

__global__ void block_votes_kernel(const int* in, int* out) {
  const int i = static_cast<int>(threadIdx.x);
  out[3 * i] = __syncthreads_count(in[i]);
  out[3 * i + 1] = __syncthreads_or(in[i]) != 0;
  out[3 * i + 2] = __syncthreads_and(in[i]) != 0;
}

__global__ void atomics_kernel(unsigned* words) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  atomicAdd(words, i);
  atomicMin(words + 1, i + 5);
  atomicMax(words + 2, i);
  atomicAnd(words + 3, ~(1u << i % 8));
  atomicOr(words + 4, 1u << i % 32);
  atomicExch(words + 5, 77u);
  // A sum by compare-and-swap.
  unsigned old = 0;
  for (unsigned seen = atomicCAS(words + 6, old, old + i); seen != old; seen = atomicCAS(words + 6, old, old + i)) {
    old = seen;
  }
}

constexpr int kSumThreads = 128;

__global__ void sum_kernel(const int* x, int count, int* total) {
  Arena arena(shared_memory());
  int* of_warps = arena.take<int>(kSumThreads / kWarpSize);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarpSize, lane = thread % kWarpSize;
  const int i = static_cast<int>(blockIdx.x) * kSumThreads + thread;
  int value = i < count ? x[i] : 0;
  for (int step = kWarpSize / 2; step > 0; step /= 2) value += __shfl_xor_sync(kFullMask, value, step);
  if (lane == 0) of_warps[warp] = value;
  __syncthreads();
  if (thread != 0) return;
  for (int w = 1; w < kSumThreads / kWarpSize; ++w) value += of_warps[w];
  atomicAdd(total, value);
}

__global__ void indices_kernel(int* out) {
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const unsigned values[6] = {threadIdx.x, threadIdx.y, threadIdx.z, blockIdx.x, blockIdx.y, blockIdx.z};
  int* mine = out + 6 * (block * blockDim.x * blockDim.y * blockDim.z + thread);
  for (int i = 0; i < 6; ++i) mine[i] = static_cast<int>(values[i]);
}

}  // namespace

template <class T>
cudaError_t mma_16bit(const uint32_t* a, const uint32_t* b, float* c) {
  return launch(mma_16bit_kernel<T>, dim3(1), dim3(kWarpSize), 0, nullptr, a, b, c);
}
template cudaError_t mma_16bit<__nv_bfloat16>(const uint32_t*, const uint32_t*, float*);
template cudaError_t mma_16bit<__half>(const uint32_t*, const uint32_t*, float*);

cudaError_t mma_tf32(const uint32_t* a, const uint32_t* b, float* c) {
  return launch(mma_tf32_kernel, dim3(1), dim3(kWarpSize), 0, nullptr, a, b, c);
}

cudaError_t load_matrices(const uint16_t* matrices, int ld, bool transposed, uint32_t* r) {
  Arena arena(nullptr);
  carve_matrices(arena, ld);
  return launch(load_matrices_kernel, dim3(1), dim3(kWarpSize), arena.bytes(), nullptr, matrices, ld, transposed, r);
}

cudaError_t round_to_tf32(const float* x, uint32_t* bits, int count) {
  return launch(round_to_tf32_kernel, dim3(1), dim3(kWarpSize), 0, nullptr, x, bits, count);
}

cudaError_t copy_rows(const uint32_t* rows, uint32_t* out, int count, int bytes, int valid) {
  Arena arena(nullptr);
  arena.tile<uint32_t>(count, 4);
  return launch(copy_rows_kernel, dim3(1), dim3(64), arena.bytes(), nullptr, rows, out, count, bytes, valid);
}

template <class T>
cudaError_t shuffle(Shuffle kind, const T* in, T* out, int argument, int width) {
  return launch(shuffle_kernel<T>, dim3(1), dim3(kWarpSize), 0, nullptr, kind, in, out, argument, width);
}
template cudaError_t shuffle<int>(Shuffle, const int*, int*, int, int);
template cudaError_t shuffle<float>(Shuffle, const float*, float*, int, int);
template cudaError_t shuffle<double>(Shuffle, const double*, double*, int, int);

cudaError_t shuffle_halves(int* out) {
  return launch(shuffle_halves_kernel, dim3(1), dim3(kWarpSize), 0, nullptr, out);
}

cudaError_t votes(const int* in, int* out) {
  return launch(votes_kernel, dim3(1), dim3(kWarpSize), 0, nullptr, in, out);
}

cudaError_t block_votes(const int* in, int* out, int threads) {
  return launch(block_votes_kernel, dim3(1), dim3(static_cast<unsigned>(threads)), 0, nullptr, in, out);
}

cudaError_t atomics(unsigned* words, int64_t blocks, int threads) {
  return launch(atomics_kernel, grid(blocks), dim3(static_cast<unsigned>(threads)), 0, nullptr, words);
}

cudaError_t sum(const int* x, int count, int* total) {
  const auto blocks = static_cast<unsigned>((count + kSumThreads - 1) / kSumThreads);
  Arena arena(nullptr);
  arena.take<int>(kSumThreads / kWarpSize);
  return launch(sum_kernel, dim3(blocks), dim3(kSumThreads), arena.bytes(), nullptr, x, count, total);
}

cudaError_t indices(int* out, dim3 grid, dim3 block) { return launch(indices_kernel, grid, block, 0, nullptr, out); }

}  // namespace elattn::cuda::primitives
