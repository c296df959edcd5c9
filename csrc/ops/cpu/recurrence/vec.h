#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <cmath>
#include <cstdint>
#include <limits>

/// The vector operations that at::vec lacks or has too slowly for the inner loops.
namespace elattn::cpu {
inline namespace CPU_CAPABILITY {

template <typename A>
using Vec = at::vec::Vectorized<A>;

template <typename A>
inline constexpr int64_t kLanes = Vec<A>::size();

/// `n` rounded up to whole vectors.
template <typename A>
constexpr int64_t padded(int64_t n) {
  return (n + kLanes<A> - 1) / kLanes<A> * kLanes<A>;
}

inline Vec<double> exp(const Vec<double>& x) { return x.exp(); }

#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
/// exp to 1.5 ulp; below the smallest normal number it is 0, so that no subnormal slows the products down.
/// Argument reduction by ln 2 in two parts and a polynomial of degree 6 (coefficients of Cephes expf).
inline Vec<float> exp(const Vec<float>& x) {
  const Vec<float> power = (x * Vec<float>(1.44269504088896341f)).round();
  Vec<float> rest = at::vec::fnmadd(power, Vec<float>(0.693359375f), x);
  rest = at::vec::fmadd(power, Vec<float>(2.12194440e-4f), rest);
  Vec<float> p(1.9875691500e-4f);
  p = at::vec::fmadd(p, rest, Vec<float>(1.3981999507e-3f));
  p = at::vec::fmadd(p, rest, Vec<float>(8.3334519073e-3f));
  p = at::vec::fmadd(p, rest, Vec<float>(4.1665795894e-2f));
  p = at::vec::fmadd(p, rest, Vec<float>(1.6666665459e-1f));
  p = at::vec::fmadd(p, rest, Vec<float>(0.5f));
  p = at::vec::fmadd(p, rest * rest, rest + Vec<float>(1.0f));
  constexpr float kSmallest = -87.33654f;  // ln of the smallest normal float
#if defined(CPU_CAPABILITY_AVX512)
  const __mmask16 keep = _mm512_cmp_ps_mask(x, _mm512_set1_ps(kSmallest), _CMP_NLT_UQ);
  return _mm512_maskz_scalef_ps(keep, p, power);
#else
  const __m256 keep = _mm256_cmp_ps(x, _mm256_set1_ps(kSmallest), _CMP_NLT_UQ);
  // 2^power in two factors, so that 2^128 overflows to infinity like exp itself.
  const __m256i whole = _mm256_cvtps_epi32(_mm256_min_ps(power, _mm256_set1_ps(256)));
  const __m256i half = _mm256_srai_epi32(whole, 1);
  const auto two_to = [](__m256i n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
  };
  const __m256 scaled = _mm256_mul_ps(_mm256_mul_ps(p, two_to(half)), two_to(_mm256_sub_epi32(whole, half)));
  return _mm256_and_ps(keep, scaled);
#endif
}
#else
inline Vec<float> exp(const Vec<float>& x) { return x.exp(); }
#endif

template <typename A>
A sum_lanes(const Vec<A>& x) {
  return at::vec::vec_reduce_all<A>([](Vec<A>& a, Vec<A>& b) { return a + b; }, x);
}

/// The larger of two numbers in each lane; b where either is NaN.
template <typename A>
Vec<A> larger(const Vec<A>& a, const Vec<A>& b) {
  return at::vec::clamp_min(b, a);
}

template <typename A>
A max_lanes(const Vec<A>& x) {
  return at::vec::vec_reduce_all<A>([](Vec<A>& a, Vec<A>& b) { return larger(a, b); }, x);
}

template <typename A>
bool any_greater(const Vec<A>& a, A bound) {
  constexpr int kAll = static_cast<int>((int64_t{1} << kLanes<A>)-1);
  return (a > Vec<A>(bound)).zero_mask() != kAll;
}

/// s + e = a + b exactly, s = fl(a + b).
template <typename A>
struct TwoSum {
  Vec<A> sum, error;
  TwoSum(const Vec<A>& a, const Vec<A>& b) : sum(a + b) {
    const Vec<A> t = sum - a;
    error = (a - (sum - t)) + (b - t);
  }
};

}  // namespace CPU_CAPABILITY
}  // namespace elattn::cpu
