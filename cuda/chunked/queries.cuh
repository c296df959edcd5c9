#pragma once

#include "cuda/chunked/keys.cuh"

namespace elattn::cuda::chunked {

struct Exponent {
  float high, low;
};

/// q + gauge as two numbers (docs/math.md, 1.2); an overflow of finite numbers stays finite.
__device__ __forceinline__ Exponent exponent(float q, float m) {
  const TwoSum<float> sum(q, m);
  if (isfinite(sum.sum)) return {sum.sum, sum.error};
  return {isfinite(q) && isfinite(m) ? copysignf(largest_number<float>(), sum.sum) : sum.sum, 0};
}

/// A row of queries of a chunk in shared memory, done by a few lanes of one warp.
template <int kSize, int kWarps>
class QueryRow {
  static constexpr int kRows = kChunk / kWarps;     // of a warp
  static constexpr int kLanes = kWarpSize / kRows;  // of a row

 public:
  __device__ __forceinline__ QueryRow(const Tile<bf16>& q, const float* gauge, float scale)
      : q_(q), gauge_(gauge), scale_(scale) {}

  static __device__ __forceinline__ int row() { return kRows * warp() + lane() % kRows; }
  /// Whether this lane speaks for the row.
  static __device__ __forceinline__ bool is_first_lane() { return part() == 0; }

  /// The largest exponent, which is subtracted from all.
  __device__ __forceinline__ Exponent shift() const {
    float top = -INFINITY;
    for_each<2>([&](float x, float m) { top = fmaxf(top, fmaf(x, scale_, m)); });
    top = largest(top);
    return are_near(top) ? Exponent{top, 0} : exact_shift();
  }

  /// The row becomes phi = exp(q + gauge - shift) * factor; all zero for the factor 0, whatever the exponents.
  __device__ __forceinline__ void map(const Exponent& shift, float factor) const {
    map(shift, factor, [](uint32_t, int) {});
  }

  /// The same with the factor 1; returns phi . z.
  __device__ __forceinline__ float map_and_dot(const Exponent& shift, const float* z) const {
    float past = 0;
    map(shift, 1, [&](uint32_t phi, int c) { past += low(phi) * z[c] + high(phi) * z[c + 1]; });
    return of_row(past, [](float a, float b) { return a + b; });
  }

  /// The product of this row of another tile with row j of a third.
  template <int kColumns>
  static __device__ __forceinline__ float dot(const Tile<bf16>& a, const Tile<bf16>& b, int j) {
    float sum = 0;
#pragma unroll 1
    for (int c = kVector * part(); c < kColumns; c += kVector * kLanes) {
      const uint4 x = *reinterpret_cast<const uint4*>(a.at(row(), c)), y = *reinterpret_cast<const uint4*>(b.at(j, c));
      const uint32_t left[4] = {x.x, x.y, x.z, x.w}, right[4] = {y.x, y.y, y.z, y.w};
      for (int i = 0; i < 4; ++i) sum += low(left[i]) * low(right[i]) + high(left[i]) * high(right[i]);
    }
    return of_row(sum, [](float a, float b) { return a + b; });
  }

 private:
  static __device__ __forceinline__ int part() { return lane() / kRows; }

  /// Whether the shifts of all rows of the warp are so small that one float is enough for each exponent: the error of
  /// the largest is below 2^-15, where bfloat16 has 2^-9.
  static __device__ __forceinline__ bool are_near(float shift) { return __all_sync(kFullMask, fabsf(shift) < 256); }

