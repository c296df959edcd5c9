#pragma once

#include <algorithm>

#include "cuda/platform.cuh"

#ifdef CUDA_EMULATION
#include "tests/cuda_emulation/launch.h"
#endif

namespace elattn::cuda {

/// A kernel's parameter type as it is: arguments are converted to it and take no part in deducing it.
template <class P>
struct Parameter {
  using type = P;
};

/// `blocks` blocks in a row. The launch of more than CUDA takes, 2^31 - 1, fails; a bare cast could leave too few of
/// them.
inline dim3 grid(int64_t blocks) {
  constexpr int64_t kTooMany = int64_t{1} << 31;
  return dim3(static_cast<unsigned>(std::min(blocks, kTooMany)));
}

/// Shares global memory out in pieces aligned to 256 bytes, in the order of the calls. Without memory all pieces are
/// null, and bytes() is how much they need.
class WorkspaceArena {
 public:
  explicit WorkspaceArena(void* memory) : base_(static_cast<unsigned char*>(memory)) {}

  template <class T>
  void take(T*& piece, int64_t count) {
    constexpr size_t kAlignment = 256;
    piece = base_ ? reinterpret_cast<T*>(base_ + bytes_) : nullptr;
    bytes_ += (static_cast<size_t>(count) * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
  }

  size_t bytes() const { return bytes_; }

 private:
  unsigned char* base_;
  size_t bytes_ = 0;
};

/// The only way in which kernels are launched. `shared_bytes` is the dynamic shared memory of a block.
template <class... P>
cudaError_t launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes,
                   [[maybe_unused]] cudaStream_t stream, typename Parameter<P>::type... arguments) {
#ifdef CUDA_EMULATION
  return emulation::launch(grid, block, shared_bytes, [=] { kernel(arguments...); });
#else
  constexpr size_t kWithoutAsking = 48 * 1024;
  if (shared_bytes > kWithoutAsking) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  void* pointers[] = {&arguments..., nullptr};
  return cudaLaunchKernel(kernel, grid, block, pointers, shared_bytes, stream);
#endif
}

}  // namespace elattn::cuda
