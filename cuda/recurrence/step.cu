#include "cuda/launch.cuh"
#include "cuda/recurrence/forward.cuh"
#include "cuda/recurrence/shape.h"

namespace elattn::cuda {
namespace {

__device__ int64_t slot_of(const StepParams& p, int64_t index) {
  if (!p.device_slots) return index;
  const int64_t at = index * p.slots_stride;
  return p.slots_are_int32 ? static_cast<const int32_t*>(p.device_slots)[at]
                           : static_cast<const int64_t*>(p.device_slots)[at];
}

/// One block per (batch entry, kv head).
template <class Map>
__global__ void __launch_bounds__(kMaxThreads, 2) step_kernel(StepParams p, Shape shape) {
  using A = typename Map::Scalar;
  const int64_t index = blockIdx.x / p.kv_heads, head = blockIdx.x % p.kv_heads;
  Arena arena(shared_memory());
  Forward<Map> forward(p, shape, WorkItem(p, shape, static_cast<int64_t>(blockIdx.x) * shape.column_blocks()), arena);
  const int64_t slot = slot_of(p, index);
  if (slot < 0) {
    forward.skip();
  } else {
    forward.step(state_row<A>(p.state_out, slot, head));
  }
}

}  // namespace

cudaError_t step(const StepParams& p, const Device& device, cudaStream_t stream) {
  const int64_t blocks = p.value_dim == 0 ? 0 : p.sequences * p.kv_heads;
  if (blocks == 0) return cudaSuccess;
  return with_map(p, [&](auto* map) {
    using Map = std::remove_pointer_t<decltype(map)>;
    const int columns = std::min(round_up(p.value_dim, kWarpSize), kMaxThreads);
    const std::optional<Shape> shape = fitting_shape(p, device, columns, 1, forward_bytes<Map>);
    return launch(step_kernel<Map>, grid(blocks), dim3(kMaxThreads), forward_bytes<Map>(*shape), stream, p, *shape);
  });
}

}  // namespace elattn::cuda
