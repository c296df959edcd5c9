#pragma once

#include <cstdint>

#include "cuda/recurrence/rows.cuh"

/// What the kernels have in common. Each kernel kappa(q, k) is phi(q) . psi(k) in a gauge that may move from token to
/// token; a "map" holds the gauge and the normaliser z = sum psi(k) of one (sequence, kv head) in shared memory, turns
/// keys into psi and queries into phi / (phi . z), and carries gradients back from them. The products with S = sum
/// psi(k) v^T are the same for all (products.cuh). The formulas are those of csrc/ops/cpu/recurrence, where map.h says
/// what each function is for; here a block computes a chunk of tokens at a time:
///
/// - load(state), save(state, first): all of a state but S;
/// - keys(chunk, n, ...): psi of n tokens, the factors of S, and z and the gauge after each token; returns which tokens
///   have factors. All threads call it, barriers lie before and after;
/// - query(...): one row of phi by one warp;
/// - keys_again, query_again: the same features in the reverse pass, where z is not known;
/// - query_gradient, key_gradient: rows by one warp;
/// - must_move(), move(S): a gauge that moves after a chunk; move_back(gauge, R, rho): the adjoint.
namespace elattn::cuda {

/// Sizes of one launch, and where a state has its parts.
struct Shape {
  int head_dim = 0, value_dim = 0;
  int key_size = 0;        // head_dim in whole warps
  int rows = 0, size = 0;  // features; in whole warps
  int columns = 0;         // value columns of a block, in whole warps
  int chunk = 0;           // rows that are held at a time, a power of two up to kMaxChunk
  int tokens = 0;          // tokens of a chunk: so many that their queries fit, a power of two
  __host__ __device__ int column_blocks() const { return (value_dim + columns - 1) / columns; }

  int64_t matrix = 0, z = 0, m = 0, r = 0, c = 0, e = 0, n = 0, sk = 0, skk = 0;  // offsets in a state
};

inline constexpr int kMaxChunk = 16;

/// The chunks of a sequence of keys. Where the gauge moves only between chunks they begin small (squared.cuh): their
/// ends are 1, 2, 4, ... and then the multiples of `tokens`.
struct Segments {
  int64_t len;
  int tokens;
  int ramp;  // chunks before the first whole one, less one: log2(tokens), or -1 for none

  __host__ __device__ Segments(int64_t len, int tokens, bool ramped) : len(len), tokens(tokens), ramp(-1) {
    if (ramped) {
      for (int n = tokens; n > 0; n /= 2) ++ramp;
    }
  }

  __host__ __device__ int64_t begin(int64_t i) const {
    const int64_t at = ramp < 0 ? i * tokens : i == 0 ? 0 : i <= ramp ? int64_t{1} << (i - 1) : (i - ramp) * tokens;
    return at < len ? at : len;
  }
  __host__ __device__ int size(int64_t i) const { return static_cast<int>(begin(i + 1) - begin(i)); }
  __host__ __device__ int64_t count() const {
    if (len > tokens || ramp < 0) return (len + tokens - 1) / tokens + (ramp < 0 ? 0 : ramp);
    int64_t i = 0;
    while (begin(i) < len) ++i;
    return i;
  }
};

/// What one query row leaves for the backward pass.
template <class A>
struct Row {
  A shift, shift_low;  // subtracted from the exponents of phi
  A inverse;           // 1 / normaliser; 0 where the row sees no key
};

/// A chunk of tokens in shared memory. Where nothing needs them apart, phi and q share a tile, as do psi and k.
template <class A>
struct Chunk {
  Tile<A> q, k, v;            // (rows, key_size), (tokens, key_size), (tokens, columns)
  Tile<A> phi, psi;           // (rows, size), (tokens, size)
  Tile<A> scales;             // (tokens, size): factors of S before a token
  Tile<A> z, m, r;            // (tokens, size): normaliser and gauge after a token; ld 0: the same for all
  unsigned skip = 0;          // bit t: token t is padding
  unsigned* words = nullptr;  // (warps), for block_or

  __device__ __forceinline__ bool is_padding(int t) const { return skip >> t & 1; }
};

/// One tile row for all tokens.
template <class A>
__device__ __forceinline__ Tile<A> repeated(A* row) {
  return {row, 0};
}

/// A (features, value columns) matrix in shared memory, as it is or transposed.
template <class A>
struct Matrix {
  Tile<A> tile;
  bool transposed;
  __device__ __forceinline__ A& operator()(int feature, int column) const {
    return transposed ? tile(column, feature) : tile(feature, column);
  }
};

/// The same matrix where it lies in a state, in global memory.
template <class Map, class A>
struct StateMatrix {
  const Map& map;
  const Shape& shape;
  A* state;
  __device__ __forceinline__ A& operator()(int feature, int column) const {
    return state[shape.matrix + static_cast<int64_t>(map.row_in_state(feature)) * shape.value_dim + column];
  }
};

/// Columns [first, first + count) of S between a state and shared memory; what lies beyond them becomes zero.
template <class Map, class A>
__device__ void load_matrix(const Map& map, const A* state, const Matrix<A>& to, const Shape& s, int first, int count) {
  const StateMatrix<Map, const A> from{map, s, state};
  for (int r = warp(); r < s.size; r += warps()) {
    for (int j = lane(); j < s.columns; j += kWarpSize) {
      const bool inside = state && r < s.rows && j < count;
      to(r, j) = inside ? from(r, first + j) : A(0);
    }
  }
}

template <class Map, class A>
__device__ void save_matrix(const Map& map, const Matrix<A>& from, A* state, const Shape& s, int first, int count) {
  const StateMatrix<Map, A> to{map, s, state};
  for (int r = warp(); r < s.rows; r += warps()) {
    for (int j = lane(); j < count; j += kWarpSize) to(r, first + j) = from(r, j);
  }
}

}  // namespace elattn::cuda
