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

  __device__ WorkItem(const Shape& s, int64_t index, int64_t head, int column_block)
      : index(index), head(head), first(column_block * s.columns), column_block(column_block) {
    count = s.value_dim - first < s.columns ? s.value_dim - first : s.columns;
  }
  /// Item i of (sequence, kv head, column block) in row-major order.
  __device__ WorkItem(const AttentionParams& p, const Shape& s, int64_t i)
      : WorkItem(s, i / s.column_blocks() / p.kv_heads, i / s.column_blocks() % p.kv_heads,
                 static_cast<int>(i % s.column_blocks())) {}
};

template <class A>
struct ForwardChunk : Chunk<A> {
  A* inverse;  // (rows): of the queries, for maps with a value gauge

  __host__ __device__ ForwardChunk(Arena& arena, const Shape& s, bool key_gauge) {
    this->q = this->phi = arena.tile<A>(s.chunk, s.size);
    this->k = this->psi = arena.tile<A>(s.tokens, s.size);
    this->v = arena.tile<A>(s.tokens, s.columns);
    this->scales = arena.tile<A>(s.tokens, s.size);
    this->z = arena.tile<A>(s.tokens, s.size);
    if (key_gauge) {
      this->m = arena.tile<A>(s.tokens, s.size);
      this->r = arena.tile<A>(s.tokens, s.size);
    }
    inverse = arena.take<A>(s.chunk);
    this->words = arena.take<unsigned>(kWarpSize);
  }
};

/// From keys and queries to psi and phi: what a forward and a step have in common. Barriers before and after are the
/// caller's.
template <class Map>
class ForwardPass {
 public:
  using A = typename Map::Scalar;

  __device__ ForwardPass(const AttentionParams& p, const Shape& shape, const WorkItem& item, Arena& arena)
      : p_(p),
        s_(shape),
        item_(item),
        sequence_(sequence(p, item.index)),
        map_(arena, shape, p),
        chunk_(arena, shape, Map::kHasKeyGauge),
        decay_(p.decay, sequence_, item.head),
        batch_(static_cast<int>(p.group < shape.chunk ? p.group : shape.chunk)) {}

  /// The shared memory that the constructor takes.
  static __host__ __device__ void carve(Arena& arena, const Shape& shape) {
    Map::carve(arena, shape);
    ForwardChunk<A>(arena, shape, Map::kHasKeyGauge);
  }

 protected:
  /// psi of the keys of tokens [t, t + n), and their values in the value gauge.
  __device__ void keys_to_features(int64_t t, int n) {
    scaled_ = map_.keys(chunk_, n, decay_, t);
    if constexpr (Map::kHasValueGauge) {
      for (int i = warp(); i < n; i += warps()) {
        for (int j = lane(); j < s_.columns; j += kWarpSize) chunk_.v(i, j) -= map_.value_gauge()[j];
      }
    }
  }

  /// Heads of a group that are held at a time, from head g on.
  __device__ int batch_of(int g) const { return p_.group - g < batch_ ? static_cast<int>(p_.group) - g : batch_; }

  __device__ void queries_to_features(int n, int heads) {
    for (int i = warp(); i < n * heads; i += warps()) {
      const Row<A> row = map_.query(chunk_, i, i / heads);
      if (lane() == 0) chunk_.inverse[i] = row.inverse;
    }
  }

  const AttentionParams& p_;
  Shape s_;
  WorkItem item_;
  Sequence sequence_;
  Map map_;
  ForwardChunk<A> chunk_;
  DecayRates<A> decay_;
  int batch_;
  unsigned scaled_ = 0;  // tokens of the chunk that have factors
};

/// Shared memory of a forward beside its chunk.
template <class A>
struct ForwardTiles {
  Tile<A> s, y;  // (size, columns), (rows, columns)

  __host__ __device__ ForwardTiles(Arena& arena, const Shape& shape)
      : s(arena.tile<A>(shape.size, shape.columns)), y(arena.tile<A>(shape.chunk, shape.columns)) {}
};

template <class Map>
__host__ __device__ size_t forward_bytes(const Shape& shape) {
  Arena arena(nullptr);
  ForwardPass<Map>::carve(arena, shape);
  ForwardTiles<typename Map::Scalar>(arena, shape);
  return arena.bytes();
}

