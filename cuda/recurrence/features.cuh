#pragma once

#include "cuda/recurrence/map.cuh"

/// kappa = phi(q) . psi(k) with non-negative features (docs/math.md, section 4): those of the caller, or elu(x) + 1.
namespace elattn::cuda {

template <class A>
class Features {
 public:
  using Scalar = A;
  static constexpr bool kHasValueGauge = false;
  static constexpr bool kHasKeyGauge = false;

  __device__ Features(Arena& arena, const Shape& shape, const AttentionParams& p)
      : s_(shape), elu_(p.kernel == KernelKind::Elu) {
    z_ = arena.take<A>(s_.size);
  }
  static __host__ __device__ void carve(Arena& arena, const Shape& shape) { arena.take<A>(shape.size); }

  static __device__ A key_fill() { return 0; }
  static __device__ A query_fill() { return 0; }
  __device__ int row_in_state(int r) const { return r; }
  static __device__ int64_t normaliser_in_state(const Shape& shape, int d) { return shape.z + d; }
  __device__ A* z() const { return z_; }
  __device__ A* m() const { return nullptr; }
  __device__ A* r() const { return nullptr; }

  __device__ void load(const A* state, int /*first*/, int /*count*/) {
    for (int d = thread(); d < s_.size; d += threads()) z_[d] = state && d < s_.head_dim ? state[s_.z + d] : A(0);
  }
  __device__ void save(A* state, bool all) const {
    if (!all) return;
    for (int d = thread(); d < s_.head_dim; d += threads()) state[s_.z + d] = z_[d];
  }

  __device__ unsigned keys(const Chunk<A>& c, int n, const DecayRates<A>& decay, int64_t token) {
    return scan<true>(c, n, decay, token);
  }
  __device__ unsigned keys_again(const Chunk<A>& c, int n, const DecayRates<A>& decay, int64_t token) {
    return scan<false>(c, n, decay, token);
  }

  /// `shift` holds the power of two that phi was multiplied with, `shift_low` what the exponents of elu were lowered
  /// by.
  __device__ Row<A> query(const Chunk<A>& c, int i, int t) const {
    const A *q = c.q.at(i, 0), *z = c.z.at(t, 0);
    A* phi = c.phi.at(i, 0);
    A top = elu_ ? -infinity<A>() : A(0);
    for (int d = lane(); d < s_.head_dim; d += kWarpSize) top = fmax(top, elu_ ? q[d] : fabs(q[d]));
    top = warp_max(top);
    Row<A> row{1, 0, 0};
    if (top > 0 && isfinite(top)) power_of_two(-binary_exponent(elu_ ? top + 1 : top), row.shift);
    if (elu_ && isfinite(top)) row.shift_low = fmin(top, A(0));
    A sum = 0;
    for (int d = lane(); d < s_.size; d += kWarpSize) {
      const A x = d < s_.head_dim ? feature(q[d], row) : A(0);
      phi[d] = x;
      sum += x * z[d];
    }
    sum = warp_sum(sum);
    row.inverse = sum <= 16 * smallest_normal<A>() ? A(0) : A(1) / sum;  // a NaN passes
    for (int d = lane(); d < s_.size; d += kWarpSize) phi[d] *= row.inverse;
    return row;
  }

  __device__ void query_again(const Chunk<A>& c, int i, int /*t*/, const Row<A>& row) const {
    const A* q = c.q.at(i, 0);
    A* phi = c.phi.at(i, 0);
    for (int d = lane(); d < s_.size; d += kWarpSize) {
      phi[d] = d < s_.head_dim ? feature(q[d], row) * row.inverse : A(0);
    }
  }

  __device__ void query_gradient(const Chunk<A>& c, int i, int t, A delta, const Row<A>& row, A* u) const {
    const A *q = c.q.at(i, 0), *phi = c.phi.at(i, 0), *z = c.z.at(t, 0);
    for (int d = lane(); d < s_.head_dim; d += kWarpSize) {
      const A slope = elu_ && !(q[d] > 0) ? phi[d] : row.inverse * row.shift;
      u[d] = slope * (u[d] - delta * z[d]);
    }
  }

  __device__ void key_gradient(const Chunk<A>& c, int t, A* dpsi) const {
    const A *k = c.k.at(t, 0), *psi = c.psi.at(t, 0);
    for (int d = lane(); d < s_.head_dim; d += kWarpSize) {
      if (elu_ && !(k[d] > 0)) dpsi[d] *= psi[d];
    }
  }

  __device__ void clear_gauge(A*, bool) const {}
  static __host__ __device__ int gauge_size(const Shape&) { return 0; }
  __device__ void save_gauge(A*, bool) const {}
  __device__ void load_gauge(const A*) {}
  __device__ void move_back(const A*, const Matrix<A>&, A*) {}

 private:
  /// exp(x - shift) below 0, (x + 1) above, times the power of two.
  __device__ A feature(A q, const Row<A>& row) const {
    if (!elu_) return q * row.shift;
    return q > 0 ? (q + 1) * row.shift : exponential(q - row.shift_low) * row.shift;
  }

  template <bool kNormaliser>
  __device__ unsigned scan(const Chunk<A>& c, int n, const DecayRates<A>& decay, int64_t token) {
    unsigned scaled = 0;
    for (int d = thread(); d < s_.size; d += threads()) {
      A z = z_[d];
      for (int t = 0; t < n; ++t) {
        A psi = 0, factor = 1;
        if (!c.is_padding(t)) {
          if (decay.any()) {
            factor = exponential(-decay(token + t, 0));
            scaled |= 1u << t;
          }
          if (d < s_.head_dim) {
            const A k = c.k(t, d);
            psi = !elu_ ? k : k > 0 ? k + 1 : exponential(k);
          }
        }
        z = z * factor + psi;
        c.psi(t, d) = psi;
        c.scales(t, d) = factor;
        if constexpr (kNormaliser) c.z(t, d) = z;
      }
      z_[d] = z;
    }
    return block_or(scaled, c.words);
  }

  Shape s_;
  bool elu_;
  A* z_;  // (size)
};

}  // namespace elattn::cuda
