#pragma once

#include "ops/cpu/recurrence/decay_gradient.h"
#include "ops/cpu/recurrence/forward.h"

/// What the backward pass holds, apart from the readers and writers of a thread, so that several can share it.
namespace elattn::cpu {
inline namespace CPU_CAPABILITY {

/// Numbers of type A in a cache line.
template <typename A>
inline constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(A));

template <typename A>
constexpr int64_t lines_of(int64_t size) {
  return (size + kLine<A> - 1) / kLine<A>;
}

/// Part `i` of `parts` of `size` columns: whole cache lines, so that no two members of a team write to the same one.
template <typename A>
Columns part_of(int64_t size, int64_t i, int64_t parts) {
  const int64_t first = lines_of<A>(size) * i / parts * kLine<A>;
  return {first, std::min(lines_of<A>(size) * (i + 1) / parts * kLine<A>, size) - first};
}

/// Tokens seen in one gauge, one chunk at most, whose features lie in the rows from `row` on.
struct Segment {
  int64_t begin, size, row;
};

/// What the scans over one (sequence, kv head) carry, and what they leave for one another. The members of a team share
/// it: each writes columns of its own of the matrices and of rho, and the rows of its own tokens.
template <typename Map>
struct Scans {
  using A = typename Map::Scalar;

  /// `tokens`: of those that are worked on at a time.
  Scans(const AttentionBackwardParams& p, int64_t tokens)
      : group(p.group), key_size(padded<A>(p.head_dim)), decay(p, buffers) {
    const Map map(p, buffers, 0, padded<A>(p.value_dim));
    size = map.padded_rows();
    gauge_size = map.gauge_size();
    transposed_stride = lines_of<A>(size) * kLine<A>;
    r_stride = lines_of<A>(p.value_dim) * kLine<A>;
    transposed = buffers.take(p.value_dim * transposed_stride);
    r = buffers.take(map.rows() * r_stride);
    rho = buffers.take(size);
    first_gauge = buffers.take(gauge_size);
    // One more row: the reverse pass keeps the scale of the token after the last.
    features = FeatureRows<A>(tokens + 1, group, size, buffers);
    z = buffers.take(tokens * size);
    u = buffers.take(tokens * group * size);
  }

  /// Tokens [t, t + n), which come after those of the last segment. Returns the segment's index.
  size_t add_segment(int64_t t, int64_t n, int64_t row) {
    segments.push_back({t, n, row});
    gauges.resize(gauges.size() + static_cast<size_t>(gauge_size));
    return segments.size() - 1;
  }

  A* gauge(size_t segment) { return gauges.data() + static_cast<int64_t>(segment) * gauge_size; }
  Row<A>& row(int64_t t, int64_t g) { return rows[static_cast<size_t>(t * group + g)]; }
  A* dq_of(int64_t t) { return dq_total.data() + t * key_size; }

  Buffers<A> buffers;
  int64_t group;
  int64_t key_size;          // padded head_dim
  int64_t size, gauge_size;  // padded rows of the map
  int64_t transposed_stride, r_stride;
  A* transposed;   // (value_dim, size): S, then R, transposed
  A* r;            // (rows, columns)
  A* rho;          // (size): the gradient of z
  A* first_gauge;  // of the initial state
  FeatureRows<A> features;
  A* z;  // (tokens, size)
  A* u;  // (tokens, group, size); in the reverse pass dpsi, (tokens, size)
  DecayGradient<A> decay;
  std::vector<Row<A>> rows;  // (queries, group)
  std::vector<Segment> segments;
  std::vector<A> gauges;    // of the segments
  std::vector<A> dq_total;  // (tokens, padded head_dim), summed over the group; only with rates per channel
};

}  // namespace CPU_CAPABILITY
}  // namespace elattn::cpu
