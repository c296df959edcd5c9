#pragma once

#include <numeric>

#include "ops/cpu/recurrence/map.h"

/// kappa = w (|q + s k|^2 + eps) (docs/math.md, section 3), s = +1 for sum_sq and directional, -1 for sub_sq. With k' =
/// k - c, v' = v - e and q' = q + s c it is phi(q') . psi(k'), psi = [w k', w, w |k'|^2], phi = [2 s q', |q'|^2 + eps,
/// 1]. The gauge (c, e) is moved to the means of keys and values whenever the sums lose digits to an offset; y = e +
/// phi S / (phi . z). directional is sum_sq on unit vectors with the weights w = |k|^2 + 1.
namespace elattn::cpu {
inline namespace CPU_CAPABILITY {

template <typename A>
class Squared {
 public:
  using Scalar = A;
  static constexpr bool kHasValueGauge = true;

  /// `columns`: padded value columns of this work item, the first of which is column `first_column` of v.
  Squared(const AttentionParams& p, Buffers<A>& buffers, int64_t first_column, int64_t columns)
      : sign_(p.kernel == KernelKind::SubSq ? A(-1) : A(1)),
        directional_(p.kernel == KernelKind::Directional),
        eps_(static_cast<A>(p.eps)),
        head_dim_(p.head_dim),
        key_size_(padded<A>(p.head_dim)),
        size_(padded<A>(p.head_dim + 2)),
        value_dim_(p.value_dim),
        first_column_(first_column),
        columns_(columns),
        own_columns_(std::min(columns, p.value_dim - first_column)),
        layout_(state_layout(p.kernel)) {
    c_ = buffers.take(key_size_);
    e_ = buffers.take(columns_);
    z_ = buffers.take(size_);
    centred_ = buffers.take(key_size_);
    unit_ = buffers.take(key_size_);
  }

  int64_t rows() const { return head_dim_ + 2; }
  int64_t padded_rows() const { return size_; }
  /// Rates of forgetting per token.
  int64_t decay_channels() const { return 1; }
  static constexpr A key_fill() { return 0; }
  static constexpr A query_fill() { return 0; }
  const A* z() const { return z_; }
  const A* value_gauge() const { return e_; }

  /// In a state the rows are sv | M | T, in S they are M, sv, T.
  int64_t matrix_offset() const { return offset("sv"); }
  int64_t row_of_state(int64_t r) const { return r == 0 ? count_row() : r <= head_dim_ ? r - 1 : square_row(); }

  void load(const A* state) {
    fill(c_, key_size_, A(0));
    fill(e_, columns_, A(0));
    fill(z_, size_, A(0));
    last_count_ = 0;
    if (!state) return;
    std::copy_n(state + offset("c"), head_dim_, c_);
    std::copy_n(state + offset("e") + first_column_, own_columns_, e_);
    load_normaliser(state, z_);
    last_count_ = z_[count_row()];
  }

  /// Everything shared by the columns; `save_columns` has the rest.
  void save(A* state) const {
    std::copy_n(c_, head_dim_, state + offset("c"));
    save_normaliser(z_, state);
  }
  void save_columns(A* state) const { std::copy_n(e_, own_columns_, state + offset("e") + first_column_); }

  /// n, sk, skk of a state (or of its gradient) in the order of z.
  void load_normaliser(const A* state, A* z) const {
    std::copy_n(state + offset("sk"), head_dim_, z);
    z[count_row()] = state[offset("n")];
    z[square_row()] = state[offset("skk")];
  }
  void save_normaliser(const A* z, A* state) const {
    std::copy_n(z, head_dim_, state + offset("sk"));
    state[offset("n")] = z[count_row()];
    state[offset("skk")] = z[square_row()];
  }

  bool key(const A* k, const A* v, const A* decay, A* psi, A* scale) {
    if (z_[count_row()] == 0) {  // the first key: no sum depends on the gauge yet
      std::copy_n(directional_ ? unit(k).vector : k, key_size_, c_);
      std::copy_n(v, columns_, e_);
    }
    last_count_ = z_[count_row()];
    const bool scaled = key_again(k, decay, psi, scale);
    if (scaled) multiply(z_, scale[0], size_);
    add(z_, psi, size_);
    return scaled;
  }

  bool key_again(const A* k, const A* decay, A* psi, A* scale) {
    A weight = 1;
    if (directional_) {
      const Unit u = unit(k);
      weight = u.norm * u.norm + 1;
      k = u.vector;
    }
    const Vec<A> w(weight);
    Vec<A> square(A(0));
    for (int64_t i = 0; i < key_size_; i += kLanes<A>) {
      const Vec<A> x = Vec<A>::loadu(k + i) - Vec<A>::loadu(c_ + i);
      square = at::vec::fmadd(x, x, square);
      (w * x).store(psi + i);
    }
    psi[count_row()] = weight;
    psi[square_row()] = weight * sum_lanes(square);
    if (decay) fill(scale, size_, std::exp(-decay[0]));
    return decay != nullptr;
  }

  Row<A> query(const A* q, A* phi) const {
    Row<A> row;
    features(q, phi);
    const A distances = dot(phi, z_, size_);  // negative only by rounding
    const A normaliser = (distances < 0 ? A(0) : distances) + eps_ * z_[count_row()];
    // A NaN passes; gradients would overflow on the inverse of a smaller number.
    row.inverse = normaliser < kSmallest ? A(0) : A(1) / normaliser;
    phi[count_row()] += eps_;
    multiply(phi, row.inverse, size_);
    return row;
  }

  void query_again(const A* q, const Row<A>& row, A* phi) const {
    features(q, phi);
    phi[count_row()] += eps_;
    multiply(phi, row.inverse, size_);
  }

  void query_gradient(const A* q, const A* /*phi*/, const A* u, const A* z, const Row<A>& row, A* dq) const {
    const A slope = 2 * row.inverse;
    const Unit direction = directional_ ? unit(q) : Unit{q, 1};
    const Vec<A> by_count(slope * (u[count_row()] - row.delta * z[count_row()]));
    const Vec<A> delta(row.delta), by_key(sign_ * slope), sign(sign_);
    for (int64_t i = 0; i < key_size_; i += kLanes<A>) {
      const Vec<A> centred = at::vec::fmadd(sign, Vec<A>::loadu(c_ + i), Vec<A>::loadu(direction.vector + i));
      const Vec<A> dphi = at::vec::fnmadd(delta, Vec<A>::loadu(z + i), Vec<A>::loadu(u + i));
      at::vec::fmadd(by_count, centred, by_key * dphi).store(dq + i);
    }
    if (directional_) through_unit(direction, dq);
  }

  void key_gradient(const A* k, const A* psi, const A* dpsi, A* dk, int64_t /*size*/) const {
    const Unit direction = directional_ ? unit(k) : Unit{k, 1};
    const A weight = psi[count_row()];
    const Vec<A> w(weight), by_square(2 * dpsi[square_row()]);
    for (int64_t i = 0; i < key_size_; i += kLanes<A>) {
      const Vec<A> centred = Vec<A>::loadu(direction.vector + i) - Vec<A>::loadu(c_ + i);
      centred.store(centred_ + i);
      (w * at::vec::fmadd(by_square, centred, Vec<A>::loadu(dpsi + i))).store(dk + i);
    }
    if (!directional_) return;
    through_unit(direction, dk);
    // dpsi[count] + k' . dpsi + |k'|^2 dpsi[square] is the gradient of the weight |k|^2 + 1.
    A by_weight = dpsi[count_row()] + dpsi[square_row()] * psi[square_row()] / weight;
    for (int64_t d = 0; d < head_dim_; ++d) by_weight += centred_[d] * dpsi[d];
    add_multiple(dk, 2 * by_weight * direction.norm, direction.vector, key_size_);
  }

  int64_t gauge_size() const { return key_size_ + columns_; }
  void save_gauge_before(A*) const {}
  void save_gauge_after(A* to) const {
    std::copy_n(c_, key_size_, to);
    std::copy_n(e_, columns_, to + key_size_);
  }
  void load_gauge(const A* from) {
    std::copy_n(from, key_size_, c_);
    std::copy_n(from + key_size_, columns_, e_);
  }

  /// Either the sum of weights has passed a power of two, so that the value gauge follows the mean of v; or the first
  /// moments of the keys have grown to a quarter of what the second moments allow, and a step would change c.
  bool must_move() const {
    const A count = z_[count_row()];
    if (last_count_ > 0 && std::ilogb(count) > std::ilogb(last_count_)) return true;
    const A first = dot(z_, z_, head_dim_);
    if (!(first > count * z_[square_row()] / 4)) return false;
    for (int64_t d = 0; d < head_dim_; ++d) {
      if (c_[d] + z_[d] / count != c_[d]) return true;
    }
    return false;
  }

  /// Moves the gauge to the means and S and z with it.
  void move(const Matrix<A>& s) {
    const A count = z_[count_row()];
    last_count_ = count;
    std::vector<A> d(static_cast<size_t>(head_dim_));
    for (int64_t i = 0; i < head_dim_; ++i) {
      const A next = c_[i] + z_[i] / count;
      d[i] = next - c_[i];
      c_[i] = next;
    }
    const A length = std::inner_product(d.begin(), d.end(), d.begin(), A(0));
    A along = 0;  // d . sk
    for (int64_t i = 0; i < head_dim_; ++i) along += d[i] * z_[i];
    z_[square_row()] += -2 * along + count * length;
    for (int64_t i = 0; i < head_dim_; ++i) z_[i] -= count * d[i];
    for (int64_t j = 0; j < own_columns_; ++j) {
      const A sv = s(count_row(), j);
      A dm = 0;
      for (int64_t i = 0; i < head_dim_; ++i) {
        dm += d[i] * s(i, j);
        s(i, j) -= d[i] * sv;
      }
      s(square_row(), j) += -2 * dm + length * sv;
      const A next = e_[j] + sv / count, h = next - e_[j];
      e_[j] = next;
      s(square_row(), j) -= z_[square_row()] * h;
      for (int64_t i = 0; i < head_dim_; ++i) s(i, j) -= z_[i] * h;
      s(count_row(), j) -= count * h;
    }
  }

  /// The adjoint of `move` from the gauge (c0, e0) to the present one.
  void move_back(const A* before, const Matrix<A>& r, const Matrix<A>& transposed, A* rho) {
    const A *c0 = before, *e0 = before + key_size_;
    if (std::equal(c_, c_ + key_size_, c0) && std::equal(e_, e_ + columns_, e0)) return;
    for (int64_t j = 0; j < own_columns_; ++j) {
      const A h = e_[j] - e0[j];
      rho[square_row()] -= r(square_row(), j) * h;
      for (int64_t i = 0; i < head_dim_; ++i) rho[i] -= r(i, j) * h;
      rho[count_row()] -= r(count_row(), j) * h;
    }
    std::vector<A> d(static_cast<size_t>(head_dim_));
    for (int64_t i = 0; i < head_dim_; ++i) d[i] = c_[i] - c0[i];
    const A length = std::inner_product(d.begin(), d.end(), d.begin(), A(0));
    A along = 0;
    for (int64_t i = 0; i < head_dim_; ++i) along += d[i] * rho[i];
    rho[count_row()] += length * rho[square_row()] - along;
    for (int64_t i = 0; i < head_dim_; ++i) rho[i] -= 2 * d[i] * rho[square_row()];
    for (const Matrix<A>* m : {&r, &transposed}) {
      for (int64_t j = 0; j < own_columns_; ++j) {
        const A square = (*m)(square_row(), j);
        A dm = 0;
        for (int64_t i = 0; i < head_dim_; ++i) {
          dm += d[i] * (*m)(i, j);
          (*m)(i, j) -= 2 * d[i] * square;
        }
        (*m)(count_row(), j) += length * square - dm;
      }
    }
    load_gauge(before);
  }

 private:
  static constexpr A kSmallest = std::numeric_limits<A>::min() * (1 << 27);  // 1.6e-30 in float32

  struct Unit {
    const A* vector;
    A norm;
  };

  int64_t count_row() const { return head_dim_; }
  int64_t square_row() const { return head_dim_ + 1; }
  int64_t offset(const char* field) const { return layout_.offset(field, head_dim_, value_dim_); }

  /// x / |x| and |x|, 0 / 0 = 0; without overflow in |x|.
  Unit unit(const A* x) const {
    Vec<A> largest(A(0));
    for (int64_t i = 0; i < key_size_; i += kLanes<A>) largest = larger(Vec<A>::loadu(x + i).abs(), largest);
    const A top = max_lanes(largest);
    if (top == 0) {  // zeros or, as `larger` passes them over, NaN
      std::copy_n(x, key_size_, unit_);
      return {unit_, dot(x, x, key_size_)};
    }
    const A power = std::isfinite(top) ? std::ldexp(A(1), -std::ilogb(top)) : A(1);
    for (int64_t i = 0; i < key_size_; i += kLanes<A>) (Vec<A>::loadu(x + i) * Vec<A>(power)).store(unit_ + i);
    const A norm = std::sqrt(dot(unit_, unit_, key_size_));
    // Division, not a product with 1 / norm: in one dimension the unit must be exactly 1.
    for (int64_t i = 0; i < key_size_; i += kLanes<A>) (Vec<A>::loadu(unit_ + i) / Vec<A>(norm)).store(unit_ + i);
    return {unit_, norm / power};
  }

  /// dx = (dy - y (y . dy)) / |x| for y = x / |x|, in place.
  void through_unit(const Unit& y, A* dy) const {
    if (y.norm == 0) return fill(dy, key_size_, A(0));
    add_multiple(dy, -dot(dy, y.vector, key_size_), y.vector, key_size_);
    multiply(dy, A(1) / y.norm, key_size_);
  }

  /// phi without eps.
  void features(const A* q, A* phi) const {
    if (directional_) q = unit(q).vector;
    const Vec<A> sign(sign_), twice(2 * sign_);
    Vec<A> square(A(0));
    for (int64_t i = 0; i < key_size_; i += kLanes<A>) {
      const Vec<A> x = at::vec::fmadd(sign, Vec<A>::loadu(c_ + i), Vec<A>::loadu(q + i));
      square = at::vec::fmadd(x, x, square);
      (twice * x).store(phi + i);
    }
    fill(phi + head_dim_, size_ - head_dim_, A(0));
    phi[count_row()] = sum_lanes(square);
    phi[square_row()] = 1;
  }

  A sign_;
  bool directional_;
  A eps_;
  int64_t head_dim_, key_size_, size_, value_dim_, first_column_, columns_, own_columns_;
  StateLayout layout_;
  A *c_, *e_;                   // gauge of keys (padded head_dim) and values (columns)
  A* z_;                        // [sk, n, skk], (padded rows)
  A last_count_ = 0;            // sum of weights before the last key
  mutable A *centred_, *unit_;  // scratch, (padded head_dim)
};

}  // namespace CPU_CAPABILITY
}  // namespace elattn::cpu
