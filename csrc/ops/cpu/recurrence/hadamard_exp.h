#pragma once

#include <tuple>
#include <utility>

#include "ops/cpu/recurrence/map.h"

/// kappa = sum_d exp(q_d + k_d) (docs/math.md, sections 1, 2 and 9): psi = exp(k - gauge), phi = exp(q + gauge - shift)
/// / normaliser, with the gauge m + r of every channel following its largest key, decayed. Nothing overflows, whatever
/// the magnitudes.
namespace elattn::cpu {
inline namespace CPU_CAPABILITY {

/// kVectors: vectors in a padded row if known when compiled, else 0.
template <typename A, int kVectors>
class HadamardExp {
 public:
  using Scalar = A;
  static constexpr bool kHasValueGauge = false;

  HadamardExp(const AttentionParams& p, Buffers<A>& buffers, int64_t /*first_column*/, int64_t /*columns*/)
      : head_dim_(p.head_dim), size_(padded<A>(p.head_dim)), state_(state_layout(p.kernel)), value_dim_(p.value_dim) {
    z_ = buffers.take(size_);
    m_ = buffers.take(size_);
    r_ = buffers.take(size_);
  }

  int64_t rows() const { return head_dim_; }
  int64_t padded_rows() const { return size_; }
  /// Rates of forgetting per token.
  int64_t decay_channels() const { return head_dim_; }
  static constexpr A key_fill() { return -std::numeric_limits<A>::infinity(); }
  static constexpr A query_fill() { return 0; }
  const A* z() const { return z_; }
  int64_t matrix_offset() const { return offset("S"); }
  int64_t row_of_state(int64_t r) const { return r; }

  void load(const A* state) {
    fill(z_, size_, A(0));
    fill(m_, size_, kNone);
    fill(r_, size_, A(0));
    if (!state) return;
    const A *z = state + offset("z"), *m = state + offset("m"), *r = state + offset("r");
    for (int64_t d = 0; d < head_dim_; ++d) {
      z_[d] = z[d];
      if (z[d] == 0) continue;  // a channel without keys has no gauge yet
      m_[d] = m[d];
      r_[d] = r[d];
    }
  }

  void save(A* state) const {
    A *z = state + offset("z"), *m = state + offset("m"), *r = state + offset("r");
    for (int64_t d = 0; d < head_dim_; ++d) {
      z[d] = z_[d];
      m[d] = z_[d] == 0 ? -std::numeric_limits<A>::infinity() : m_[d];
      r[d] = z_[d] == 0 ? A(0) : r_[d];
    }
  }

  void save_columns(A*) const {}
  void load_normaliser(const A* state, A* z) const { std::copy_n(state + offset("z"), head_dim_, z); }
  void save_normaliser(const A* z, A* state) const { std::copy_n(z, head_dim_, state + offset("z")); }

  bool key(const A* k, const A* /*v*/, const A* decay, A* psi, A* scale) { return step<true>(k, decay, psi, scale); }
  bool key_again(const A* k, const A* decay, A* psi, A* scale) { return step<false>(k, decay, psi, scale); }

  Row<A> query(const A* q, A* phi) const {
    const int64_t n = vectors_in<kVectors, A>(size_);
    Vec<A> largest(-std::numeric_limits<A>::infinity());
    for (int64_t i = 0; i < n; ++i) largest = larger(at(q, i) + at(m_, i), largest);
    Row<A> row;
    row.shift = max_lanes(largest);
    const Vec<A> shift(row.shift);
    Vec<A> sum(A(0));
    for (int64_t i = 0; i < n; ++i) {
      const TwoSum<A> s(at(q, i), at(m_, i));
      const Vec<A> e = exp((s.sum - shift) + (s.error + at(r_, i)));
      e.store(phi + i * kLanes<A>);
      sum = at::vec::fmadd(e, at(z_, i), sum);
    }
    const A normaliser = sum_lanes(sum);
    // Comparisons that a NaN fails; beyond kFarShift the low part of q + m alone may overflow exp.
    if (!(std::abs(row.shift) < kFarShift && normaliser > 0 && normaliser < std::numeric_limits<A>::max())) {
      return careful_query(q, phi);
    }
    row.inverse = A(1) / normaliser;
    const Vec<A> inverse(row.inverse);
    for (int64_t i = 0; i < n; ++i) (at(phi, i) * inverse).store(phi + i * kLanes<A>);
    return row;
  }

  void query_again(const A* q, const Row<A>& row, A* phi) const {
    if (row.careful) return careful_phi(q, row, phi);
    const Vec<A> shift(row.shift), inverse(row.inverse);
    for (int64_t i = 0, n = vectors_in<kVectors, A>(size_); i < n; ++i) {
      const TwoSum<A> s(at(q, i), at(m_, i));
      (exp((s.sum - shift) + (s.error + at(r_, i))) * inverse).store(phi + i * kLanes<A>);
    }
  }

  /// u = S g. Writes dq; it sums to 0 over the channels up to rounding.
  void query_gradient(const A* /*q*/, const A* phi, const A* u, const A* z, const Row<A>& row, A* dq) const {
    const Vec<A> delta(row.delta);
    for (int64_t i = 0, n = vectors_in<kVectors, A>(size_); i < n; ++i) {
      (at(phi, i) * at::vec::fnmadd(delta, at(z, i), at(u, i))).store(dq + i * kLanes<A>);
    }
  }

  /// dpsi includes the part that comes through the normaliser.
  void key_gradient(const A* /*k*/, const A* psi, const A* dpsi, A* dk, int64_t size) const {
    for (int64_t i = 0; i < size; i += kLanes<A>) (Vec<A>::loadu(psi + i) * Vec<A>::loadu(dpsi + i)).store(dk + i);
  }

  int64_t gauge_size() const { return 2 * size_; }
  void save_gauge_before(A* to) const {
    std::copy(m_, m_ + size_, to);
    std::copy(r_, r_ + size_, to + size_);
  }
  void save_gauge_after(A*) const {}
  void load_gauge(const A* from) {
    std::copy(from, from + size_, m_);
    std::copy(from + size_, from + 2 * size_, r_);
  }

  void move_back(const A* before, const Matrix<A>& r, const Matrix<A>& transposed, A* rho) {
    const A *m0 = before, *r0 = before + size_;
    for (int64_t d = 0; d < head_dim_; ++d) {
      const A scale = std::exp((m0[d] - m_[d]) + (r0[d] - r_[d]));
      if (scale == 1) continue;
      rho[d] *= scale;
      for (int64_t j = 0; j < value_dim_; ++j) r(d, j) *= scale, transposed(d, j) *= scale;
    }
    load_gauge(before);
  }

 private:
  // The gauge of a channel without keys: below every key, yet q + kNone - kNone is a number.
  static constexpr A kNone = std::numeric_limits<A>::lowest();
  // A gauge that keys exceed by no more than kTrigger stays where it is: psi <= e^24, and S is rarely rescaled. When
  // one must be raised, so are all that keys exceed by kSlack, which with decay would follow one by one (docs/math.md,
  // section 9).
  static constexpr A kTrigger = 24, kSlack = 12;
  static constexpr A kFarShift = 1e8;
  static constexpr A kForget = 1e30;  // a rate that forgets everything; keeps the gauge finite

  static Vec<A> at(const A* x, int64_t i) { return Vec<A>::loadu(x + i * kLanes<A>); }
  int64_t offset(const char* field) const { return state_.offset(field, head_dim_, value_dim_); }

  template <bool kNormaliser>
  bool step(const A* k, const A* decay, A* psi, A* scale) {
    const int64_t n = vectors_in<kVectors, A>(size_);
    if (decay) {
      for (int64_t i = 0; i < n; ++i) {
        const TwoSum<A> s(at(m_, i), at(r_, i) - at::vec::clamp_max(at(decay, i), Vec<A>(kForget)));
        s.sum.store(m_ + i * kLanes<A>);
        s.error.store(r_ + i * kLanes<A>);
      }
    }
    Vec<A> excess(-std::numeric_limits<A>::infinity());
    for (int64_t i = 0; i < n; ++i) excess = larger(at(k, i) - at(m_, i), excess);
    const bool raised = any_greater(excess, kTrigger);
    if (raised) raise_gauge(k, scale);
    for (int64_t i = 0; i < n; ++i) {
      const Vec<A> e = exp((at(k, i) - at(m_, i)) - at(r_, i));
      e.store(psi + i * kLanes<A>);
      if constexpr (kNormaliser) (at(z_, i) + e).store(z_ + i * kLanes<A>);
    }
    return raised;
  }

  void raise_gauge(const A* k, A* scale) {
    const Vec<A> one(A(1)), zero(A(0)), slack(kSlack);
    for (int64_t i = 0, n = vectors_in<kVectors, A>(size_); i < n; ++i) {
      const Vec<A> key = at(k, i), m = at(m_, i), r = at(r_, i), raised = key - m > slack;
      const Vec<A> factor = Vec<A>::blendv(one, exp((m - key) + r), raised);
      factor.store(scale + i * kLanes<A>);
      (at(z_, i) * factor).store(z_ + i * kLanes<A>);
      Vec<A>::blendv(m, key, raised).store(m_ + i * kLanes<A>);
      Vec<A>::blendv(r, zero, raised).store(r_ + i * kLanes<A>);
    }
  }

  /// q + gauge as two floats; an overflow of finite numbers stays finite.
  std::pair<A, A> exponent(const A* q, int64_t d) const {
    constexpr A kMax = std::numeric_limits<A>::max();
    const A sum = q[d] + m_[d];
    if (!std::isfinite(sum))
      return {std::isfinite(q[d]) && std::isfinite(m_[d]) ? std::copysign(kMax, sum) : sum, A(0)};
    const A t = sum - q[d];
    return {sum, (q[d] - (sum - t)) + (m_[d] - t) + r_[d]};
  }

  bool has_keys(int64_t d) const { return m_[d] != kNone; }

  void careful_phi(const A* q, const Row<A>& row, A* phi) const {
    for (int64_t d = 0; d < size_; ++d) {
      const auto [high, low] = exponent(q, d);
      phi[d] = has_keys(d) ? std::exp((high - row.shift) + (low - row.shift_low)) * row.inverse : A(0);
    }
  }

  /// The slow way to `query`: rows without keys, exponents beyond the fast path, NaN.
  Row<A> careful_query(const A* q, A* phi) const {
    Row<A> row;
    row.careful = true;
    std::pair<A, A> largest(-std::numeric_limits<A>::infinity(), A(0));
    for (int64_t d = 0; d < size_; ++d) {
      if (has_keys(d)) largest = std::max(largest, exponent(q, d));
    }
    std::tie(row.shift, row.shift_low) = largest;
    row.inverse = 1;
    careful_phi(q, row, phi);
    const A normaliser = dot(phi, z_, size_);
    row.inverse = normaliser == 0 ? A(0) : A(1) / normaliser;
    multiply(phi, row.inverse, size_);
    return row;
  }

  int64_t head_dim_, size_;
  StateLayout state_;
  int64_t value_dim_;
  A *z_, *m_, *r_;  // normaliser and gauge m + r, (padded head_dim)
};

}  // namespace CPU_CAPABILITY
}  // namespace elattn::cpu
