#pragma once

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "ops/cpu/recurrence/vec.h"

/// Rows between the caller's tensors (any dtype, any stride) and buffers of whole, aligned vectors in the accumulation
/// type.
namespace elattn::cpu {
inline namespace CPU_CAPABILITY {

/// The buffers of a work item, 64-byte aligned.
template <typename A>
class Buffers {
 public:
  /// Zeros; the size is rounded up to whole cache lines.
  A* take(int64_t size) {
    const int64_t bytes = (size * static_cast<int64_t>(sizeof(A)) + 63) / 64 * 64;
    blocks_.emplace_back(static_cast<A*>(std::aligned_alloc(64, static_cast<size_t>(bytes ? bytes : 64))));
    if (!blocks_.back()) throw std::bad_alloc();
    std::memset(static_cast<void*>(blocks_.back().get()), 0, static_cast<size_t>(bytes));
    return blocks_.back().get();
  }

 private:
  struct Free {
    void operator()(A* block) const { std::free(block); }
  };
  std::vector<std::unique_ptr<A, Free>> blocks_;
};

/// A (features, value columns) matrix in either memory order.
template <typename A>
struct Matrix {
  A* data;
  int64_t row, column;  // strides
  A& operator()(int64_t r, int64_t j) const { return data[r * row + j * column]; }
};

/// `count` numbers of type T as a vector of A, the other lanes zero.
template <typename A, typename T>
Vec<A> load(const T* from, int64_t count) {
  if constexpr (std::is_same_v<A, T>) {
    return Vec<A>::loadu(from, count);
  } else {
    Vec<A> vec;
    if (count == kLanes<A>) {
      at::vec::load_to_float<T>(from, vec);
    } else {
      T copy[kLanes<A>] = {};
      std::memcpy(copy, from, static_cast<size_t>(count) * sizeof(T));
      at::vec::load_to_float<T>(copy, vec);
    }
    return vec;
  }
}

/// The first `count` lanes, rounded to T.
template <typename A, typename T>
void store(T* to, const Vec<A>& vec, int64_t count) {
  if constexpr (std::is_same_v<A, T>) {
    vec.store(to, count);
  } else {
    at::vec::convert_from_float<T>(vec, vec).store(to, static_cast<int>(count));
  }
}

/// Two whole vectors, rounded to T.
template <typename A, typename T>
void store_pair(T* to, const Vec<A>& first, const Vec<A>& second) {
  if constexpr (std::is_same_v<A, T>) {
    first.store(to);
    second.store(to + kLanes<A>);
  } else {
    at::vec::convert_from_float<T>(first, second).store(to);
  }
}

/// The last columns of a row, apart from the loop over rows that `load_row` is part of.
template <typename A, typename T>
[[gnu::noinline]] void load_rest(A* to, const T* from, int64_t count, A scale, A fill) {
  Vec<A>::set(Vec<A>(fill), load<A>(from, count) * Vec<A>(scale), count).store(to);
}

template <typename A, typename T>
[[gnu::noinline]] void store_rest(T* to, const A* from, int64_t count, A scale) {
  store<A>(to, Vec<A>::loadu(from) * Vec<A>(scale), count);
}

/// One row of `count` numbers, times `scale`, into whole vectors; lanes beyond the row become `fill`.
template <typename A, typename T>
[[gnu::always_inline]] inline void load_row(A* to, const T* from, int64_t count, A scale, A fill) {
  const Vec<A> factor(scale);
  int64_t i = 0;
  for (; i + kLanes<A> <= count; i += kLanes<A>) (load<A>(from + i, kLanes<A>) * factor).store(to + i);
  if (i < count) load_rest(to + i, from + i, count - i, scale, fill);
}

/// One row of `count` numbers, times `scale`, rounded to T.
template <typename A, typename T>
[[gnu::always_inline]] inline void store_row(T* to, const A* from, int64_t count, A scale) {
  const Vec<A> factor(scale);
  int64_t i = 0;
  for (; i + 2 * kLanes<A> <= count; i += 2 * kLanes<A>) {
    store_pair<A>(to + i, Vec<A>::loadu(from + i) * factor, Vec<A>::loadu(from + i + kLanes<A>) * factor);
  }
  for (; i < count; i += kLanes<A>) store_rest(to + i, from + i, std::min(kLanes<A>, count - i), scale);
}

template <typename A>
void fill(A* to, int64_t count, A value) {
  std::fill(to, to + count, value);
}

}  // namespace CPU_CAPABILITY
}  // namespace elattn::cpu
