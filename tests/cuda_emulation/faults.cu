#include "cuda/async_copy.cuh"
#include "cuda/launch.cuh"
#include "cuda/mma.cuh"
#include "cuda/tile.cuh"
#include "tests/cuda_emulation/faults.h"

namespace elattn::cuda::faults {
namespace {

constexpr int kThreads = 64;

struct Storage {
  Tile<float> tile;
  float* row;
};

__host__ __device__ Storage carve(Arena& arena, bool too_much) {
  return {arena.tile<float>(2, kThreads), arena.take<float>(too_much ? 2 * kThreads : kThreads)};
}

__global__ void kernel(Fault fault, float* all, const float* in) {
  Arena arena(shared_memory());
  const Storage s = carve(arena, fault == Fault::kArenaTooSmall);
  const int i = static_cast<int>(threadIdx.x), lane = i % kWarpSize, warp = i / kWarpSize;
  const int block = static_cast<int>(blockIdx.x);
  float* out = all + kThreads * block;
  float x = in[i];
  switch (fault) {
    case Fault::kNone:
    case Fault::kArenaTooSmall: break;
    case Fault::kDifferentCollectives:
      x = lane < 16 ? __shfl_xor_sync(kFullMask, x, 1) : static_cast<float>(__any_sync(kFullMask, x > 0));
      break;
    case Fault::kMissingLane:
      if (lane != 5) x = __shfl_xor_sync(kFullMask, x, 1);
      break;
    case Fault::kMaskWithoutCaller: x = static_cast<float>(__any_sync(0x0000ffffu, x > 0)); break;
    case Fault::kSourceOutsideMask: x = __shfl_xor_sync(lane < 16 ? 0x0000ffffu : 0xffff0000u, x, 16); break;
    case Fault::kReturnBeforeBarrier:
      if (warp == 0) return;
      __syncthreads();
      break;
    case Fault::kDifferentBarriers:
      if (warp == 0) {
        __syncthreads();
      } else {
        __syncthreads();
      }
      break;
    case Fault::kCopyNotAwaited:
      cp_async<4>(s.row + i, in + i);
      cp_async_commit();
      break;
    case Fault::kCopyMisaligned:
      cp_async<16>(s.row + 4 * (i % 16), in + 1);
      cp_async_commit();
      cp_async_wait<0>();
      break;
    case Fault::kMatrixMisaligned: {
      uint32_t r[4];
      ldmatrix_x4(r, s.row + 1);
      x = __uint_as_float(r[0]);
      break;
    }
    case Fault::kOutsideTile: s.tile(1, kThreads) = x; break;
    case Fault::kReadAfterWrite:
      s.row[i] = x;
      x = s.row[(i + kWarpSize) % kThreads];
      break;
    case Fault::kWriteAfterRead:
      s.row[i] = x;
      __syncthreads();
      x = s.row[(i + kWarpSize) % kThreads];
      s.row[i] = 0;
      break;
    case Fault::kWriteAfterWrite: s.row[i % kWarpSize] = x; break;
    case Fault::kNoSyncwarp:
      s.row[i] = x;
      x = s.row[i ^ 1];
      break;
    case Fault::kNeverWritten: x = s.row[i]; break;
    case Fault::kReadUnderCopy:
      cp_async<4>(s.row + i, in + i);
      cp_async_commit();
      x = s.row[i];
      cp_async_wait<0>();
      break;
    case Fault::kCopyOverRead:
      s.row[i] = x;
      __syncthreads();
      x = s.row[kThreads - 1 - i];
      cp_async<4>(s.row + i, in + i);
      cp_async_commit();
      cp_async_wait<0>();
      break;
    case Fault::kPastShared: s.row[kThreads + i] = x; break;
    case Fault::kOutsideBuffers: x = in[i + 1]; break;
    case Fault::kWriteToReadOnly: const_cast<float*>(in)[i] = x + 1; break;
    case Fault::kBlocksWriteOneWord: all[0] = x; break;
    case Fault::kBlockReadsOfAnother: x = all[(kThreads * block + kThreads) % (4 * kThreads)]; break;
    case Fault::kMisaligned: *reinterpret_cast<double*>(s.row + 1) = 0; break;
    case Fault::kVectorMisaligned: *reinterpret_cast<float4*>(out + 2) = *reinterpret_cast<const float4*>(in); break;
  }
  out[i] = x;
}

}  // namespace

cudaError_t run(Fault fault, float* out, const float* in) {
  Arena arena(nullptr);
  carve(arena, false);
  return launch(kernel, dim3(4), dim3(kThreads), arena.bytes(), nullptr, fault, out, in);
}

}  // namespace elattn::cuda::faults
