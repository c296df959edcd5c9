#pragma once

#include "cuda/recurrence/features.cuh"
#include "cuda/recurrence/hadamard_exp.cuh"
#include "cuda/recurrence/products.cuh"
#include "cuda/recurrence/squared.cuh"

namespace elattn::cuda {

/// Value columns [first, first + count) of one (sequence, kv head), which one block computes.
struct WorkItem {
  int64_t index, head;
  int first, count;
  int column_block;

  /// Item i of (sequence, kv head, column block) in row-major order.
  __device__ WorkItem(const AttentionParams& p, const Shape& s, int64_t i)
      : index(i / s.column_blocks() / p.kv_heads), head(i / s.column_blocks() % p.kv_heads) {
    take_columns(s, static_cast<int>(i % s.column_blocks()));
  }

  __device__ void take_columns(const Shape& s, int block) {
    column_block = block;
    first = block * s.columns;
    count = s.value_dim - first < s.columns ? s.value_dim - first : s.columns;
  }
};

/// The shared memory of a forward: `carve` takes the map's and then these.
template <class A>
struct ForwardTiles {
  Chunk<A> chunk;
  Tile<A> s, y;  // (size, columns), (rows, columns)
  A* inverse;    // (rows): of the queries, for maps with a value gauge

  __host__ __device__ ForwardTiles(Arena& arena, const Shape& s, bool key_gauge) {
    chunk.q = chunk.phi = arena.tile<A>(s.chunk, s.size);
    chunk.k = chunk.psi = arena.tile<A>(s.tokens, s.size);
    chunk.v = arena.tile<A>(s.tokens, s.columns);
    chunk.scales = arena.tile<A>(s.tokens, s.size);
    chunk.z = arena.tile<A>(s.tokens, s.size);
    if (key_gauge) {
      chunk.m = arena.tile<A>(s.tokens, s.size);
      chunk.r = arena.tile<A>(s.tokens, s.size);
    }
    this->s = arena.tile<A>(s.size, s.columns);
    y = arena.tile<A>(s.chunk, s.columns);
    inverse = arena.take<A>(s.chunk);
    chunk.words = arena.take<unsigned>(kWarpSize);
  }
};

template <class Map>
__host__ __device__ size_t forward_bytes(const Shape& shape) {
  using A = typename Map::Scalar;
  Arena arena(nullptr);
  Map::carve(arena, shape);
  ForwardTiles<A>(arena, shape, Map::kHasKeyGauge);
  return arena.bytes();
}

/// Outputs, and states where asked for, of one work item.
template <class Map>
class Forward {
 public:
  using A = typename Map::Scalar;

  __device__ Forward(const AttentionParams& p, const Shape& shape, const WorkItem& item, Arena& arena)
      : p_(p),
        s_(shape),
        item_(item),
        sequence_(sequence(p, item.index)),
        map_(arena, shape, p),
        tiles_(arena, shape, Map::kHasKeyGauge),
        decay_(p.decay, sequence_, item.head),
        batch_(static_cast<int>(p.group < shape.chunk ? p.group : shape.chunk)) {}

  __device__ void run() {
    load(state_row<A>(p_.state_in, item_.index, item_.head));
    const Segments segments(sequence_.key_len, s_.tokens, Map::kHasValueGauge);
    for (int64_t i = 0, n = segments.count(); i < n; ++i) {
      keys(segments.begin(i), segments.size(i));
      if (p_.is_causal) {
        queries(segments.begin(i), segments.size(i), true);
      } else {
        multiply(segments.size(i), 0, true);
      }
      if constexpr (Map::kHasValueGauge) {
        if (map_.must_move()) map_.move(matrix());
      }
    }
    if (!p_.is_causal) {
      Chunk<A>& c = tiles_.chunk;
      c.z = repeated(map_.z());
      c.m = repeated(map_.m());
      c.r = repeated(map_.r());
      for (int64_t t = 0; t < sequence_.query_len; t += s_.tokens) {
        const int64_t rest = sequence_.query_len - t;
        queries(t, rest < s_.tokens ? static_cast<int>(rest) : s_.tokens, false);
      }
    }
    if constexpr (Map::kHasKeyGauge) {
      if (p_.state_out.data && !decay_.any()) finish();
    }
    save(state_row<A>(p_.state_out, item_.index, item_.head), item_.column_block == 0);
  }

  /// One token; the state is changed in place. All column blocks one after the other: while one changes z, no other
  /// may read it.
  __device__ void step(A* state) {
    for (int block = 0; block < s_.column_blocks(); ++block) {
      item_.take_columns(s_, block);
      load(state);
      keys(0, 1);
      queries(0, 1, true);
      if constexpr (Map::kHasValueGauge) {
        if (map_.must_move()) map_.move(matrix());
      }
      save(state, block + 1 == s_.column_blocks());
      __syncthreads();
    }
  }

