#include "cuda/launch.cuh"
#include "cuda/recurrence/shape.h"
#include "cuda/recurrence/step.cuh"

namespace elattn::cuda {
namespace {

__device__ int64_t slot_of(const StepParams& p, int64_t index) {
  if (!p.device_slots) return index;
  const int64_t at = index * p.slots_stride;
  return p.slots_are_int32 ? static_cast<const int32_t*>(p.device_slots)[at]
                           : static_cast<const int64_t*>(p.device_slots)[at];
}

/// Blocks are (batch entries, kv heads).
template <class Map, int kPack>
__global__ void __launch_bounds__(kMaxStepThreads, sizeof(typename Map::Scalar) == 4 ? 2 : 1)
    step_kernel(StepParams p, StepShape shape) {
  using A = typename Map::Scalar;
  Arena arena(shared_memory());
  const WorkItem item(shape, blockIdx.x, blockIdx.y, 0);
  Step<Map, kPack> step(p, shape, item, arena);
  const int64_t slot = slot_of(p, item.index);
  step.load_inputs(0);  // while the slot is on its way
  if (slot < 0) {
    step.skip();
  } else {
    step.run(state_row<A>(p.state_out, slot, item.head));
  }
}

/// Nothing where the shared memory does not hold the features of one query head and its results.
template <class Map, int kPack>
std::optional<StepShape> step_shape(const AttentionParams& p, const Device& device) {
  StepShape s;
  static_cast<Shape&>(s) = base_shape(p);
  s.size = round_up(s.size, kTileRows<kPack>);
  s.columns = round_up(p.value_dim, kWarpSize);
  s.tokens = 1;
  constexpr int kWarps = kMaxStepThreads / kWarpSize;
  s.column_warps = std::min(s.columns / kWarpSize, kWarps);
  s.row_warps = std::min(s.size / kTileRows<kPack>, kWarps / s.column_warps);
  for (s.chunk = static_cast<int>(std::clamp<int64_t>(p.group, 1, kMaxChunk)); s.chunk > 0; s.chunk /= 2) {
    if (step_bytes<Map>(s) <= static_cast<size_t>(device.shared_memory_per_block)) return s;
  }
  return std::nullopt;
}

/// Whether every row of S in every state is made of whole, aligned packs.
template <class Map>
bool in_packs(const StepParams& p) {
  using A = typename Map::Scalar;
  const State& state = p.state_out;
  const int64_t elements = base_shape(p).matrix | state.batch | state.head | p.value_dim;
  const int64_t bytes = reinterpret_cast<int64_t>(state.data) | elements * static_cast<int64_t>(sizeof(A));
  return bytes % static_cast<int64_t>(kWidePack<Map> * sizeof(A)) == 0;
}

/// f(pointer to the map, number of elements that lanes move at once).
template <class F>
auto with_map_and_pack(const StepParams& p, F&& f) {
  return with_map(p, [&](auto* map) {
    using Map = std::remove_pointer_t<decltype(map)>;
    return in_packs<Map>(p) ? f(map, std::integral_constant<int, kWidePack<Map>>())
                            : f(map, std::integral_constant<int, 1>());
  });
}

}  // namespace

cudaError_t step(const StepParams& p, const Device& device, cudaStream_t stream) {
  if (p.sequences == 0 || p.kv_heads == 0 || p.value_dim == 0) return cudaSuccess;
  return with_map_and_pack(p, [&](auto* map, auto pack) {
    using Map = std::remove_pointer_t<decltype(map)>;
    const std::optional<StepShape> shape = step_shape<Map, pack()>(p, device);
    if (!shape) return cudaErrorInvalidConfiguration;
    return launch(step_kernel<Map, pack()>, dim3(grid(p.sequences).x, grid(p.kv_heads).x),
                  dim3(shape->row_warps * shape->column_warps * kWarpSize), step_bytes<Map>(*shape), stream, p, *shape);
  });
}

const char* unsupported_step(const StepParams& p, const Device& device) {
  const bool fits = with_map_and_pack(p, [&](auto* map, auto pack) {
    return step_shape<std::remove_pointer_t<decltype(map)>, pack()>(p, device).has_value();
  });
  return fits ? nullptr : "the head and value dimensions are too large for the shared memory of this GPU";
}

}  // namespace elattn::cuda
