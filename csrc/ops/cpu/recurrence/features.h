#pragma once

#include "ops/cpu/recurrence/map.h"

/// kappa = phi(q) . psi(k) with non-negative features (docs/math.md, section 4): those of the caller, or elu(x) + 1.
namespace elattn::cpu {
inline namespace CPU_CAPABILITY {

template <typename A>
class Features {
 public:
  using Scalar = A;
  static constexpr bool kHasValueGauge = false;

  Features(const AttentionParams& p, Buffers<A>& buffers, int64_t /*first_column*/, int64_t /*columns*/)
      : elu_(p.kernel == KernelKind::Elu),
        head_dim_(p.head_dim),
        size_(padded<A>(p.head_dim)),
        z_offset_(state_layout(p.kernel).offset("z", p.head_dim, p.value_dim)) {
    z_ = buffers.take(size_);
  }

  int64_t rows() const { return head_dim_; }
  int64_t padded_rows() const { return size_; }
  int64_t decay_channels() const { return 1; }
  A key_fill() const { return elu_ ? -std::numeric_limits<A>::infinity() : A(0); }
  A query_fill() const { return key_fill(); }
  const A* z() const { return z_; }
  int64_t matrix_offset() const { return 0; }
  int64_t row_of_state(int64_t r) const { return r; }

  void load(const A* state) {
    fill(z_, size_, A(0));
    if (state) load_normaliser(state, z_);
  }
  void save(A* state) const { save_normaliser(z_, state); }
  void save_columns(A*) const {}
  void load_normaliser(const A* state, A* z) const { std::copy_n(state + z_offset_, head_dim_, z); }
  void save_normaliser(const A* z, A* state) const { std::copy_n(z, head_dim_, state + z_offset_); }

  bool key(const A* k, const A* /*v*/, const A* decay, A* psi, A* scale) {
    const bool scaled = key_again(k, decay, psi, scale);
    if (scaled) multiply(z_, scale[0], size_);
    add(z_, psi, size_);
    return scaled;
  }

  bool key_again(const A* k, const A* decay, A* psi, A* scale) {
    for (int64_t i = 0; i < size_; i += kLanes<A>) {
      const Vec<A> x = Vec<A>::loadu(k + i);
      (elu_ ? elu(x, Vec<A>(A(0)), Vec<A>(A(1))) : x).store(psi + i);
    }
    if (decay) fill(scale, size_, std::exp(-decay[0]));
    return decay != nullptr;
  }

  Row<A> query(const A* q, A* phi) const {
    Row<A> row;
    const A power = features(q, row, phi);
    const A normaliser = dot(phi, z_, size_);
    // A NaN passes; a sum that is not positive sees no key.
    row.inverse = normaliser <= kTiny ? A(0) : A(1) / normaliser;
    multiply(phi, row.inverse, size_);
    row.inverse *= power;
    return row;
  }

  void query_again(const A* q, const Row<A>& stored, A* phi) const {
    Row<A> row;
    const A power = features(q, row, phi);
    multiply(phi, stored.inverse / power, size_);
  }

  void query_gradient(const A* q, const A* phi, const A* u, const A* z, const Row<A>& row, A* dq) const {
    const Vec<A> delta(row.delta), inverse(row.inverse), zero(A(0));
    for (int64_t i = 0; i < size_; i += kLanes<A>) {
      Vec<A> slope = inverse;
      if (elu_) slope = Vec<A>::blendv(Vec<A>::loadu(phi + i), inverse, Vec<A>::loadu(q + i) > zero);
      (slope * at::vec::fnmadd(delta, Vec<A>::loadu(z + i), Vec<A>::loadu(u + i))).store(dq + i);
    }
  }

  void key_gradient(const A* k, const A* psi, const A* dpsi, A* dk, int64_t size) const {
    const Vec<A> zero(A(0)), one(A(1));
    for (int64_t i = 0; i < size; i += kLanes<A>) {
      Vec<A> slope = one;
      if (elu_) slope = Vec<A>::blendv(Vec<A>::loadu(psi + i), one, Vec<A>::loadu(k + i) > zero);
      (slope * Vec<A>::loadu(dpsi + i)).store(dk + i);
    }
  }

  int64_t gauge_size() const { return 0; }
  void save_gauge_before(A*) const {}
  void save_gauge_after(A*) const {}
  void load_gauge(const A*) {}
  void move_back(const A*, const Matrix<A>&, const Matrix<A>&, A*) {}

 private:
  // After the scaling of phi, below this a sum is no longer that of normal numbers.
  static constexpr A kTiny = 16 * std::numeric_limits<A>::min();

  /// exp(x - shift) below 0, (x + 1) * factor above.
  static Vec<A> elu(const Vec<A>& x, const Vec<A>& shift, const Vec<A>& factor) {
    const Vec<A> zero(A(0));
    return Vec<A>::blendv(exp(x - shift) * factor, (x + Vec<A>(A(1))) * factor, x > zero);
  }

  /// phi times a factor that cancels in y and keeps the normaliser in range: a power of two, or e^-shift where every
  /// elu is below 1. Returns the power of two.
  A features(const A* q, Row<A>& row, A* phi) const {
    Vec<A> largest(A(0));
    if (elu_) {
      largest = Vec<A>(-std::numeric_limits<A>::infinity());
      for (int64_t i = 0; i < size_; i += kLanes<A>) largest = larger(Vec<A>::loadu(q + i), largest);
    } else {
      for (int64_t i = 0; i < size_; i += kLanes<A>) largest = larger(Vec<A>::loadu(q + i).abs(), largest);
    }
    const A top = max_lanes(largest);
    const A power = top > 0 && std::isfinite(top) ? std::ldexp(A(1), -std::ilogb(elu_ ? top + 1 : top)) : A(1);
    row.shift = elu_ && std::isfinite(top) ? std::min(top, A(0)) : A(0);
    const Vec<A> shift(row.shift), factor(power);
    for (int64_t i = 0; i < size_; i += kLanes<A>) {
      const Vec<A> x = Vec<A>::loadu(q + i);
      (elu_ ? elu(x, shift, factor) : x * factor).store(phi + i);
    }
    return power;
  }

  bool elu_;
  int64_t head_dim_, size_, z_offset_;
  A* z_;  // (padded head_dim)
};

}  // namespace CPU_CAPABILITY
}  // namespace elattn::cpu
