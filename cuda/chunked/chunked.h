#pragma once

#include "cuda/recurrence/recurrence.h"

/// hadamard_exp of bfloat16 tensors on tensor cores, chunk by chunk: the fast path for the calls that can take it.
/// Operands are rounded to bfloat16, sums and states are float (docs/math.md, sections 1 and 6).
namespace elattn::cuda::chunked {

/// Whether `forward` or `backward` takes these tensors and sizes on `device`; the token recurrence takes all others.
bool can_forward(const AttentionParams& params, const Device& device);
bool can_backward(const AttentionBackwardParams& params, const Device& device);

/// Bytes of scratch memory that `forward` needs.
size_t forward_workspace(const AttentionParams& params, const Device& device);
cudaError_t forward(const AttentionParams& params, void* workspace, const Device& device, cudaStream_t stream);

/// Bytes of scratch memory that `backward` needs.
size_t backward_workspace(const AttentionBackwardParams& params, const Device& device);
cudaError_t backward(const AttentionBackwardParams& params, void* workspace, const Device& device, cudaStream_t stream);

}  // namespace elattn::cuda::chunked