/// Outputs, and states where asked for, of one work item.
template <class Map>
class Forward : ForwardPass<Map> {
  using Base = ForwardPass<Map>;
  using Base::p_, Base::s_, Base::item_, Base::sequence_, Base::map_, Base::chunk_, Base::decay_, Base::batch_,
      Base::scaled_;
  using typename Base::A;

 public:
  __device__ Forward(const AttentionParams& p, const Shape& shape, const WorkItem& item, Arena& arena)
      : Base(p, shape, item, arena), tiles_(arena, shape) {}

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
      chunk_.z = repeated(map_.z());
      chunk_.m = repeated(map_.m());
      chunk_.r = repeated(map_.r());
      for (int64_t t = 0; t < sequence_.query_len; t += s_.tokens) {
        const int64_t rest = sequence_.query_len - t;
        queries(t, rest < s_.tokens ? static_cast<int>(rest) : s_.tokens, false);
      }
    }
    if constexpr (Map::kHasKeyGauge) {
      if (p_.state_out.data && !decay_.any()) finish();
    }
    save(state_row<A>(p_.state_out, item_.index, item_.head));
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

  __device__ void save(A* state) const {
    if (!state) return;
    map_.save(state, item_.column_block == 0);
    save_matrix(map_, matrix(), state, s_, item_.first, item_.count);
  }

  __device__ void keys(int64_t t, int n) {
    chunk_.skip = read_padding(p_, sequence_, t, n);
    load_rows(chunk_.k, p_.dtype,
              RowBlock(p_.k, sequence_.batch, item_.head, sequence_.key_begin + t, 0, n, 1, s_.head_dim), s_.key_size,
              static_cast<A>(p_.scale), Map::key_fill(), chunk_.skip);
    load_rows(chunk_.v, p_.dtype,
              RowBlock(p_.v, sequence_.batch, item_.head, sequence_.key_begin + t, item_.first, n, 1, item_.count),
              s_.columns, A(1), A(0), chunk_.skip);
    __syncthreads();
    this->keys_to_features(t, n);
    __syncthreads();
  }

  /// Outputs of tokens [t, t + n), in batches of the heads of a group; the first also updates S where `update`.
  __device__ void queries(int64_t t, int n, bool update) {
    int g = 0;
    do {  // once even if there are no query heads
      const int heads = this->batch_of(g);
      const int64_t head = item_.head * p_.group + g;
      load_rows(chunk_.q, p_.dtype,
                RowBlock(p_.q, sequence_.batch, head, sequence_.query_begin + t, 0, n, heads, s_.head_dim), s_.key_size,
                static_cast<A>(p_.scale), Map::query_fill());
      __syncthreads();
      this->queries_to_features(n, heads);
      __syncthreads();
      multiply(n, heads, update && g == 0);
      if constexpr (Map::kHasValueGauge) {
        for (int i = warp(); i < n * heads; i += warps()) {
          if (chunk_.inverse[i] == 0) continue;  // sees no key
          for (int j = lane(); j < s_.columns; j += kWarpSize) tiles_.y(i, j) += map_.value_gauge()[j];
        }
        __syncthreads();
      }
      store_rows(p_.dtype,
                 RowBlock(p_.out, sequence_.batch, head, sequence_.query_begin + t, item_.first, n, heads, item_.count),
                 tiles_.y, A(1));
      __syncthreads();
      g += batch_;
    } while (g < p_.group);
  }

  __device__ void multiply(int n, int reads, bool update) {
    Products<A> p;
    p.s = tiles_.s;
    p.rows = s_.rows;
    p.columns = s_.columns;
    p.tokens = n;
    p.updates = update;
    p.coefficients = chunk_.psi;
    p.vectors = chunk_.v;
    p.reads = reads;
    p.weights = chunk_.phi;
    p.results = tiles_.y;
    p.scaling = Scaling::Rows;
    p.scales = chunk_.scales;
    p.scaled = update ? scaled_ : 0;
    products(p);
    __syncthreads();
  }

  ForwardTiles<A> tiles_;
};

}  // namespace elattn::cuda
