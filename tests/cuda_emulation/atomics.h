#pragma once

namespace elattn::cuda::emulation {

enum class Atomic { kAdd, kMin, kMax, kAnd, kOr, kExchange };

/// For int, unsigned and unsigned long long. Sums of floats are missing: their order, and with it the result, would
/// differ from run to run.
template <class T>
T atomic(Atomic operation, T* address, T value);

template <class T>
T atomic_compare_and_swap(T* address, T expected, T value);

}  // namespace elattn::cuda::emulation

template <class T>
inline T atomicAdd(T* address, T value) {
  return elattn::cuda::emulation::atomic(elattn::cuda::emulation::Atomic::kAdd, address, value);
}
template <class T>
inline T atomicMin(T* address, T value) {
  return elattn::cuda::emulation::atomic(elattn::cuda::emulation::Atomic::kMin, address, value);
}
template <class T>
inline T atomicMax(T* address, T value) {
  return elattn::cuda::emulation::atomic(elattn::cuda::emulation::Atomic::kMax, address, value);
}
template <class T>
inline T atomicAnd(T* address, T value) {
  return elattn::cuda::emulation::atomic(elattn::cuda::emulation::Atomic::kAnd, address, value);
}
template <class T>
inline T atomicOr(T* address, T value) {
  return elattn::cuda::emulation::atomic(elattn::cuda::emulation::Atomic::kOr, address, value);
}
template <class T>
inline T atomicExch(T* address, T value) {
  return elattn::cuda::emulation::atomic(elattn::cuda::emulation::Atomic::kExchange, address, value);
}
template <class T>
inline T atomicCAS(T* address, T expected, T value) {
  return elattn::cuda::emulation::atomic_compare_and_swap(address, expected, value);
}