  /// The output of an inactive entry.
  __device__ void skip() {
    for (int block = 0; block < s_.column_blocks(); ++block) {
      item_.take_columns(s_, block);
      for (int i = thread(); i < s_.chunk * s_.columns; i += threads()) tiles_.y(i / s_.columns, i % s_.columns) = 0;
      __syncthreads();
      for (int g = 0; g < p_.group; g += batch_) write(0, 1, g, batch_of(g));
    }
  }

 private:
  __device__ Matrix<A> matrix() const { return {tiles_.s, false}; }

  __device__ void load(const A* state) {
    map_.load(state, item_.first, item_.count);
    load_matrix(map_, state, matrix(), s_, item_.first, item_.count);
    __syncthreads();
  }

  __device__ void finish() {
    __syncthreads();
    for (int r = warp(); r < s_.rows; r += warps()) {
      const A factor = map_.final_factor(r);
      for (int j = lane(); j < s_.columns; j += kWarpSize) tiles_.s(r, j) *= factor;
    }
    __syncthreads();
    map_.finish();
    __syncthreads();
  }

  __device__ void save(A* state, bool all) const {
    if (!state) return;
    map_.save(state, all);
    save_matrix(map_, matrix(), state, s_, item_.first, item_.count);
  }

  /// psi of tokens [t, t + n), and their values in the value gauge.
  __device__ void keys(int64_t t, int n) {
    Chunk<A>& c = tiles_.chunk;
    c.skip = read_padding(p_, sequence_, t, n);
    load_rows(c.k, p_.dtype, RowBlock(p_.k, sequence_.batch, item_.head, sequence_.key_begin + t, 0, n, 1, s_.head_dim),
              s_.key_size, static_cast<A>(p_.scale), Map::key_fill(), c.skip);
    load_rows(c.v, p_.dtype,
              RowBlock(p_.v, sequence_.batch, item_.head, sequence_.key_begin + t, item_.first, n, 1, item_.count),
              s_.columns, A(1), A(0), c.skip);
    __syncthreads();
    scaled_ = map_.keys(c, n, decay_, t);
    if constexpr (Map::kHasValueGauge) {
      for (int i = warp(); i < n; i += warps()) {
        for (int j = lane(); j < s_.columns; j += kWarpSize) c.v(i, j) -= map_.value_gauge()[j];
      }
    }
    __syncthreads();
  }

  /// Outputs of tokens [t, t + n), in batches of the heads of a group; the first also updates S where `update`.
  __device__ void queries(int64_t t, int n, bool update) {
    const Chunk<A>& c = tiles_.chunk;
    for (int g = 0; g < p_.group; g += batch_) {
      const int heads = batch_of(g);
      const int64_t head = item_.head * p_.group + g;
      load_rows(c.q, p_.dtype,
                RowBlock(p_.q, sequence_.batch, head, sequence_.query_begin + t, 0, n, heads, s_.head_dim), s_.key_size,
                static_cast<A>(p_.scale), Map::query_fill());
      __syncthreads();
      for (int i = warp(); i < n * heads; i += warps()) {
        const Row<A> row = map_.query(c, i, i / heads);
        if (lane() == 0) tiles_.inverse[i] = row.inverse;
      }
      __syncthreads();
      multiply(n, heads, update && g == 0);
      if constexpr (Map::kHasValueGauge) {
        for (int i = warp(); i < n * heads; i += warps()) {
          if (tiles_.inverse[i] == 0) continue;  // sees no key
          for (int j = lane(); j < s_.columns; j += kWarpSize) tiles_.y(i, j) += map_.value_gauge()[j];
        }
        __syncthreads();
      }
      write(t, n, g, heads);
    }
  }

  __device__ int batch_of(int g) const { return p_.group - g < batch_ ? static_cast<int>(p_.group) - g : batch_; }

  /// Rows of y to the outputs of heads [g, g + heads) of the group.
  __device__ void write(int64_t t, int n, int g, int heads) const {
    store_rows(p_.dtype,
               RowBlock(p_.out, sequence_.batch, item_.head * p_.group + g, sequence_.query_begin + t, item_.first, n,
                        heads, item_.count),
               tiles_.y, A(1));
    __syncthreads();
  }

  __device__ void multiply(int n, int reads, bool update) {
    const Chunk<A>& c = tiles_.chunk;
    Products<A> p;
    p.s = tiles_.s;
    p.rows = s_.rows;
    p.columns = s_.columns;
    p.tokens = n;
    p.updates = update;
    p.coefficients = c.psi;
    p.vectors = c.v;
    p.reads = reads;
    p.weights = c.phi;
    p.results = tiles_.y;
    p.scaling = Scaling::Rows;
    p.scales = c.scales;
    p.scaled = update ? scaled_ : 0;
    products(p);
    __syncthreads();
  }

  const AttentionParams& p_;
  Shape s_;
  WorkItem item_;
  Sequence sequence_;
  Map map_;
  ForwardTiles<A> tiles_;
  DecayRates<A> decay_;
  int batch_;  // heads of a group at a time
  unsigned scaled_ = 0;
};

}  // namespace elattn::cuda
