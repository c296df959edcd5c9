#pragma once

#include "cuda/chunked/plan.h"

/// What the pieces of a plan pass on, from the states of each alone.
namespace elattn::cuda::chunked {

/// Slots become the states of all keys up to the ends of their pieces, the initial state included.
cudaError_t merge_states(const AttentionParams& params, const Plan& plan, float* states, cudaStream_t stream);

/// Of gradients of states, where m is the factor of what comes from the right: slots become the sums from their pieces
/// to the end, the gradient of the final state included.
cudaError_t merge_gradients(const AttentionBackwardParams& params, const Plan& plan, float* states,
                            cudaStream_t stream);

}  // namespace elattn::cuda::chunked
