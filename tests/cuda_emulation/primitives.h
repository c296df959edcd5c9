#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <driver_types.h>

#include <cstdint>

namespace elattn::cuda::primitives {

// One small kernel for each thing that the kernels of the project are made of. All inputs and outputs are indexed by
// lane: `a[lane][register]` and so on.

/// c += a b; a (32, 4), b (32, 2), c (32, 4).
template <class T>
cudaError_t mma_16bit(const uint32_t* a, const uint32_t* b, float* c);
cudaError_t mma_tf32(const uint32_t* a, const uint32_t* b, float* c);

/// matrices (4, 8, 8) to r (32, 4), through shared memory with rows of `ld` elements.
cudaError_t load_matrices(const uint16_t* matrices, int ld, bool transposed, uint32_t* r);

cudaError_t round_to_tf32(const float* x, uint32_t* bits, int count);

/// Copies rows of 16 bytes to out by cp.async, `bytes` (4, 8 or 16) at a time, the first `valid` bytes of every copy.
/// The second half of the rows is in a group of its own, waited for later.
cudaError_t copy_rows(const uint32_t* rows, uint32_t* out, int count, int bytes, int valid);

enum class Shuffle { kIndex, kUp, kDown, kXor };

/// out[lane] = the shuffle of in[lane] with `argument`, for T = int, float and double.
template <class T>
cudaError_t shuffle(Shuffle kind, const T* in, T* out, int argument, int width);

/// Each half of a warp shuffles with a mask of its own, and the second half once more often: lane ^ 1, lane ^ 3.
cudaError_t shuffle_halves(int* out);

/// ballot, any, all and the reductions (add, min, max of int; and, or, xor of unsigned) of one warp: out (10).
cudaError_t votes(const int* in, int* out);

/// __syncthreads_count, _or and _and of in[thread] != 0, by each of `threads`: out (threads, 3).
cudaError_t block_votes(const int* in, int* out, int threads);

/// add, min, max, and, or, exchange and compare-and-swap on seven words by all threads of several blocks.
cudaError_t atomics(unsigned* words, int64_t blocks, int threads);

/// The sum of x by blocks of 128 threads, through shuffles, shared memory and an atomic.
cudaError_t sum(const int* x, int count, int* total);

/// out[linear thread of the whole grid] = x, y, z of the thread and of the block.
cudaError_t indices(int* out, dim3 grid, dim3 block);

}  // namespace elattn::cuda::primitives
