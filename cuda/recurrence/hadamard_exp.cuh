#pragma once

#include "cuda/recurrence/map.cuh"

/// kappa = sum_d exp(q_d + k_d) (docs/math.md, sections 1, 2 and 9): psi = exp(k - gauge), phi = exp(q + gauge - shift)
/// / normaliser. The gauge m + r of a channel is raised to a key that exceeds it by more than kTrigger, token by token
/// and each channel by itself, so nothing overflows and no key is lost, whatever the magnitudes. Without decay a final
/// state is handed out in the gauge of the largest key, which does not depend on how the keys were gone through.
namespace elattn::cuda {

template <class A>
class HadamardExp {
 public:
  using Scalar = A;
  static constexpr bool kHasValueGauge = false;
  static constexpr bool kHasKeyGauge = true;

  __device__ HadamardExp(Arena& arena, const Shape& shape, const AttentionParams&) : s_(shape) {
    z_ = arena.take<A>(s_.size);
    m_ = arena.take<A>(s_.size);
    r_ = arena.take<A>(s_.size);
    top_ = arena.take<A>(s_.size);
  }
  static __host__ __device__ void carve(Arena& arena, const Shape& shape) {
    for (int i = 0; i < 4; ++i) arena.take<A>(shape.size);
  }

  static __device__ A key_fill() { return -infinity<A>(); }
  static __device__ A query_fill() { return 0; }
  __device__ int row_in_state(int r) const { return r; }
  static __device__ int64_t normaliser_in_state(const Shape& shape, int d) { return shape.z + d; }
  __device__ A* z() const { return z_; }
  __device__ A* m() const { return m_; }
  __device__ A* r() const { return r_; }

  __device__ void load(const A* state, int /*first*/, int /*count*/) {
    for (int d = thread(); d < s_.size; d += threads()) {
      A z = 0, m = 0, r = 0;
      if (state && d < s_.head_dim) {
        z = state[s_.z + d];
        m = state[s_.m + d];
        r = state[s_.r + d];
      }
      const bool empty = z == 0;  // a channel without keys has no gauge yet
      z_[d] = z;
      m_[d] = top_[d] = empty ? none() : m;
      r_[d] = empty ? A(0) : r;
    }
  }

  __device__ void save(A* state, bool all) const {
    if (!all) return;
    for (int d = thread(); d < s_.head_dim; d += threads()) {
      const bool empty = z_[d] == 0;
      state[s_.z + d] = z_[d];
      state[s_.m + d] = empty ? -infinity<A>() : m_[d];
      state[s_.r + d] = empty ? A(0) : r_[d];
    }
  }

  __device__ unsigned keys(const Chunk<A>& c, int n, const DecayRates<A>& decay, int64_t token) {
    return scan<true>(c, n, decay, token);
  }
  __device__ unsigned keys_again(const Chunk<A>& c, int n, const DecayRates<A>& decay, int64_t token) {
    return scan<false>(c, n, decay, token);
  }

  /// Row i of q, of token t of the chunk.
  __device__ Row<A> query(const Chunk<A>& c, int i, int t) const {
    const A *q = c.q.at(i, 0), *m = c.m.at(t, 0), *r = c.r.at(t, 0), *z = c.z.at(t, 0);
    A* phi = c.phi.at(i, 0);
    Row<A> row{-infinity<A>(), 0, 1};
    for (int d = lane(); d < s_.head_dim; d += kWarpSize) {
      if (m[d] != none()) row.shift = fmax(row.shift, exponent(q[d], m[d], r[d]).high);
    }
    row.shift = warp_max(row.shift);
    if (!(fabs(row.shift) < kFarShift)) {  // there the low part of an exponent alone may overflow exp
      A low = -infinity<A>();
      for (int d = lane(); d < s_.head_dim; d += kWarpSize) {
        const Exponent e = exponent(q[d], m[d], r[d]);
        if (m[d] != none() && e.high == row.shift) low = fmax(low, e.low);
      }
      low = warp_max(low);
      row.shift_low = low == -infinity<A>() ? A(0) : low;
    }
    A sum = 0;
    for (int d = lane(); d < s_.size; d += kWarpSize) {
      const A x = feature(d < s_.head_dim ? q[d] : A(0), m[d], r[d], row);
      phi[d] = x;
      sum += x * z[d];
    }
    sum = warp_sum(sum);
    row.inverse = sum == 0 ? A(0) : A(1) / sum;
    for (int d = lane(); d < s_.size; d += kWarpSize) phi[d] *= row.inverse;
    return row;
  }

  __device__ void query_again(const Chunk<A>& c, int i, int t, const Row<A>& row) const {
    const A *q = c.q.at(i, 0), *m = c.m.at(t, 0), *r = c.r.at(t, 0);
    A* phi = c.phi.at(i, 0);
    for (int d = lane(); d < s_.size; d += kWarpSize) {
      phi[d] = feature(d < s_.head_dim ? q[d] : A(0), m[d], r[d], row) * row.inverse;
    }
  }

