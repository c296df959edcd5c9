#include "cuda/chunked/chunked.h"
#include "cuda/chunked/forward.cuh"
#include "cuda/chunked/merge.cuh"
#include "cuda/chunked/sizes.h"
#include "cuda/launch.cuh"

namespace elattn::cuda::chunked {
namespace {

/// A block of the first launch makes the state of the keys of one piece; one of the last has the outputs of one piece.
enum class Pass { kStates, kOutputs };

template <int kSize, int kValues>
__global__ void __launch_bounds__(Storage<kSize, kValues>::kThreads, kBlocks<kSize, kValues>)
    forward_kernel(AttentionParams p, Plan plan, Pass pass, float* slots) {
  const int64_t pieces = pass == Pass::kStates ? plan.slots : plan.pieces;
  const int64_t piece = blockIdx.x % pieces, row = blockIdx.x / pieces;  // row: of all heads of all sequences
  const int64_t index = row / p.kv_heads, head = row % p.kv_heads;
  const Sequence s = sequence(p, index);
  const StateOffsets& at = plan.state;
  const auto slot = [&](int64_t i) { return slots + (row * plan.slots + i) * at.size; };
  const auto initial = [&] { return state_row<const float>(p.state_in, index, head); };
  Arena arena(shared_memory());
  Forward<kSize, kValues> forward(p, s, head, arena);
  if (pass == Pass::kStates) {
    forward.absorb(plan.piece(s.key_len, piece));
    forward.save(slot(piece), at);
    return;
  }
  if (p.is_causal) {
    forward.load(piece == 0 ? initial() : slot(piece - 1), at);
    forward.scan(plan.piece(s.key_len, piece));
  } else {
    forward.load(pieces == 1 ? initial() : slot(plan.slots - 1), at);
    if (pieces == 1) forward.absorb(plan.piece(s.key_len, 0));
    forward.answer(plan.piece(s.query_len, piece));
  }
  if (piece == pieces - 1) forward.save(state_row<float>(p.state_out, index, head), at);
}

__global__ void __launch_bounds__(kMergeThreads) merge_kernel(AttentionParams p, Plan plan, float* slots) {
  merge_channel(p, plan, slots, blockIdx.x);
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
  auto* slots = static_cast<float*>(workspace);
  const auto blocks = [&](int64_t each) { return grid(plan.heads * each); };
  return with_sizes(p, [&](auto size, auto values) {
    using Tiles = Storage<size, values>;
    const auto run = [&](Pass pass, int64_t pieces) {
      return launch(forward_kernel<size, values>, blocks(pieces), dim3(Tiles::kThreads), bytes_of<Tiles>(), stream, p,
                    plan, pass, slots);
    };
    if (plan.slots > 0) {
      if (const cudaError_t error = run(Pass::kStates, plan.slots)) return error;
      const cudaError_t error =
          launch(merge_kernel, blocks(p.head_dim), dim3(kMergeThreads), 0, stream, p, plan, slots);
      if (error != cudaSuccess) return error;
    }
    return run(Pass::kOutputs, plan.pieces);
  });
}

}  // namespace elattn::cuda::chunked
