#include "cuda/chunked/chunked.h"
#include "cuda/chunked/query_scan.cuh"
#include "cuda/chunked/reverse_scan.cuh"
#include "cuda/chunked/sizes.h"
#include "cuda/launch.cuh"

namespace elattn::cuda::chunked {
namespace {

template <class Scan>
__global__ void __launch_bounds__(Scan::Tiles::kThreads, Scan::kBlocks)
    backward_kernel(AttentionBackwardParams p, StateOffsets at, Workspace workspace) {
  Arena arena(shared_memory());
  Scan(p, at, workspace, arena).run();
}

Workspace lay_out(const AttentionBackwardParams& p, int size, WorkspaceArena& arena) {
  Workspace w;
  const bool packed = p.cu_seqlens;
  w.slots = packed ? first_slot(p.key_len, p.sequences) : chunks_of(p.key_len) + 1;
  const int64_t rows = (packed ? 1 : p.sequences) * p.kv_heads;
  arena.take(w.rows, rows * p.group * p.query_len);
  arena.take(w.gauges, rows * w.slots * size);
  arena.take(w.divisions, rows * w.slots);
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

size_t backward_workspace(const AttentionBackwardParams& p) {
  WorkspaceArena arena(nullptr);
  with_sizes(p, [&](auto size, auto) { return lay_out(p, size, arena); });
  return arena.bytes();
}

cudaError_t backward(const AttentionBackwardParams& p, void* memory, cudaStream_t stream) {
  const int64_t heads = p.sequences * p.kv_heads;
  if (heads == 0) return cudaSuccess;
  return with_sizes(p, [&](auto size, auto values) {
    WorkspaceArena arena(memory);
    const Workspace w = lay_out(p, size, arena);
    const auto run = [&](auto* scan) {
      using Scan = std::remove_pointer_t<decltype(scan)>;
      using Tiles = typename Scan::Tiles;
      return launch(backward_kernel<Scan>, grid(heads), dim3(Tiles::kThreads), bytes_of<Tiles>(), stream, p,
                    StateOffsets(p), w);
    };
    cudaError_t error = run(static_cast<QueryScan<size, values>*>(nullptr));
    if (error == cudaSuccess) error = run(static_cast<ReverseScan<size, values, Of::kKeys>*>(nullptr));
    if (error == cudaSuccess) error = run(static_cast<ReverseScan<size, values, Of::kValues>*>(nullptr));
    return error;
  });
}

}  // namespace elattn::cuda::chunked
