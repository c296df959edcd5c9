#pragma once

#include <type_traits>

#include "cuda/recurrence/block.cuh"
#include "cuda/tile.cuh"
#include "ops/params.h"

/// Where the sequences lie, and rows of the caller's tensors in shared memory.
namespace elattn::cuda {

/// Rows [query_begin, query_begin + query_len) and [key_begin, key_begin + key_len) of one batch entry.
struct Sequence {
  int64_t batch, query_begin, query_len, key_begin, key_len;
};

__device__ __forceinline__ Sequence sequence(const AttentionParams& p, int64_t index) {
  if (!p.cu_seqlens) return {index, 0, p.query_len, 0, p.key_len};
  const int64_t begin = p.cu_seqlens[index], len = p.cu_seqlens[index + 1] - begin;
  return {0, begin, len, begin, len};
}

template <class T>
struct Element;

template <>
struct Element<float> {
  static __device__ __forceinline__ float load(float x) { return x; }
  static __device__ __forceinline__ float store(float x) { return x; }
};

template <>
struct Element<double> {
  static __device__ __forceinline__ double load(double x) { return x; }
  static __device__ __forceinline__ double store(double x) { return x; }
};

template <>
struct Element<__nv_bfloat16> {
  static __device__ __forceinline__ float load(__nv_bfloat16 x) { return __bfloat162float(x); }
  static __device__ __forceinline__ __nv_bfloat16 store(float x) { return __float2bfloat16_rn(x); }
};

template <>
struct Element<__half> {
  static __device__ __forceinline__ float load(__half x) { return __half2float(x); }
  static __device__ __forceinline__ __half store(float x) { return __float2half_rn(x); }
};

/// f(pointer to the type of an element) for tensors whose sums are of type A.
template <class A, class F>
__device__ __forceinline__ void with_element(DType dtype, F&& f) {
  if constexpr (sizeof(A) == sizeof(double)) {
    f(static_cast<double*>(nullptr));
  } else if (dtype == DType::BFloat16) {
    f(static_cast<__nv_bfloat16*>(nullptr));
  } else if (dtype == DType::Half) {
    f(static_cast<__half*>(nullptr));
  } else {
    f(static_cast<float*>(nullptr));
  }
}

/// Elements of a row that are moved at once, as a rule 16 bytes.
template <class T, int kCount = 16 / sizeof(T)>
struct alignas(kCount * sizeof(T)) Pack {
  static constexpr int kSize = kCount;
  T elements[kSize];
};

/// Columns [column, column + count) of `tokens` tokens and `heads` heads each, from `data` on: (tokens, heads, count).
struct RowBlock {
  const Rows& rows;
  int64_t offset;  // of the first element
  int tokens, heads, count;

  __device__ __forceinline__ RowBlock(const Rows& rows, int64_t batch, int64_t head, int64_t token, int column,
                                      int tokens, int heads, int count)
      : rows(rows),
        offset(batch * rows.batch + head * rows.head + token * rows.row + column),
        tokens(tokens),
        heads(heads),
        count(count) {}

  /// Of row (token, head), in the order of tiles.
  __device__ __forceinline__ int64_t row(int i) const {
    return offset + (i / heads) * rows.row + (i % heads) * rows.head;
  }

