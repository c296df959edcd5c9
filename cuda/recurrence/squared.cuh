#pragma once

#include "cuda/recurrence/map.cuh"

/// kappa = w (|q + s k|^2 + eps) (docs/math.md, section 3), s = +1 for sum_sq and directional, -1 for sub_sq. With k' =
/// k - c, v' = v - e and q' = q + s c it is phi(q') . psi(k'), psi = [w k', w, w |k'|^2], phi = [2 s q', |q'|^2 + eps,
/// 1]. directional is sum_sq on unit vectors with the weights w = |k|^2 + 1; q and k then hold the unit vectors.
///
/// The gauge (c, e) stays during a chunk and moves to the means of keys and values after it. It begins at the first key
/// and value; the first chunks have 1, 1, 2, 4 and 8 tokens, so that it is never that of few keys while it serves many.
namespace elattn::cuda {

template <class A>
class Squared {
 public:
  using Scalar = A;
  static constexpr bool kHasValueGauge = true;
  static constexpr bool kHasKeyGauge = false;

  __device__ Squared(Arena& arena, const Shape& shape, const AttentionParams& p)
      : s_(shape),
        sign_(p.kernel == KernelKind::SubSq ? A(-1) : A(1)),
        directional_(p.kernel == KernelKind::Directional),
        eps_(static_cast<A>(p.eps)) {
    carve(arena, shape, *this);
  }
  static __host__ __device__ void carve(Arena& arena, const Shape& shape) {
    Squared unused;
    carve(arena, shape, unused);
  }

  static __device__ A key_fill() { return 0; }
  static __device__ A query_fill() { return 0; }
  /// In a state the rows are sv | M | T, in S they are M, sv, T.
  __device__ int row_in_state(int r) const { return r == count_row() ? 0 : r == square_row() ? r : r + 1; }
  /// z is [sk, n, skk].
  static __device__ int64_t normaliser_in_state(const Shape& shape, int d) {
    return d < shape.head_dim ? shape.sk + d : d == shape.head_dim ? shape.n : shape.skk;
  }
  __device__ A* z() const { return z_; }
  __device__ A* m() const { return nullptr; }
  __device__ A* r() const { return nullptr; }
  __device__ const A* value_gauge() const { return e_; }

  __device__ void load(const A* state, int first, int count) {
    first_ = first;
    count_ = count;
    for (int d = thread(); d < s_.size; d += threads()) {
      z_[d] = state && d < s_.rows ? state[normaliser_in_state(s_, d)] : A(0);
      if (d < s_.key_size) c_[d] = state && d < s_.head_dim ? state[s_.c + d] : A(0);
    }
    for (int j = thread(); j < s_.columns; j += threads()) e_[j] = state && j < count ? state[s_.e + first + j] : A(0);
  }

  __device__ void save(A* state, bool all) const {
    for (int j = thread(); j < count_; j += threads()) state[s_.e + first_ + j] = e_[j];
    if (!all) return;
    for (int d = thread(); d < s_.rows; d += threads()) {
      state[normaliser_in_state(s_, d)] = z_[d];
      if (d < s_.head_dim) state[s_.c + d] = c_[d];
    }
  }

  __device__ unsigned keys(const Chunk<A>& c, int n, const DecayRates<A>& decay, int64_t token) {
    if (directional_) make_units(c, n);
    const bool empty = z_[count_row()] == 0;
    if (thread() == 0) *count_before_ = z_[count_row()];
    if (empty) begin_gauge(c, n);
    if (directional_ || empty) __syncthreads();
    features(c, n, decay, token);
    __syncthreads();
    for (int d = thread(); d < s_.size; d += threads()) {
      A z = z_[d];
      for (int t = 0; t < n; ++t) {
        z = z * c.scales(t, d) + c.psi(t, d);
        c.z(t, d) = z;
      }
      z_[d] = z;
    }
    return block_or(scaled(c, n, decay), c.words);
  }

  __device__ unsigned keys_again(const Chunk<A>& c, int n, const DecayRates<A>& decay, int64_t token) {
    if (directional_) {
      make_units(c, n);
      __syncthreads();
    }
    features(c, n, decay, token);
    return block_or(scaled(c, n, decay), c.words);
  }

