#pragma once

#include "cuda/platform.cuh"

namespace elattn::cuda {

/// A row-major matrix in shared memory. Its extents serve the checks in emulation only; a tile made from data and ld
/// alone is not checked.
template <class T>
struct Tile {
  T* data = nullptr;
  int ld = 0;
  int rows = 0x7fffffff;
  int cols = 0x7fffffff;

  __device__ __forceinline__ T& operator()(int r, int c) const { return *at(r, c); }

  __device__ __forceinline__ T* at(int r, int c) const {
    ELATTN_EMULATION_CHECK(r >= 0 && r < rows && c >= 0 && c < cols);
    return data + r * ld + c;
  }
};

/// kCount consecutive numbers between shared memory and registers, 16 bytes at a time.
template <int kCount, class A>
__device__ __forceinline__ void read_row(A (&to)[kCount], const A* from) {
  constexpr int kPack = 16 / sizeof(A);
  static_assert(kCount % kPack == 0);
  struct alignas(16) Pack {
    A x[kPack];
  };
#pragma unroll
  for (int i = 0; i < kCount; i += kPack) {
    const Pack pack = *reinterpret_cast<const Pack*>(from + i);
#pragma unroll
    for (int e = 0; e < kPack; ++e) to[i + e] = pack.x[e];
  }
}

template <int kCount, class A>
__device__ __forceinline__ void write_row(A* to, const A (&from)[kCount]) {
  constexpr int kPack = 16 / sizeof(A);
  struct alignas(16) Pack {
    A x[kPack];
  };
#pragma unroll
  for (int i = 0; i < kCount; i += kPack) {
    Pack pack;
#pragma unroll
    for (int e = 0; e < kPack; ++e) pack.x[e] = from[i + e];
    *reinterpret_cast<Pack*>(to + i) = pack;
  }
}

/// Shares a buffer out in pieces aligned to 16 bytes, in the order of the calls. A function that carves all of a
/// kernel's pieces runs on the device, and with a null base on the host, where bytes() then is the size to launch with.
class Arena {
 public:
  __host__ __device__ explicit Arena(unsigned char* base) : base_(base) {}

  template <class T>
  __host__ __device__ T* take(int count) {
    // Without a choice between pointers on the device, where it would hide from nvcc that they lead to shared memory.
    T* piece = kDevicePass || base_ ? reinterpret_cast<T*>(base_ + bytes_) : nullptr;
    bytes_ += (static_cast<size_t>(count) * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
    ELATTN_EMULATION_CHECK(!base_ || bytes_ <= emulation::shared_memory_size());
    return piece;
  }

  template <class T>
  __host__ __device__ Tile<T> tile(int rows, int cols) {
    return tile<T>(rows, cols, padded_ld<T>(cols));
  }

  template <class T>
  __host__ __device__ Tile<T> tile(int rows, int cols, int ld) {
    return {take<T>(rows * ld), ld, rows, cols};
  }

  __host__ __device__ size_t bytes() const { return bytes_; }

  /// The shortest row of at least `cols` elements that is an odd number of 16-byte units: eight rows below one another
  /// then lie in different banks, for ldmatrix and for vector access.
  template <class T>
  static constexpr __host__ __device__ int padded_ld(int cols) {
    constexpr int unit = kAlignment / sizeof(T);
    return ((cols + unit - 1) / unit | 1) * unit;
  }

 private:
  static constexpr int kAlignment = 16;

  unsigned char* base_;
  size_t bytes_ = 0;
};

}  // namespace elattn::cuda