  /// Whether every row is made of whole, aligned packs of `bytes` per element.
  __device__ __forceinline__ bool in_packs(int bytes) const {
    const int64_t begin = reinterpret_cast<int64_t>(rows.data) + offset * bytes;
    return (begin | rows.row * bytes | rows.head * bytes | count * bytes) % 16 == 0;
  }
};

template <class T, class A>
__device__ void load_elements(const Tile<A>& to, const RowBlock& from, int size, A scale, A fill, unsigned skip) {
  const T* data = static_cast<const T*>(from.rows.data);
  const int rows = from.tokens * from.heads;
  int vectors = 0;
  if (from.in_packs(sizeof(T))) {
    vectors = from.count / Pack<T>::kSize;
    for (int i = thread(); i < rows * vectors; i += threads()) {
      const int r = i / vectors, c = i % vectors * Pack<T>::kSize;
      A* row = to.at(r, c);
      if (skip >> (r / from.heads) & 1) {
        for (int e = 0; e < Pack<T>::kSize; ++e) row[e] = 0;
      } else {
        const Pack<T> pack = *reinterpret_cast<const Pack<T>*>(data + from.row(r) + c);
        for (int e = 0; e < Pack<T>::kSize; ++e) row[e] = static_cast<A>(Element<T>::load(pack.elements[e])) * scale;
      }
    }
  }
  const int done = vectors * Pack<T>::kSize;
  for (int r = warp(); r < rows; r += warps()) {
    const bool skipped = skip >> (r / from.heads) & 1;
    for (int c = done + lane(); c < size; c += kWarpSize) {
      const bool inside = c < from.count;
      A x = skipped ? A(0) : fill;
      if (inside && !skipped) x = static_cast<A>(Element<T>::load(data[from.row(r) + c])) * scale;
      to(r, c) = x;
    }
  }
}

template <class T, class A>
__device__ void store_elements(const RowBlock& to, const Tile<A>& from, A scale) {
  T* data = static_cast<T*>(to.rows.data);
  const int rows = to.tokens * to.heads;
  if (to.in_packs(sizeof(T))) {
    const int vectors = to.count / Pack<T>::kSize;
    for (int i = thread(); i < rows * vectors; i += threads()) {
      const int r = i / vectors, c = i % vectors * Pack<T>::kSize;
      const A* row = from.at(r, c);
      Pack<T> pack;
      for (int e = 0; e < Pack<T>::kSize; ++e) pack.elements[e] = Element<T>::store(row[e] * scale);
      *reinterpret_cast<Pack<T>*>(data + to.row(r) + c) = pack;
    }
    return;
  }
  for (int r = warp(); r < rows; r += warps()) {
    for (int c = lane(); c < to.count; c += kWarpSize) data[to.row(r) + c] = Element<T>::store(from(r, c) * scale);
  }
}

/// Rows times `scale` to a tile of `size` columns, of which those beyond the rows become `fill`. Tokens marked in
/// `skip` are not read: their rows are zero.
template <class A>
__device__ void load_rows(const Tile<A>& to, DType dtype, const RowBlock& from, int size, A scale, A fill,
                          unsigned skip = 0) {
  with_element<A>(dtype, [&](auto* type) {
    load_elements<std::remove_pointer_t<decltype(type)>>(to, from, size, scale, fill, skip);
  });
}

/// Rows of a tile, times `scale`, rounded to the tensor's dtype.
template <class A>
__device__ void store_rows(DType dtype, const RowBlock& to, const Tile<A>& from, A scale) {
  with_element<A>(dtype, [&](auto* type) { store_elements<std::remove_pointer_t<decltype(type)>>(to, from, scale); });
}

template <class A>
__device__ __forceinline__ void store_element(DType dtype, void* to, int64_t i, A x) {
  with_element<A>(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    static_cast<T*>(to)[i] = Element<T>::store(x);
  });
}

/// Which of `n` tokens from `token` on are padding, at most one per lane: bit i is token i.
__device__ __forceinline__ unsigned read_padding(const AttentionParams& p, const Sequence& s, int64_t token, int n) {
  if (!p.padding) return 0;
  const int i = lane();
  const bool padding = i < n && p.padding[s.batch * p.padding_batch + (s.key_begin + token + i) * p.padding_row];
  return __ballot_sync(kFullMask, padding);
}

template <class A>
__device__ __forceinline__ A* state_row(const State& state, int64_t row, int64_t head) {
  return state.data ? static_cast<A*>(state.data) + row * state.batch + head * state.head : nullptr;
}

/// Forgetting rates of the tokens of one (sequence, kv head).
template <class A>
class DecayRates {
 public:
  __device__ DecayRates(const Decay& decay, const Sequence& s, int64_t head) : decay_(decay) {
    if (decay.data) {
      from_ = static_cast<const A*>(decay.data) + s.batch * decay.batch + head * decay.head + s.key_begin * decay.row;
    }
  }

  __device__ bool any() const { return from_ != nullptr; }
  __device__ A operator()(int64_t token, int channel) const {
    return from_[token * decay_.row + channel * decay_.channel];
  }

 private:
  const Decay& decay_;
  const A* from_ = nullptr;
};

}  // namespace elattn::cuda
