#include "cuda/chunked/chunked.h"
#include "cuda/chunked/forward.cuh"
#include "cuda/chunked/merge.h"
#include "cuda/chunked/sizes.h"
#include "cuda/launch.cuh"

namespace elattn::cuda::chunked {
namespace {

template <int kSize, int kValues>
__global__ void __launch_bounds__(Storage<kSize, kValues>::kThreads, kBlocks<kSize, kValues>)
    state_kernel(AttentionParams p, Plan plan, float* states) {
  Arena arena(shared_memory());
  Forward<kSize, kValues>(p, plan, plan.slots, states, arena).make_state();
}

template <int kSize, int kValues>
__global__ void __launch_bounds__(Storage<kSize, kValues>::kThreads, kBlocks<kSize, kValues>)
    output_kernel(AttentionParams p, Plan plan, float* states) {
  Arena arena(shared_memory());
  Forward<kSize, kValues>(p, plan, plan.pieces, states, arena).run();
}

}  // namespace

bool can_forward(const AttentionParams& p, const Device& device) {
  return can_run(p) && is_aligned(p.out) && with_sizes(p, [&](auto size, auto values) {
           return bytes_of<Storage<size, values>>() <= static_cast<size_t>(device.shared_memory_per_block);
         });
}

size_t forward_workspace(const AttentionParams& p, const Device& device) { return Plan(p, device).workspace(); }

cudaError_t forward(const AttentionParams& p, void* workspace, const Device& device, cudaStream_t stream) {
  const Plan plan(p, device);
  if (plan.heads == 0) return cudaSuccess;
  auto* states = static_cast<float*>(workspace);
  return with_sizes(p, [&](auto size, auto values) {
    using Tiles = Storage<size, values>;
    const auto run = [&](auto* kernel, int64_t pieces) {
      return launch(kernel, grid(plan.heads * pieces), dim3(Tiles::kThreads), bytes_of<Tiles>(), stream, p, plan,
                    states);
    };
    if (plan.slots > 0) {
      if (const cudaError_t error = run(state_kernel<size, values>, plan.slots)) return error;
      if (const cudaError_t error = merge_states(p, plan, states, stream)) return error;
    }
    return run(output_kernel<size, values>, plan.pieces);
  });
}

}  // namespace elattn::cuda::chunked
