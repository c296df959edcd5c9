#pragma once

// The one place that knows which compiler this is: nvcc, or with -DCUDA_EMULATION a C++ compiler whose program executes
// kernels on the CPU (tests/cuda_emulation). Kernels never ask.

#include <cstddef>
#include <cstdint>

#ifdef CUDA_EMULATION
#include "tests/cuda_emulation/device.h"
/// Ends an emulated kernel with a finding where the condition does not hold; nothing on a GPU.
#define ELATTN_EMULATION_CHECK(condition) \
  ((condition) ? (void)0 : ::elattn::cuda::emulation::fail("does not hold: " #condition))
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define ELATTN_EMULATION_CHECK(condition) ((void)0)
#endif

namespace elattn::cuda {

/// Whether this is nvcc's pass for the GPU, where what only the host does falls away at compile time.
#ifdef __CUDA_ARCH__
constexpr bool kDevicePass = true;
#else
constexpr bool kDevicePass = false;
#endif

constexpr int kWarpSize = 32;
constexpr unsigned kFullMask = 0xffffffffu;

/// The shared memory of a block, all of it dynamic: as many bytes as its launch asked for, aligned to 16. Kernels carve
/// it with an Arena (tile.cuh).
__device__ __forceinline__ unsigned char* shared_memory() {
#ifdef CUDA_EMULATION
  return emulation::shared_memory();
#else
  extern __shared__ __align__(16) unsigned char elattn_shared_memory[];
  return elattn_shared_memory;
#endif
}

}  // namespace elattn::cuda
