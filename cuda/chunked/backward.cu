#include "cuda/chunked/chunked.h"
#include "cuda/chunked/merge.h"
#include "cuda/chunked/query_scan.cuh"
#include "cuda/chunked/reverse_scan.cuh"
#include "cuda/chunked/sizes.h"
#include "cuda/launch.cuh"

namespace elattn::cuda::chunked {
namespace {

template <class Scan>
__global__ void __launch_bounds__(Scan::Tiles::kThreads, Scan::kBlocks)
    state_kernel(AttentionBackwardParams p, Plan plan, Workspace workspace) {
  Arena arena(shared_memory());
  Scan(p, plan, plan.slots, workspace, blockIdx.x, arena).make_state();
}

template <class Scan, bool kIsCausal>
__global__ void __launch_bounds__(Scan::Tiles::kThreads, Scan::kBlocks)
    scan_kernel(AttentionBackwardParams p, Plan plan, Workspace workspace) {
  Arena arena(shared_memory());
  Scan(p, plan, plan.pieces, workspace, blockIdx.x, arena).template run<kIsCausal>();
}

/// Two scans at once: their blocks for a piece are neighbours, so that what both read comes from memory once.
template <class Even, class Odd, bool kIsCausal>
__global__ void __launch_bounds__(Even::Tiles::kThreads, Even::kBlocks)
    scans_kernel(AttentionBackwardParams p, Plan plan, Workspace workspace) {
  static_assert(static_cast<int>(Even::Tiles::kThreads) == Odd::Tiles::kThreads);
  Arena arena(shared_memory());
  if (blockIdx.x % 2 == 0) {
    Even(p, plan, plan.pieces, workspace, blockIdx.x / 2, arena).template run<kIsCausal>();
  } else {
    Odd(p, plan, plan.pieces, workspace, blockIdx.x / 2, arena).template run<kIsCausal>();
  }
}

Workspace lay_out(const AttentionBackwardParams& p, const Plan& plan, int size, WorkspaceArena& arena) {
  Workspace w;
  const bool packed = p.cu_seqlens;
  w.slots = packed ? first_slot(p.key_len, p.sequences) : chunks_of(p.key_len) + 1;
  const int64_t rows = (packed ? 1 : p.sequences) * p.kv_heads;
  arena.take(w.rows, rows * p.group * p.query_len);
  arena.take(w.gauges, rows * w.slots * size);
  arena.take(w.divisions, rows * w.slots);
  arena.take(w.states, plan.heads * plan.slots * plan.state.size);
  return w;
}

}  // namespace

bool can_backward(const AttentionBackwardParams& p, const Device& device) {
  return can_run(p) && is_aligned(p.grad_out) && is_aligned(p.grad_q) && is_aligned(p.grad_k) && is_aligned(p.grad_v) &&
         with_sizes(p, [&](auto size, auto values) {
           // With as many warps as any of the scans has.
           using Tiles = BackwardStorage<size, values, (size > values ? size : values) / kTile>;
           return bytes_of<Tiles>() <= static_cast<size_t>(device.shared_memory_per_block);
         });
}

size_t backward_workspace(const AttentionBackwardParams& p, const Device& device) {
  WorkspaceArena arena(nullptr);
  with_sizes(p, [&](auto size, auto) { return lay_out(p, Plan(p, device), size, arena); });
  return arena.bytes();
}

cudaError_t backward(const AttentionBackwardParams& p, void* memory, const Device& device, cudaStream_t stream) {
  const Plan plan(p, device);
  if (plan.heads == 0) return cudaSuccess;
  return with_sizes(p, [&](auto size, auto values) {
    using Queries = QueryScan<size, values>;
    using Keys = ReverseScan<size, values, Of::kKeys>;
    using Values = ReverseScan<size, values, Of::kValues>;
    WorkspaceArena arena(memory);
    const Workspace w = lay_out(p, plan, size, arena);
    const auto run = [&](auto* kernel, auto* tiles, int64_t blocks) {
      using Tiles = std::remove_pointer_t<decltype(tiles)>;
      return launch(kernel, grid(plan.heads * blocks), dim3(Tiles::kThreads), bytes_of<Tiles>(), stream, p, plan, w);
    };
    typename Queries::Tiles* const by_channel = nullptr;  // how a scan's warps share what they carry
    typename Values::Tiles* const by_value = nullptr;
    const auto run_scans = [&](auto is_causal) {
      if (const cudaError_t error = run(scan_kernel<Queries, is_causal>, by_channel, plan.pieces)) return error;
      if (plan.slots > 0) {
        if (const cudaError_t error = run(state_kernel<Keys>, by_channel, plan.slots)) return error;
        if (const cudaError_t error = merge_gradients(p, plan, w.states, stream)) return error;
      }
      if constexpr (size == values) {
        return run(scans_kernel<Keys, Values, is_causal>, by_channel, 2 * plan.pieces);
      } else {
        if (const cudaError_t error = run(scan_kernel<Keys, is_causal>, by_channel, plan.pieces)) return error;
        return run(scan_kernel<Values, is_causal>, by_value, plan.pieces);
      }
    };
    if (plan.slots > 0) {
      if (const cudaError_t error = run(state_kernel<Queries>, by_channel, plan.slots)) return error;
      if (const cudaError_t error = merge_states(p, plan, w.states, stream)) return error;
    }
    return p.is_causal ? run_scans(std::true_type()) : run_scans(std::false_type());
  });
}

}  // namespace elattn::cuda::chunked