  /// u = S g becomes dq, in place; it sums to 0 over the channels up to rounding.
  __device__ void query_gradient(const Chunk<A>& c, int i, int t, A delta, const Row<A>&, A* u) const {
    const A *phi = c.phi.at(i, 0), *z = c.z.at(t, 0);
    for (int d = lane(); d < s_.size; d += kWarpSize) u[d] = phi[d] * (u[d] - delta * z[d]);
  }

  /// dpsi, which includes the part that comes through the normaliser, becomes dk, in place.
  __device__ void key_gradient(const Chunk<A>& c, int t, A* dpsi) const {
    const A* psi = c.psi.at(t, 0);
    for (int d = lane(); d < s_.size; d += kWarpSize) dpsi[d] *= psi[d];
  }

  /// The gradient of what a gauge is in a state: 0.
  __device__ void clear_gauge(A* state, bool all) const {
    for (int d = thread(); all && d < s_.head_dim; d += threads()) state[s_.m + d] = state[s_.r + d] = 0;
  }
  /// What S and z of a channel are multiplied with for the gauge of its largest key, and, once they are, that gauge.
  __device__ A final_factor(int d) const { return exponential((m_[d] - top_[d]) + r_[d]); }
  __device__ void finish() {
    for (int d = thread(); d < s_.size; d += threads()) {
      z_[d] *= final_factor(d);
      m_[d] = top_[d];
      r_[d] = 0;
    }
  }

  static __host__ __device__ int gauge_size(const Shape& shape) { return 2 * shape.size; }
  __device__ void save_gauge(A* to, bool all) const {
    if (!all) return;
    for (int d = thread(); d < s_.size; d += threads()) {
      to[d] = m_[d];
      to[s_.size + d] = r_[d];
    }
  }
  __device__ void load_gauge(const A* from) {
    for (int d = thread(); d < s_.size; d += threads()) {
      m_[d] = from[d];
      r_[d] = from[s_.size + d];
    }
  }

  /// Gradients of S and z in the present gauge to that of `gauge`.
  __device__ void move_back(const A* gauge, const Matrix<A>& r, A* rho) {
    for (int d = warp(); d < s_.head_dim; d += warps()) {
      const A factor = exponential((gauge[d] - m_[d]) + (gauge[s_.size + d] - r_[d]));
      for (int j = lane(); j < s_.columns; j += kWarpSize) r(d, j) *= factor;
      if (rho && lane() == 0) rho[d] *= factor;
    }
    __syncthreads();
  }

 private:
  static constexpr A kTrigger = 24;  // psi stays below e^24, and S is rarely rescaled
  static constexpr A kFarShift = 1e8;
  static constexpr A kForget = 1e30;  // a rate that forgets everything; keeps the gauge finite

  /// The gauge of a channel without keys: below every key, yet q + none - none is a number.
  static __device__ A none() { return -largest_number<A>(); }

  struct Exponent {
    A high, low;
  };

  /// q + gauge as two numbers; an overflow of finite numbers stays finite.
  static __device__ Exponent exponent(A q, A m, A r) {
    const A sum = q + m;
    if (!isfinite(sum)) return {isfinite(q) && isfinite(m) ? copysign(largest_number<A>(), sum) : sum, A(0)};
    return {sum, TwoSum<A>(q, m).error + r};
  }

  static __device__ A feature(A q, A m, A r, const Row<A>& row) {
    if (m == none()) return 0;
    const Exponent e = exponent(q, m, r);
    return exponential((e.high - row.shift) + (e.low - row.shift_low));
  }

  template <bool kNormaliser>
  __device__ unsigned scan(const Chunk<A>& c, int n, const DecayRates<A>& decay, int64_t token) {
    unsigned raised = 0;
    for (int d = thread(); d < s_.size; d += threads()) {
      A m = m_[d], r = r_[d], z = z_[d], top = top_[d];
      for (int t = 0; t < n; ++t) {
        A psi = 0, factor = 1;
        if (!c.is_padding(t) && d < s_.head_dim) {
          if (decay.any()) {
            const TwoSum<A> s(m, r - fmin(decay(token + t, d), kForget));
            m = s.sum;
            r = s.error;
          }
          const A key = c.k(t, d);
          top = fmax(top, key);
          if (key - m > kTrigger) {
            factor = exponential((m - key) + r);
            z *= factor;
            m = key;
            r = 0;
            raised |= 1u << t;
          }
          psi = exponential((key - m) - r);
          z += psi;
        }
        c.psi(t, d) = psi;
        c.scales(t, d) = factor;
        c.m(t, d) = m;
        c.r(t, d) = r;
        if constexpr (kNormaliser) c.z(t, d) = z;
      }
      m_[d] = m;
      r_[d] = r;
      z_[d] = z;
      top_[d] = top;
    }
    return block_or(raised, c.words);
  }

  Shape s_;
  A *z_, *m_, *r_;  // normaliser and gauge m + r, (size)
  A* top_;          // the largest key, (size)
};

}  // namespace elattn::cuda
