#pragma once

#include "cuda/platform.cuh"

/// Threads of a block, and what its warps compute together.
namespace elattn::cuda {

__device__ __forceinline__ int thread() { return static_cast<int>(threadIdx.x); }
__device__ __forceinline__ int threads() { return static_cast<int>(blockDim.x); }
__device__ __forceinline__ int lane() { return thread() % kWarpSize; }
__device__ __forceinline__ int warp() { return thread() / kWarpSize; }
__device__ __forceinline__ int warps() { return threads() / kWarpSize; }

template <class A>
__device__ __forceinline__ A warp_sum(A x) {
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) x += __shfl_xor_sync(kFullMask, x, mask);
  return x;
}

/// The largest; a NaN is passed over.
template <class A>
__device__ __forceinline__ A warp_max(A x) {
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) x = fmax(x, __shfl_xor_sync(kFullMask, x, mask));
  return x;
}

__device__ __forceinline__ unsigned warp_or(unsigned x) {
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) x |= __shfl_xor_sync(kFullMask, x, mask);
  return x;
}

/// Sums over kCount groups of lanes, with kCount numbers a lane: lane c of group g gets that of x[g] of all lanes c.
/// `mask` is that of the first exchange.
template <int kCount, class A>
__device__ __forceinline__ A sum_lane_groups(const A (&x)[kCount], int mask = kWarpSize / 2) {
  if constexpr (kCount == 1) {
    return x[0];
  } else {
    constexpr int kHalf = kCount / 2;
    const bool upper = lane() & mask;
    A half[kHalf];
#pragma unroll
    for (int j = 0; j < kHalf; ++j) {
      const A other = __shfl_xor_sync(kFullMask, upper ? x[j] : x[j + kHalf], mask);
      half[j] = (upper ? x[j + kHalf] : x[j]) + other;
    }
    return sum_lane_groups(half, mask / 2);
  }
}

/// The bits that any thread of the block has set. `words` holds one word per warp; a barrier must lie between two uses.
__device__ __forceinline__ unsigned block_or(unsigned x, unsigned* words) {
  x = warp_or(x);
  if (lane() == 0) words[warp()] = x;
  __syncthreads();
  x = 0;
  for (int i = 0; i < warps(); ++i) x |= words[i];
  return x;
}

/// sum_i a_i b_i by one warp.
template <class A>
__device__ __forceinline__ A warp_dot(const A* a, const A* b, int size) {
  A sum = 0;
  for (int i = lane(); i < size; i += kWarpSize) sum += a[i] * b[i];
  return warp_sum(sum);
}

template <class A>
constexpr __device__ __forceinline__ A largest_number() {
  if constexpr (sizeof(A) == 4) {
    return A(3.402823466385288598e38);
  } else {
    return A(1.797693134862315708e308);
  }
}

template <class A>
constexpr __device__ __forceinline__ A smallest_normal() {
  if constexpr (sizeof(A) == 4) {
    return A(1.175494350822287508e-38);
  } else {
    return A(2.225073858507201383e-308);
  }
}

template <class A>
__device__ __forceinline__ A infinity() {
  return A(INFINITY);
}

__device__ __forceinline__ float exponential(float x) { return expf(x); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }

/// The exponent e of x = f 2^e with 1 <= f < 2, for x > 0 and finite.
__device__ __forceinline__ int binary_exponent(float x) { return ilogbf(x); }
__device__ __forceinline__ int binary_exponent(double x) { return ilogb(x); }

/// 2^e.
__device__ __forceinline__ void power_of_two(int e, float& to) { to = ldexpf(1.f, e); }
__device__ __forceinline__ void power_of_two(int e, double& to) { to = ldexp(1.0, e); }

/// a + b = sum + error, exactly.
template <class A>
struct TwoSum {
  A sum, error;
  __device__ __forceinline__ TwoSum(A a, A b) {
    sum = a + b;
    const A t = sum - a;
    error = (a - (sum - t)) + (b - t);
  }
};

}  // namespace elattn::cuda
