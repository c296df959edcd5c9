#include "cuda/launch.cuh"
#include "cuda/recurrence/forward.cuh"
#include "cuda/recurrence/shape.h"

namespace elattn::cuda {
namespace {

template <class Map>
__global__ void __launch_bounds__(kMaxThreads, 2) forward_kernel(AttentionParams p, Shape shape) {
  Arena arena(shared_memory());
  Forward<Map>(p, shape, WorkItem(p, shape, blockIdx.x), arena).run();
}

/// Each block repeats the work on q and k, so heads are only split to fill the GPU.
int forward_columns(const AttentionParams& p, const Device& device) {
  int columns = std::min(round_up(p.value_dim, kWarpSize), kMaxThreads);
  while (columns > kWarpSize &&
         p.sequences * p.kv_heads * ((p.value_dim + columns - 1) / columns) < device.multiprocessors) {
    columns = round_up(columns / 2, kWarpSize);
  }
  return columns;
}

template <class Map>
std::optional<Shape> forward_shape(const AttentionParams& p, const Device& device) {
  return fitting_shape(p, device, forward_columns(p, device), 8, forward_bytes<Map>);
}

}  // namespace

cudaError_t forward(const AttentionParams& p, const Device& device, cudaStream_t stream) {
  return with_map(p, [&](auto* map) {
    using Map = std::remove_pointer_t<decltype(map)>;
    const std::optional<Shape> shape = forward_shape<Map>(p, device);
    const int64_t blocks = p.sequences * p.kv_heads * (shape ? shape->column_blocks() : 0);
    if (blocks == 0) return cudaSuccess;
    return launch(forward_kernel<Map>, grid(blocks), dim3(kMaxThreads), forward_bytes<Map>(*shape), stream, p, *shape);
  });
}

const char* unsupported(const AttentionParams& p, const Device& device) {
  const bool fits = with_map(p, [&](auto* map) {
    using Map = std::remove_pointer_t<decltype(map)>;
    return forward_shape<Map>(p, device).has_value();
  });
  return fits ? nullptr : "the head dimension is too large for the shared memory of this GPU";
}

}  // namespace elattn::cuda
