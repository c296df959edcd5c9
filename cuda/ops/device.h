#pragma once

#include <ATen/core/Tensor.h>
#include <driver_types.h>

#include <memory>

#include "cuda/recurrence/recurrence.h"

/// The dispatch key that the operators of this folder are registered for: that of CPU tensors where the kernels are
/// executed in emulation (tests/cuda_emulation).
#ifndef ELATTN_CUDA_KEY
#define ELATTN_CUDA_KEY CUDA
#endif

namespace elattn::cuda {

/// Makes the GPU of a tensor current as long as it lives, with PyTorch's current stream.
class DeviceScope {
 public:
  explicit DeviceScope(const at::Tensor& tensor);
  ~DeviceScope();

  const Device& device() const { return device_; }
  cudaStream_t stream() const { return stream_; }

 private:
  struct Guard;
  std::unique_ptr<Guard> guard_;
  Device device_;
  cudaStream_t stream_;
};

/// Raises the error of a launch on behalf of `op`.
void check_launch(const char* op, cudaError_t error);

}  // namespace elattn::cuda
