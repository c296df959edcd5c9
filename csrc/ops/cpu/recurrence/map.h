#pragma once

#include "ops/cpu/recurrence/rows.h"

/// What the kernels have in common. Each kernel kappa(q, k) is phi(q) . psi(k) in a gauge that may move from token to
/// token; a "map" holds the gauge and the normaliser z = sum psi(k) of one (sequence, kv head), turns keys into psi and
/// queries into phi / (phi . z), and carries gradients back from them. The products with S = sum psi(k) v^T are the
/// same for all (products.h).
///
/// Every map has
/// - rows(), padded_rows(): the number of features, and in whole vectors;
/// - key_fill(), query_fill(): what the lanes beyond head_dim hold; they must yield psi = 0 and phi z = 0;
/// - matrix_offset(), row_of_state(r): where a state holds S, and which row of S its row r is;
/// - load(state), save(state): all of a state but S; save_columns(state): what belongs to the value columns;
/// - load_normaliser, save_normaliser: z alone (padded_rows), of a state or of its gradient;
/// - key(k, v, decay, psi, scale): one more token; true if `scale` (padded_rows) was written and multiplies S first;
/// - query(q, phi) -> Row: phi / (phi . z), so that y = phi S;
/// - key_again, query_again: the same features in the reverse pass, where z is not known;
/// - query_gradient, key_gradient: from the gradients of phi and psi to those of q and k; without a value gauge
///   key_gradient takes channels one by one, so that it may be given `size` of them;
/// - gauge_size(), save_gauge_before / _after, load_gauge: what the reverse pass needs to see a segment again;
/// - must_move(), move(S): a gauge that moves between tokens;
/// - move_back(gauge, R, Rt, rho): takes gradients of S and z back to an earlier gauge, which becomes the present one.
namespace elattn::cpu {
inline namespace CPU_CAPABILITY {

/// What one query row leaves for the backward pass.
template <typename A>
struct Row {
  A shift = 0, shift_low = 0;  // subtracted from the exponents of phi
  A inverse = 0;               // 1 / normaliser; 0 where the row sees no key
  A delta = 0;                 // gradient . output, in the value gauge
  bool careful = false;        // an exponent left the range of the fast path
};

/// Vectors in a row of `size` numbers: the constant kVectors where it is not 0.
template <int kVectors, typename A>
constexpr int64_t vectors_in(int64_t size) {
  return kVectors ? kVectors : size / kLanes<A>;
}

/// sum_i a_i b_i.
template <typename A>
A dot(const A* a, const A* b, int64_t size) {
  Vec<A> sum(A(0));
  int64_t i = 0;
  for (; i + kLanes<A> <= size; i += kLanes<A>) sum = at::vec::fmadd(Vec<A>::loadu(a + i), Vec<A>::loadu(b + i), sum);
  if (i < size) sum = at::vec::fmadd(Vec<A>::loadu(a + i, size - i), Vec<A>::loadu(b + i, size - i), sum);
  return sum_lanes(sum);
}

/// x *= factor over whole vectors.
template <typename A>
void multiply(A* x, A factor, int64_t size) {
  const Vec<A> f(factor);
  for (int64_t i = 0; i < size; i += kLanes<A>) (Vec<A>::loadu(x + i) * f).store(x + i);
}

/// x += y over whole vectors.
template <typename A>
void add(A* x, const A* y, int64_t size) {
  for (int64_t i = 0; i < size; i += kLanes<A>) (Vec<A>::loadu(x + i) + Vec<A>::loadu(y + i)).store(x + i);
}

/// x += factor * y over whole vectors.
template <typename A>
void add_multiple(A* x, A factor, const A* y, int64_t size) {
  const Vec<A> f(factor);
  for (int64_t i = 0; i < size; i += kLanes<A>) {
    at::vec::fmadd(f, Vec<A>::loadu(y + i), Vec<A>::loadu(x + i)).store(x + i);
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace elattn::cpu
