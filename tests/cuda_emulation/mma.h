#pragma once

#include <cstdint>

namespace elattn::cuda::emulation {

// The instructions of cuda/mma.cuh. Products are summed in double and rounded to float once; a GPU adds in an order and
// with roundings of its own, so results agree to float's accuracy, and exactly where all sums are exact.
void ldmatrix_x4(uint32_t (&r)[4], const void* row);
void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row);
template <class T>
void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
void mma_m16n8k8_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
uint32_t to_tf32(float x);

}  // namespace elattn::cuda::emulation
