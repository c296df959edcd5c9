#include "cuda/ops/device.h"

#include <c10/util/Exception.h>

#include <string>

#include "tests/cuda_emulation/emulation.h"

/// The GPU that operators find where their kernels are executed in emulation: few multiprocessors, so that tests of
/// ordinary size reach the paths for full and for idle GPUs, and as little shared memory as any GPU of ours has.
namespace elattn::cuda {

struct DeviceScope::Guard {};

DeviceScope::DeviceScope(const at::Tensor&) : stream_(nullptr) {
  device_.multiprocessors = 4;
  device_.shared_memory_per_block = 99 * 1024;
}

DeviceScope::~DeviceScope() = default;

void check_launch(const char* op, cudaError_t error) {
  if (error == cudaSuccess) return;
  std::string findings;
  for (const std::string& finding : emulation::findings()) findings += "\n  " + finding;
  TORCH_CHECK(false, op, ": the emulated kernel failed with error ", static_cast<int>(error), findings);
}

}  // namespace elattn::cuda