  /// Of rows that need not be near.
  __device__ __forceinline__ Exponent exact_shift() const {
    constexpr float kFarShift = 1e8;
    float shift = -INFINITY, shift_low = 0;
    for_each<1>([&](float x, float m) {
      if (m != -INFINITY) shift = fmaxf(shift, exponent(__fmul_rn(x, scale_), m).high);
    });
    shift = largest(shift);
    const bool far = !(fabsf(shift) < kFarShift);
    if (__any_sync(kFullMask, far)) {  // the low part of an exponent alone may overflow exp
      float low_of_largest = -INFINITY;
      for_each<1>([&](float x, float m) {
        const Exponent e = exponent(__fmul_rn(x, scale_), m);
        if (m != -INFINITY && e.high == shift) low_of_largest = fmaxf(low_of_largest, e.low);
      });
      low_of_largest = largest(low_of_largest);
      if (far && low_of_largest != -INFINITY) shift_low = low_of_largest;
    }
    return {shift, shift_low};
  }

  __device__ __forceinline__ float exact_feature(float x, float m, const Exponent& shift) const {
    const Exponent e = exponent(__fmul_rn(x, scale_), m);
    return m == -INFINITY ? 0.f : feature((e.high - shift.high) + (e.low - shift.low));
  }

  template <class F>
  __device__ __forceinline__ void map(const Exponent& shift, float factor, F&& seen) const {
    if (are_near(shift.high)) {
      const float down = shift.high * -kLog2E;
      const auto phi = [&](float x, float m) { return fast_exp2(fmaf(fmaf(x, scale_, m), kLog2E, down)) * factor; };
      replace<2>(factor != 0, phi, seen);
    } else {
      replace<1>(
          factor != 0, [&](float x, float m) { return exact_feature(x, m, shift) * factor; }, seen);
    }
  }

  template <class F>
  static __device__ __forceinline__ float of_row(float x, F&& combine) {
    for (int distance = kRows; distance < kWarpSize; distance *= 2) {
      x = combine(x, __shfl_xor_sync(kFullMask, x, distance));
    }
    return x;
  }
  static __device__ __forceinline__ float largest(float x) {
    return of_row(x, [](float a, float b) { return fmaxf(a, b); });
  }

  // Below, kBatch vectors of eight elements are read before the first of them is written.

  /// f(words, channel of the first element).
  template <int kBatch, class F>
  __device__ __forceinline__ void for_each_vector(F&& f) const {
    constexpr int kStep = kVector * kLanes;
    static_assert(kSize % (kBatch * kStep) == 0);
#pragma unroll 1
    for (int d = kVector * part(); d < kSize; d += kBatch * kStep) {
      uint4 words[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) words[i] = *reinterpret_cast<const uint4*>(q_.at(row(), d + kStep * i));
#pragma unroll
      for (int i = 0; i < kBatch; ++i) f(words[i], d + kStep * i);
    }
  }

  /// f(query, gauge) for every channel.
  template <int kBatch, class F>
  __device__ __forceinline__ void for_each(F&& f) const {
    for_each_vector<kBatch>([&](const uint4& words, int d) {
      const uint32_t pairs[4] = {words.x, words.y, words.z, words.w};
      for (int i = 0; i < 4; ++i) {
        f(low(pairs[i]), gauge_[d + 2 * i]);
        f(high(pairs[i]), gauge_[d + 2 * i + 1]);
      }
    });
  }

  /// phi(query, gauge), or 0, in place of every query; seen(two of them, channel of the first).
  template <int kBatch, class F, class G>
  __device__ __forceinline__ void replace(bool is_seeing, F&& phi, G&& seen) const {
    for_each_vector<kBatch>([&](const uint4& words, int d) {
      const uint32_t pairs[4] = {words.x, words.y, words.z, words.w};
      uint32_t features[4];
      for (int i = 0; i < 4; ++i) {
        const int c = d + 2 * i;
        features[i] = pack(phi(low(pairs[i]), gauge_[c]), phi(high(pairs[i]), gauge_[c + 1]));
        features[i] = is_seeing ? features[i] : 0;
        seen(features[i], c);
      }
      *reinterpret_cast<uint4*>(q_.at(row(), d)) = {features[0], features[1], features[2], features[3]};
    });
  }

  Tile<bf16> q_;
  const float* gauge_;
  float scale_;
};

}  // namespace elattn::cuda::chunked
