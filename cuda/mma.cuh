#pragma once

// The matrix instructions of a warp (sm_80). Every lane of the warp executes them together.
//
// Which lane holds which element, with g = lane / 4 and t = lane % 4:
//
//   8x8 matrix of 16-bit elements (ldmatrix), one register:  row g, columns 2t (low half) and 2t + 1
//     transposed (ldmatrix_x4_trans):                        rows 2t and 2t + 1 of column g
//   accumulator c, 16x8, four floats:   c[0], c[1]: row g, columns 2t and 2t + 1;   c[2], c[3]: row g + 8
//   16-bit a, 16x16, four registers:    a[0]: row g, columns 2t and 2t + 1;   a[1]: row g + 8;   a[2], a[3]: the same
//                                       rows, columns + 8
//   16-bit b, 16x8, two registers:      b0: rows 2t and 2t + 1, column g;   b1: rows + 8
//   tf32 a, 16x8, four registers:       a[0]: row g, column t;   a[1]: row g + 8;   a[2], a[3]: the same rows, column +
//   4 tf32 b, 8x8, two registers:         b0: row t, column g;   b1: row t + 4

#include <type_traits>

#include "cuda/platform.cuh"

#ifdef CUDA_EMULATION
#include "tests/cuda_emulation/mma.h"
#endif

namespace elattn::cuda {

/// Four 8x8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8, aligned to 16 bytes.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
#ifdef CUDA_EMULATION
  emulation::ldmatrix_x4(r, row);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
#endif
}

/// The same with every matrix transposed.
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
#ifdef CUDA_EMULATION
  emulation::ldmatrix_x4_trans(r, row);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
#endif
}

/// c += a b with a 16x16 and b 16x8 of T, __nv_bfloat16 or __half.
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>);
#ifdef CUDA_EMULATION
  emulation::mma_m16n8k16<T>(c, a, b0, b1);
#else
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
#endif
}

/// c += a b with a 16x8 and b 8x8 of tf32: the bits of a float, of which the low 13 are ignored.
__device__ __forceinline__ void mma_m16n8k8_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#ifdef CUDA_EMULATION
  emulation::mma_m16n8k8_tf32(c, a, b0, b1);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

/// The nearest tf32, ties away from zero, as the bits of a float.
__device__ __forceinline__ uint32_t to_tf32(float x) {
#ifdef CUDA_EMULATION
  return emulation::to_tf32(x);
#else
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
#endif
}

}  // namespace elattn::cuda
