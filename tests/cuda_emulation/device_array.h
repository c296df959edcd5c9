#pragma once

#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#ifdef CUDA_EMULATION
#include "tests/cuda_emulation/emulation.h"
#else
#include <cuda_runtime.h>
#endif

namespace elattn::cuda {

#ifdef CUDA_EMULATION

/// An array that kernels can reach, and that holds what they made of it.
template <class T>
class DeviceArray {
 public:
  explicit DeviceArray(std::vector<T> values, std::string name = "array", bool writable = true)
      : values_(std::move(values)), expose_(values_.data(), values_.size() * sizeof(T), writable, std::move(name)) {}

  T* data() { return values_.data(); }
  std::vector<T> values() const { return values_; }

 private:
  // What runs past the end of one array shall not fall into the next.
  std::vector<char> gap_ = std::vector<char>(64 * 1024);
  std::vector<T> values_;
  emulation::Expose expose_;
};

#else

template <class T>
class DeviceArray {
 public:
  explicit DeviceArray(const std::vector<T>& values) : size_(values.size()) {
    check(cudaMalloc(&data_, size_ * sizeof(T)));
    check(cudaMemcpy(data_, values.data(), size_ * sizeof(T), cudaMemcpyHostToDevice));
  }
  ~DeviceArray() { cudaFree(data_); }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;

  T* data() { return data_; }
  std::vector<T> values() const {
    std::vector<T> result(size_);
    check(cudaMemcpy(result.data(), data_, size_ * sizeof(T), cudaMemcpyDeviceToHost));
    return result;
  }

 private:
  static void check(cudaError_t error) {
    if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
  }

  size_t size_;
  T* data_ = nullptr;
};

#endif

}  // namespace elattn::cuda
