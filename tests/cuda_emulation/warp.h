#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <type_traits>

#include "tests/cuda_emulation/threads.h"

namespace elattn::cuda::emulation {

/// What the last lane to come does for all lanes of the mask; lanes[i] is what lane i brought.
using Collective = void (*)(void* const* lanes, uint32_t mask);

/// Waits until every lane of the mask has come with the same collective. `lane_data` is what this lane brings, and
/// where it finds its result.
void collective(Collective run, void* lane_data, uint32_t mask);
void sync_warp(uint32_t mask);

inline int lane_index() {
  return static_cast<int>((threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % 32);
}

template <class F>
inline void for_each_lane(uint32_t mask, F&& f) {
  for (; mask != 0; mask &= mask - 1) f(std::countr_zero(mask));
}

template <class T>
struct ShuffleLane {
  T value;
  T result;
  int source;
};

/// The value of lane `source`.
template <class T>
__attribute__((always_inline)) inline T shuffle(uint32_t mask, T value, int source) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  if ((mask >> source & 1) == 0) fail("a shuffle reads a lane that its mask lacks");
  ShuffleLane<T> mine{value, value, source};
  collective(
      [](void* const* lanes, uint32_t all) {
        for_each_lane(all, [&](int lane) {
          auto* to = static_cast<ShuffleLane<T>*>(lanes[lane]);
          to->result = static_cast<const ShuffleLane<T>*>(lanes[to->source])->value;
        });
      },
      &mine, mask);
  return mine.result;
}

template <class T>
struct ReduceLane {
  T value;
};

/// op over the values of all lanes, in the order of the lanes. Op is stateless.
template <class T, class Op>
__attribute__((always_inline)) inline T reduce(uint32_t mask, T value, Op) {
  ReduceLane<T> mine{value};
  collective(
      [](void* const* lanes, uint32_t all) {
        T result = static_cast<ReduceLane<T>*>(lanes[std::countr_zero(all)])->value;
        for_each_lane(all & (all - 1),
                      [&](int lane) { result = Op{}(result, static_cast<const ReduceLane<T>*>(lanes[lane])->value); });
        for_each_lane(all, [&](int lane) { static_cast<ReduceLane<T>*>(lanes[lane])->value = result; });
      },
      &mine, mask);
  return mine.value;
}

template <class T>
concept Integer32 = std::is_same_v<T, int> || std::is_same_v<T, unsigned>;

}  // namespace elattn::cuda::emulation

inline void __syncwarp(unsigned mask = 0xffffffffu) { elattn::cuda::emulation::sync_warp(mask); }

// A lane whose source lies outside its group of `width` lanes gets its own value. With xor the earlier groups can be
// read.
template <class T>
inline T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int lane = elattn::cuda::emulation::lane_index();
  return elattn::cuda::emulation::shuffle(mask, value, (lane & -width) | (source & (width - 1)));
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = elattn::cuda::emulation::lane_index(), source = lane - static_cast<int>(delta);
  return elattn::cuda::emulation::shuffle(mask, value, source >= (lane & -width) ? source : lane);
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = elattn::cuda::emulation::lane_index(), source = lane + static_cast<int>(delta);
  return elattn::cuda::emulation::shuffle(mask, value, source <= (lane | (width - 1)) ? source : lane);
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  const int lane = elattn::cuda::emulation::lane_index(), source = lane ^ bits;
  return elattn::cuda::emulation::shuffle(mask, value, source <= (lane | (width - 1)) ? source : lane);
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const unsigned bit = predicate != 0 ? 1u << elattn::cuda::emulation::lane_index() : 0;
  return elattn::cuda::emulation::reduce(mask, bit, [](unsigned a, unsigned b) { return a | b; });
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }

template <elattn::cuda::emulation::Integer32 T>
inline T __reduce_add_sync(unsigned mask, T value) {
  const auto add = [](unsigned a, unsigned b) { return a + b; };
  return static_cast<T>(elattn::cuda::emulation::reduce(mask, static_cast<unsigned>(value), add));
}
template <elattn::cuda::emulation::Integer32 T>
inline T __reduce_min_sync(unsigned mask, T value) {
  return elattn::cuda::emulation::reduce(mask, value, [](T a, T b) { return std::min(a, b); });
}
template <elattn::cuda::emulation::Integer32 T>
inline T __reduce_max_sync(unsigned mask, T value) {
  return elattn::cuda::emulation::reduce(mask, value, [](T a, T b) { return std::max(a, b); });
}
inline unsigned __reduce_and_sync(unsigned mask, unsigned value) {
  return elattn::cuda::emulation::reduce(mask, value, [](unsigned a, unsigned b) { return a & b; });
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned value) {
  return elattn::cuda::emulation::reduce(mask, value, [](unsigned a, unsigned b) { return a | b; });
}
inline unsigned __reduce_xor_sync(unsigned mask, unsigned value) {
  return elattn::cuda::emulation::reduce(mask, value, [](unsigned a, unsigned b) { return a ^ b; });
}