  /// `shift` holds the norm of q where the kernel is directional.
  __device__ Row<A> query(const Chunk<A>& c, int i, int t) const {
    const A* z = c.z.at(t, 0);
    A* phi = c.phi.at(i, 0);
    Row<A> row{distances(c, i), 0, 0};
    const A sum = warp_dot(phi, z, s_.size);  // negative only by rounding
    const A normaliser = (sum < 0 ? A(0) : sum) + eps_ * z[count_row()];
    // A NaN passes; gradients would overflow on the inverse of a smaller number.
    row.inverse = normaliser < smallest_normal<A>() * (1 << 27) ? A(0) : A(1) / normaliser;
    finish(phi, row);
    return row;
  }

  __device__ void query_again(const Chunk<A>& c, int i, int /*t*/, const Row<A>& row) const {
    distances(c, i);
    finish(c.phi.at(i, 0), row);
  }

  __device__ void query_gradient(const Chunk<A>& c, int i, int t, A delta, const Row<A>& row, A* u) const {
    const A *q = c.q.at(i, 0), *z = c.z.at(t, 0);
    const A slope = 2 * row.inverse, by_count = slope * (u[count_row()] - delta * z[count_row()]);
    __syncwarp();
    for (int d = lane(); d < s_.head_dim; d += kWarpSize) {
      u[d] = by_count * (q[d] + sign_ * c_[d]) + sign_ * slope * (u[d] - delta * z[d]);
    }
    __syncwarp();
    if (directional_) through_unit(q, row.shift, u);
  }

  __device__ void key_gradient(const Chunk<A>& c, int t, A* dpsi) const {
    const A *k = c.k.at(t, 0), *psi = c.psi.at(t, 0);
    const A weight = psi[count_row()], square = dpsi[square_row()];
    A by_weight = 0;
    for (int d = lane(); d < s_.head_dim; d += kWarpSize) by_weight += (k[d] - c_[d]) * dpsi[d];
    by_weight = warp_sum(by_weight) + dpsi[count_row()] + square * psi[square_row()] / weight;
    __syncwarp();
    for (int d = lane(); d < s_.head_dim; d += kWarpSize) dpsi[d] = weight * (2 * square * (k[d] - c_[d]) + dpsi[d]);
    __syncwarp();
    if (!directional_) return;
    const A norm = norms_[t];
    through_unit(k, norm, dpsi);
    // by_weight is the gradient of the weight |k|^2 + 1.
    for (int d = lane(); d < s_.head_dim; d += kWarpSize) dpsi[d] += 2 * by_weight * norm * k[d];
    __syncwarp();
  }

  __device__ void clear_gauge(A* state, bool all) const {
    for (int j = thread(); j < count_; j += threads()) state[s_.e + first_ + j] = 0;
    for (int d = thread(); all && d < s_.head_dim; d += threads()) state[s_.c + d] = 0;
  }
  static __host__ __device__ int gauge_size(const Shape& shape) { return shape.key_size + shape.value_dim; }
  __device__ void save_gauge(A* to, bool all) const {
    for (int j = thread(); j < count_; j += threads()) to[s_.key_size + first_ + j] = e_[j];
    if (!all) return;
    for (int d = thread(); d < s_.key_size; d += threads()) to[d] = c_[d];
  }
  __device__ void load_gauge(const A* from) {
    for (int d = thread(); d < s_.key_size; d += threads()) c_[d] = from[d];
    for (int j = thread(); j < s_.columns; j += threads()) e_[j] = j < count_ ? from[s_.key_size + first_ + j] : A(0);
  }

  /// Either the sum of weights has passed a power of two, so that the value gauge follows the mean of v; or the first
  /// moments of the keys have grown to a quarter of what the second moments allow. The same for all threads.
  __device__ bool must_move() const {
    const A count = z_[count_row()], before = *count_before_;
    if (!(count > 0)) return false;
    if (before == 0 || binary_exponent(count) > binary_exponent(before)) return true;
    const A first = warp_dot(z_, z_, s_.head_dim);
    return first > count * z_[square_row()] / 4;
  }

