#pragma once

#include <driver_types.h>

#include <cstddef>

#include "ops/params.h"

/// The token recurrence on a GPU: exact for every kernel, dtype, size and option, in the accumulation type. Faster
/// kernels for some of them stand beside it. No PyTorch type here.
namespace elattn::cuda {

/// What the launches need to know of the GPU.
struct Device {
  int multiprocessors = 1;
  int shared_memory_per_block = 48 * 1024;  // the most that a kernel may ask for
};

/// A step: AttentionParams, whose `slots` are not used, and where the slots are on the GPU.
struct StepParams : AttentionParams {
  const void* device_slots = nullptr;  // (sequences): pool row of each entry, -1 = inactive; null: entry i has row i
  bool slots_are_int32 = false;
  int64_t slots_stride = 0;
};

cudaError_t forward(const AttentionParams& params, const Device& device, cudaStream_t stream);
cudaError_t step(const StepParams& params, const Device& device, cudaStream_t stream);

/// Bytes of scratch memory that `backward` needs.
size_t backward_workspace(const AttentionBackwardParams& params, const Device& device);
cudaError_t backward(const AttentionBackwardParams& params, void* workspace, const Device& device, cudaStream_t stream);

/// Null, or a sentence that says why these sizes cannot run on `device`.
const char* unsupported(const AttentionParams& params, const Device& device);
const char* unsupported_step(const StepParams& params, const Device& device);

}  // namespace elattn::cuda
