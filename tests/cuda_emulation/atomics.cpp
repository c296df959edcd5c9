#include "tests/cuda_emulation/atomics.h"

#include <algorithm>
#include <atomic>

#include "tests/cuda_emulation/checks.h"

namespace elattn::cuda::emulation {
namespace {

template <class T>
T result(Atomic operation, T old, T value) {
  switch (operation) {
    case Atomic::kAdd:
      return static_cast<T>(static_cast<unsigned long long>(old) + static_cast<unsigned long long>(value));
    case Atomic::kMin: return std::min(old, value);
    case Atomic::kMax: return std::max(old, value);
    case Atomic::kAnd: return old & value;
    case Atomic::kOr: return old | value;
    case Atomic::kExchange: return value;
  }
  return value;
}

}  // namespace

template <class T>
T atomic(Atomic operation, T* address, T value) {
  check_access(address, sizeof(T), sizeof(T), Touch::kAtomic, __builtin_return_address(0));
  std::atomic_ref<T> target(*address);
  T old = target.load();
  while (!target.compare_exchange_weak(old, result(operation, old, value))) {
  }
  return old;
}

template <class T>
T atomic_compare_and_swap(T* address, T expected, T value) {
  check_access(address, sizeof(T), sizeof(T), Touch::kAtomic, __builtin_return_address(0));
  std::atomic_ref<T>(*address).compare_exchange_strong(expected, value);
  return expected;
}

template int atomic(Atomic, int*, int);
template unsigned atomic(Atomic, unsigned*, unsigned);
template unsigned long long atomic(Atomic, unsigned long long*, unsigned long long);
template int atomic_compare_and_swap(int*, int, int);
template unsigned atomic_compare_and_swap(unsigned*, unsigned, unsigned);
template unsigned long long atomic_compare_and_swap(unsigned long long*, unsigned long long, unsigned long long);

}  // namespace elattn::cuda::emulation