  /// Moves the gauge to the means and S, a Matrix or StateMatrix, and z with it; begins and ends with a barrier.
  template <class M>
  __device__ void move(const M& s) {
    __syncthreads();
    const A count = z_[count_row()];
    for (int d = thread(); d < s_.key_size; d += threads()) {
      const A next = d < s_.head_dim ? c_[d] + z_[d] / count : A(0);
      shift_[d] = next - c_[d];
      c_[d] = next;
    }
    __syncthreads();
    const A length = warp_dot(shift_, shift_, s_.head_dim), along = warp_dot(shift_, z_, s_.head_dim);
    __syncthreads();
    for (int d = thread(); d < s_.head_dim; d += threads()) z_[d] -= count * shift_[d];
    if (thread() == 0) z_[square_row()] += -2 * along + count * length;
    __syncthreads();
    for (int j = thread(); j < count_; j += threads()) {
      const A sv = s(count_row(), j), next = e_[j] + sv / count, h = next - e_[j];
      e_[j] = next;
      A dm = 0;
      for (int d = 0; d < s_.head_dim; ++d) {
        dm += shift_[d] * s(d, j);
        s(d, j) = (s(d, j) - shift_[d] * sv) - z_[d] * h;
      }
      s(square_row(), j) = (s(square_row(), j) + (-2 * dm + length * sv)) - z_[square_row()] * h;
      s(count_row(), j) = sv - count * h;
    }
    __syncthreads();
  }

  /// The adjoint of `move` from `gauge` to the present one; rho is null where only R is wanted.
  __device__ void move_back(const A* gauge, const Matrix<A>& r, A* rho) {
    for (int d = thread(); d < s_.key_size; d += threads()) shift_[d] = c_[d] - gauge[d];
    for (int j = thread(); j < s_.columns; j += threads())
      value_shift_[j] = j < count_ ? e_[j] - gauge[s_.key_size + first_ + j] : A(0);
    __syncthreads();
    const A length = warp_dot(shift_, shift_, s_.head_dim);
    if (rho) {
      for (int d = warp(); d < s_.rows; d += warps()) {
        A sum = 0;
        for (int j = lane(); j < s_.columns; j += kWarpSize) sum += r(d, j) * value_shift_[j];
        sum = warp_sum(sum);
        if (lane() == 0) rho[d] -= sum;
      }
      __syncthreads();
      const A along = warp_dot(shift_, rho, s_.head_dim), square = rho[square_row()];
      __syncthreads();
      for (int d = thread(); d < s_.head_dim; d += threads()) rho[d] -= 2 * shift_[d] * square;
      if (thread() == 0) rho[count_row()] += length * square - along;
    }
    for (int j = thread(); j < s_.columns; j += threads()) {
      const A square = r(square_row(), j);
      A dm = 0;
      for (int d = 0; d < s_.head_dim; ++d) {
        dm += shift_[d] * r(d, j);
        r(d, j) -= 2 * shift_[d] * square;
      }
      r(count_row(), j) += length * square - dm;
    }
    __syncthreads();
  }

 private:
  __host__ __device__ Squared() {}

  static __host__ __device__ void carve(Arena& arena, const Shape& shape, Squared& map) {
    map.c_ = arena.take<A>(shape.key_size);
    map.e_ = arena.take<A>(shape.columns);
    map.z_ = arena.take<A>(shape.size);
    map.shift_ = arena.take<A>(shape.key_size);
    map.value_shift_ = arena.take<A>(shape.columns);
    map.norms_ = arena.take<A>(kMaxChunk);
    map.count_before_ = arena.take<A>(1);
  }

  __device__ int count_row() const { return s_.head_dim; }
  __device__ int square_row() const { return s_.head_dim + 1; }
  /// The first key and value of a chunk that are no padding.
  __device__ void begin_gauge(const Chunk<A>& c, int n) {
    int first = 0;
    while (first < n && c.is_padding(first)) ++first;
    if (first == n) return;
    for (int d = thread(); d < s_.key_size; d += threads()) c_[d] = c.k(first, d);
    for (int j = thread(); j < s_.columns; j += threads()) e_[j] = c.v(first, j);
  }

  /// Keys to unit vectors, and their norms.
  __device__ void make_units(const Chunk<A>& c, int n) {
    for (int t = warp(); t < n; t += warps()) {
      const A norm = c.is_padding(t) ? A(0) : unit(c.k.at(t, 0));
      if (lane() == 0) norms_[t] = norm;
    }
    __syncthreads();
  }

