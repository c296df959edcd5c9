#pragma once

// Copies from global to shared memory that run beside the kernel. A thread issues copies, closes a group with
// cp_async_commit(), and knows that the copies of all but its last N groups have landed after cp_async_wait<N>(). Other
// threads know it after a barrier that follows. Source and destination are aligned to the size of the copy.

#include "cuda/platform.cuh"

#ifdef CUDA_EMULATION
#include "tests/cuda_emulation/async_copy.h"
#endif

namespace elattn::cuda {

/// Copies `source_bytes` <= kBytes and fills the rest with zero. With 0 the source is not read, but it is an address
/// all the same: pass one that is valid. kBytes is 16 (which does not pass through L1), 8 or 4.
template <int kBytes>
__device__ __forceinline__ void cp_async(void* to, const void* from, int source_bytes = kBytes) {
  static_assert(kBytes == 16 || kBytes == 8 || kBytes == 4);
#ifdef CUDA_EMULATION
  emulation::cp_async(to, from, kBytes, source_bytes);
#else
  const auto shared = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(from), "r"(source_bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared), "l"(from), "n"(kBytes),
                 "r"(source_bytes)
                 : "memory");
  }
#endif
}

__device__ __forceinline__ void cp_async_commit() {
#ifdef CUDA_EMULATION
  emulation::cp_async_commit();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

template <int kGroups>
__device__ __forceinline__ void cp_async_wait() {
#ifdef CUDA_EMULATION
  emulation::cp_async_wait(kGroups);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
#endif
}

}  // namespace elattn::cuda
