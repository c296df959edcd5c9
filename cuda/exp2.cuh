#pragma once

#include "cuda/platform.cuh"

#ifdef CUDA_EMULATION
#include "tests/cuda_emulation/exp2.h"
#endif

namespace elattn::cuda {

/// 2^x by one instruction, with a relative error of 2^-22; below the smallest normal number, 2^-126, it is 0. What
/// exp2f and __expf do beyond it concerns such numbers.
__device__ __forceinline__ float fast_exp2(float x) {
#ifdef CUDA_EMULATION
  return emulation::fast_exp2(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

}  // namespace elattn::cuda
