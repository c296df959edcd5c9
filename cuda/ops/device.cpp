#include "cuda/ops/device.h"

#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

namespace elattn::cuda {

struct DeviceScope::Guard {
  c10::cuda::CUDAGuard guard;
};

DeviceScope::DeviceScope(const at::Tensor& tensor)
    : guard_(new Guard{c10::cuda::CUDAGuard(tensor.device())}), stream_(c10::cuda::getCurrentCUDAStream()) {
  const cudaDeviceProp& properties = *at::cuda::getCurrentDeviceProperties();
  device_.multiprocessors = properties.multiProcessorCount;
  device_.shared_memory_per_block = static_cast<int>(properties.sharedMemPerBlockOptin);
}

DeviceScope::~DeviceScope() = default;

void check_launch(const char* op, cudaError_t error) {
  TORCH_CHECK(error == cudaSuccess, op, ": the CUDA kernel could not be launched: ", cudaGetErrorString(error));
}

}  // namespace elattn::cuda
