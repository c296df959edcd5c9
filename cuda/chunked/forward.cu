#include <cmath>

#include "cuda/chunked/chunked.h"
#include "cuda/chunked/forward.cuh"
#include "cuda/chunked/merge.cuh"
#include "cuda/launch.cuh"

namespace elattn::cuda::chunked {
namespace {

/// A block of the first launch makes the state of the keys of one piece; one of the last has the outputs of one piece.
enum class Pass { kStates, kOutputs };

template <int kSize, int kValues>
__global__ void __launch_bounds__(Storage<kSize, kValues>::kThreads, Storage<kSize, kValues>::kBlocks)
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

/// f(kSize, kValues) for the sizes that a call's are rounded up to.
template <class F>
auto with_sizes(const AttentionParams& p, F&& f) {
  using Small = std::integral_constant<int, 64>;
  using Large = std::integral_constant<int, kLargestDim>;
  const auto with_size = [&](auto size) { return p.value_dim <= Small::value ? f(size, Small()) : f(size, Large()); };
  return p.head_dim <= Small::value ? with_size(Small()) : with_size(Large());
}

bool is_aligned(const Rows& rows) {
  const auto strides = static_cast<uint64_t>(rows.batch | rows.head | rows.row) * sizeof(bf16);
  return (reinterpret_cast<uintptr_t>(rows.data) | strides) % 16 == 0;
}

bool has_size(int64_t dim) { return dim > 0 && dim <= kLargestDim && dim % kVector == 0; }

}  // namespace

bool can_forward(const AttentionParams& p, const Device& device) {
  // The largest key is found before the scale is applied, so that must be positive.
  const auto scale = static_cast<float>(p.scale);
  return p.kernel == KernelKind::HadamardExp && p.dtype == DType::BFloat16 && !p.decay.data && has_size(p.head_dim) &&
         has_size(p.value_dim) && is_aligned(p.q) && is_aligned(p.k) && is_aligned(p.v) && is_aligned(p.out) &&
         scale > 0 && std::isfinite(scale) && with_sizes(p, [&](auto size, auto values) {
           return Storage<size, values>::bytes() <= static_cast<size_t>(device.shared_memory_per_block);
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
      return launch(forward_kernel<size, values>, blocks(pieces), dim3(Tiles::kThreads), Tiles::bytes(), stream, p,
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