  __device__ void features(const Chunk<A>& c, int n, const DecayRates<A>& decay, int64_t token) const {
    for (int t = warp(); t < n; t += warps()) {
      const bool padding = c.is_padding(t);
      const A weight = padding ? A(0) : directional_ ? norms_[t] * norms_[t] + 1 : A(1);
      const A factor = decay.any() && !padding ? exponential(-decay(token + t, 0)) : A(1);
      A square = 0;
      for (int d = lane(); d < s_.size; d += kWarpSize) {
        const A x = d < s_.head_dim && !padding ? c.k(t, d) - c_[d] : A(0);
        square += x * x;
        c.psi(t, d) = weight * x;
        c.scales(t, d) = factor;
      }
      square = warp_sum(square);
      __syncwarp();
      if (lane() == 0) {
        c.psi(t, count_row()) = weight;
        c.psi(t, square_row()) = weight * square;
      }
    }
  }

  __device__ unsigned scaled(const Chunk<A>& c, int n, const DecayRates<A>& decay) const {
    unsigned bits = 0;
    if (decay.any()) {
      for (int t = 0; t < n; ++t) bits |= c.is_padding(t) ? 0 : 1u << t;
    }
    return bits;
  }

  /// phi without eps of row i of q, which becomes a unit vector if the kernel is directional; its norm then.
  __device__ A distances(const Chunk<A>& c, int i) const {
    A *q = c.q.at(i, 0), *phi = c.phi.at(i, 0);
    const A norm = directional_ ? unit(q) : A(0);
    A square = 0;
    for (int d = lane(); d < s_.size; d += kWarpSize) {
      const A x = d < s_.head_dim ? q[d] + sign_ * c_[d] : A(0);
      square += x * x;
      phi[d] = 2 * sign_ * x;
    }
    square = warp_sum(square);
    __syncwarp();
    if (lane() == 0) {
      phi[count_row()] = square;
      phi[square_row()] = 1;
    }
    __syncwarp();
    return norm;
  }

  __device__ void finish(A* phi, const Row<A>& row) const {
    __syncwarp();
    if (lane() == 0) phi[count_row()] += eps_;
    __syncwarp();
    for (int d = lane(); d < s_.size; d += kWarpSize) phi[d] *= row.inverse;
  }

  /// x / |x| in place and |x|, 0 / 0 = 0; without overflow in |x|.
  __device__ A unit(A* x) const {
    A top = 0;
    for (int d = lane(); d < s_.head_dim; d += kWarpSize) top = fmax(top, fabs(x[d]));
    top = warp_max(top);
    if (top == 0) return warp_dot(x, x, s_.head_dim);  // zeros or, as fmax passes them over, NaN
    A power = 1;
    if (isfinite(top)) power_of_two(-binary_exponent(top), power);
    for (int d = lane(); d < s_.head_dim; d += kWarpSize) x[d] *= power;
    const A norm = sqrt(warp_dot(x, x, s_.head_dim));
    // Division, not a product with 1 / norm: in one dimension the unit must be exactly 1.
    for (int d = lane(); d < s_.head_dim; d += kWarpSize) x[d] /= norm;
    __syncwarp();
    return norm / power;
  }

  /// dx = (dy - y (y . dy)) / |x| for y = x / |x|, in place.
  __device__ void through_unit(const A* y, A norm, A* dy) const {
    const A along = warp_dot(dy, y, s_.head_dim);
    for (int d = lane(); d < s_.head_dim; d += kWarpSize) dy[d] = norm == 0 ? A(0) : (dy[d] - along * y[d]) / norm;
    __syncwarp();
  }

  Shape s_;
  int first_ = 0, count_ = 0;  // value columns of this block
  A sign_;
  bool directional_;
  A eps_;
  A *c_, *e_;                // gauge of keys (key_size) and values (columns)
  A* z_;                     // [sk, n, skk], (size)
  A *shift_, *value_shift_;  // of the gauge, (key_size) and (columns)
  A* norms_;                 // of the keys of a chunk, (kMaxChunk)
  A* count_before_;          // sum of weights before the chunk
};

}  // namespace elattn::cuda
