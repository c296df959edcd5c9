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

/// Queries in the tiles of `piece` become phi = exp(q + gauge - shift), in place, and past = phi . z. Every row is done
/// by a few lanes of one warp.
template <int kSize, int kValues>
__device__ __forceinline__ void map_queries(const Storage<kSize, kValues>& s, const Tile<bf16>& q, const Piece& piece,
                                            float scale) {
  constexpr int kRows = kChunk / Storage<kSize, kValues>::kWarps;  // of a warp
  constexpr int kLanes = kWarpSize / kRows;                        // of a row
  constexpr float kFarShift = 1e8;
  const int row = kRows * warp() + lane() % kRows, part = lane() / kRows;
  if (!piece.has_tile(row / kTile)) return;

  // f(words of eight elements, channel of the first).
  const auto for_each_vector = [&](auto&& f) {
#pragma unroll 1
    for (int d = kVector * part; d < kSize; d += kVector * kLanes) f(*reinterpret_cast<uint4*>(q.at(row, d)), d);
  };
  const auto of_row = [&](float x, auto&& combine) {
    for (int distance = kRows; distance < kWarpSize; distance *= 2) {
      x = combine(x, __shfl_xor_sync(kFullMask, x, distance));
    }
    return x;
  };
  const auto largest = [&](float x) { return of_row(x, [](float a, float b) { return fmaxf(a, b); }); };
  // f(query, gauge, channel) for two channels of a word.
  const auto for_each = [&](auto&& f) {
    for_each_vector([&](const uint4& words, int d) {
      const uint32_t pairs[4] = {words.x, words.y, words.z, words.w};
      for (int i = 0; i < 4; ++i) {
        f(__fmul_rn(low(pairs[i]), scale), s.gauge[d + 2 * i]);
        f(__fmul_rn(high(pairs[i]), scale), s.gauge[d + 2 * i + 1]);
      }
    });
  };

  float shift = -INFINITY, shift_low = 0;
  for_each([&](float x, float m) {
    if (m != kNone) shift = fmaxf(shift, exponent(x, m).high);
  });
  shift = largest(shift);
  const bool far = !(fabsf(shift) < kFarShift);
  if (__any_sync(kFullMask, far)) {  // the low part of an exponent alone may overflow exp
    float low_of_largest = -INFINITY;
    for_each([&](float x, float m) {
      const Exponent e = exponent(x, m);
      if (m != kNone && e.high == shift) low_of_largest = fmaxf(low_of_largest, e.low);
    });
    low_of_largest = largest(low_of_largest);
    if (far && low_of_largest != -INFINITY) shift_low = low_of_largest;
  }

  float past = 0;
  for_each_vector([&](uint4& words, int d) {
    const uint32_t pairs[4] = {words.x, words.y, words.z, words.w};
    const auto phi = [&](float x, float m) {
      const Exponent e = exponent(__fmul_rn(x, scale), m);
      return m == kNone ? 0.f : feature((e.high - shift) + (e.low - shift_low));
    };
    uint32_t features[4];
    for (int i = 0; i < 4; ++i) {
      const int c = d + 2 * i;
      features[i] = pack(phi(low(pairs[i]), s.gauge[c]), phi(high(pairs[i]), s.gauge[c + 1]));
      past += low(features[i]) * s.z[c] + high(features[i]) * s.z[c + 1];
    }
    words = {features[0], features[1], features[2], features[3]};
  });
  past = of_row(past, [](float a, float b) { return a + b; });
  if (part == 0) s.past[row] = past;
}

}  // namespace elattn::cuda::chunked
