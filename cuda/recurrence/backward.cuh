#pragma once

#include "cuda/recurrence/forward.cuh"

/// Gradients of one (sequence, kv head), docs/math.md, sections 2, 3.3, 4 and 9, by three kernels. A forward scan with
/// S transposed gives u = S g, hence delta = g . y and dq. Two reverse scans, which do not wait for each other, give dv
/// from R = sum phi g^T, and dk from its transpose and rho = -sum phi delta. Gauges are constants for differentiation.
///
/// All three can be cut into blocks of value columns: dv belongs to them, while delta, dq, dk, rho and the gradient of
/// decay are sums over them. A single block writes its results; the parts of several are added up by another kernel.
namespace elattn::cuda {

/// What the kernels leave for one another in global memory, rows without gaps.
template <class A>
struct Workspace {
  Row<A>* rows = nullptr;  // (batch, head, query)
  A* delta = nullptr;      // (column block, batch, head, query)
  A* gauges = nullptr;     // (sequence and kv head, slot, gauge_size): of each chunk, of the end, of the initial state
  A* factors = nullptr;    // (sequence, kv head, size): of the final state; only without decay and with a key gauge
  A* received = nullptr;   // (column block, sequence, kv head, size): S R + z rho at the end; only with decay
  A* dq_total = nullptr;   // (column block, batch, kv head, query, key_size): over the group; with rates per channel
  // Parts, (column block, ...); null where there is one block.
  A* dq = nullptr;     // (batch, head, query, head_dim)
  A* dk = nullptr;     // (batch, kv head, key, head_dim)
  A* decay = nullptr;  // as grad_decay
  A* z = nullptr;      // (sequence, kv head, rows)
  int64_t query_rows = 0, key_rows = 0, decay_size = 0, gauge_slots = 0;
};

/// Slots of one kv head where sequences are packed: `slots` for each, and one for every chunk's worth of tokens.
__host__ __device__ inline int64_t packed_gauge_slots(const AttentionParams& p, const Shape& s, int64_t slots) {
  return p.key_len / s.tokens + p.sequences * slots;
}

template <class A>
struct BackwardTiles {
  Chunk<A> chunk;
  Tile<A> s;              // S or R: (size, columns), or transposed
  Tile<A> g;              // (rows, columns): gradients of the outputs
  Tile<A> results;        // (rows, size) or (tokens, columns)
  A *rho, *suffix, *sum;  // (size)
  A* carried;             // (size): factors of the first token of the chunk to the right
  Row<A>* rows;           // (rows)
  A* delta;               // (rows)
  double* along;          // (tokens)
};

enum class Pass { Queries, Values, Keys };

template <class A>
__host__ __device__ BackwardTiles<A> backward_tiles(Arena& arena, const Shape& s, bool key_gauge, Pass pass) {
  BackwardTiles<A> t{};
  Chunk<A>& c = t.chunk;
  c.q = arena.tile<A>(s.chunk, s.size);
  c.phi = pass == Pass::Queries ? arena.tile<A>(s.chunk, s.size) : c.q;
  c.psi = arena.tile<A>(s.tokens, s.size);
  c.k = pass == Pass::Keys ? arena.tile<A>(s.tokens, s.size) : c.psi;
  if (pass != Pass::Values) c.v = arena.tile<A>(s.tokens, s.columns);
  c.scales = arena.tile<A>(s.tokens + 1, s.size);
  if (pass == Pass::Queries) c.z = arena.tile<A>(s.tokens, s.size);
  if (key_gauge) {
    c.m = arena.tile<A>(s.tokens, s.size);
    c.r = arena.tile<A>(s.tokens, s.size);
  }
  t.s = pass == Pass::Values ? arena.tile<A>(s.size, s.columns) : arena.tile<A>(s.columns, s.size);
  t.g = arena.tile<A>(s.chunk, s.columns);
  t.results = pass == Pass::Queries  ? arena.tile<A>(s.chunk, s.size)
              : pass == Pass::Values ? arena.tile<A>(s.tokens, s.columns)
                                     : arena.tile<A>(s.tokens, s.size);
  if (pass == Pass::Keys) {
    t.rho = arena.take<A>(s.size);
    t.suffix = arena.take<A>(s.size);
    t.sum = arena.take<A>(s.size);
    t.along = arena.take<double>(s.tokens);
  }
  t.carried = arena.take<A>(s.size);
  t.rows = arena.take<Row<A>>(s.chunk);
  t.delta = arena.take<A>(s.chunk);
  c.words = arena.take<unsigned>(kWarpSize);
  return t;
}

template <class Map>
size_t backward_bytes(const Shape& shape, Pass pass) {
  using A = typename Map::Scalar;
  Arena arena(nullptr);
  Map::carve(arena, shape);
  backward_tiles<A>(arena, shape, Map::kHasKeyGauge, pass);
  return arena.bytes();
}

/// What the three passes have in common.
template <class Map>
class BackwardPass {
 public:
  using A = typename Map::Scalar;

  __device__ BackwardPass(const AttentionBackwardParams& p, const Shape& shape, const Workspace<A>& workspace,
                          Arena& arena, Pass pass)
      : p_(p),
        s_(shape),
        w_(workspace),
        item_(p, shape, blockIdx.x),
        sequence_(sequence(p, item_.index)),
        segments_(sequence_.key_len, shape.tokens, Map::kHasValueGauge),
        map_(arena, shape, p),
        t_(backward_tiles<A>(arena, shape, Map::kHasKeyGauge, pass)),
        decay_(p.decay, sequence_, item_.head),
        batch_(static_cast<int>(p.group < shape.chunk ? p.group : shape.chunk)) {}

 protected:
  __device__ bool first_block() const { return item_.column_block == 0; }
  __device__ int batch_of(int g) const { return p_.group - g < batch_ ? static_cast<int>(p_.group) - g : batch_; }
  __device__ Matrix<A> matrix(bool transposed) const { return {t_.s, transposed}; }

  /// Of query row (token t, head g of the group) in the arrays of the workspace.
  __device__ int64_t query_row(int64_t t, int64_t g) const {
    return (sequence_.batch * p_.kv_heads * p_.group + item_.head * p_.group + g) * p_.query_len +
           sequence_.query_begin + t;
  }
  __device__ int64_t key_row(int64_t t) const {
    return (sequence_.batch * p_.kv_heads + item_.head) * p_.key_len + sequence_.key_begin + t;
  }
  __device__ int64_t head_row() const { return item_.index * p_.kv_heads + item_.head; }

  /// The gauge of chunk i; after the last, those of the end and of the initial state.
  __device__ A* gauge(int64_t i) const {
    int64_t slot = head_row() * w_.gauge_slots;
    if (p_.cu_seqlens) {
      slot = item_.head * packed_gauge_slots(p_, s_, w_.gauge_slots) + sequence_.key_begin / s_.tokens +
             item_.index * w_.gauge_slots;
    }
    return w_.gauges + (slot + i) * Map::gauge_size(s_);
  }

  __device__ void load_keys(int64_t t, int n) {
    Chunk<A>& c = t_.chunk;
    c.skip = read_padding(p_, sequence_, t, n);
    load_rows(c.k, p_.dtype, RowBlock(p_.k, sequence_.batch, item_.head, sequence_.key_begin + t, 0, n, 1, s_.head_dim),
              s_.key_size, static_cast<A>(p_.scale), Map::key_fill(), c.skip);
  }

  __device__ void load_values(int64_t t, int n) {
    load_rows(t_.chunk.v, p_.dtype,
              RowBlock(p_.v, sequence_.batch, item_.head, sequence_.key_begin + t, item_.first, n, 1, item_.count),
              s_.columns, A(1), A(0), t_.chunk.skip);
  }

  __device__ void centre_values(int n) {
    if constexpr (Map::kHasValueGauge) {
      for (int i = warp(); i < n; i += warps()) {
        for (int j = lane(); j < s_.columns; j += kWarpSize) t_.chunk.v(i, j) -= map_.value_gauge()[j];
      }
      __syncthreads();
    }
  }

  /// q and the gradients of the outputs of heads [g, g + heads).
  __device__ void load_queries(int64_t t, int n, int g, int heads) {
    const int64_t head = item_.head * p_.group + g, token = sequence_.query_begin + t;
    load_rows(t_.chunk.q, p_.dtype, RowBlock(p_.q, sequence_.batch, head, token, 0, n, heads, s_.head_dim), s_.key_size,
              static_cast<A>(p_.scale), Map::query_fill());
    load_rows(t_.g, p_.dtype, RowBlock(p_.grad_out, sequence_.batch, head, token, item_.first, n, heads, item_.count),
              s_.columns, A(1), A(0));
  }

  /// phi of the same again, and in the pass of keys, whose column blocks are those of the pass of queries, delta.
  __device__ void queries_again(int64_t t, int n, int g, int heads) {
    load_queries(t, n, g, heads);
    for (int i = thread(); i < n * heads; i += threads()) {
      const int64_t row = query_row(t + i / heads, g + i % heads);
      t_.rows[i] = w_.rows[row];
      if (t_.rho) t_.delta[i] = w_.delta[item_.column_block * w_.query_rows + row];
    }
    __syncthreads();
    for (int i = warp(); i < n * heads; i += warps()) map_.query_again(t_.chunk, i, i / heads, t_.rows[i]);
    __syncthreads();
  }

  /// psi of tokens [t, t + n) in the gauge of chunk i, and the factors of S after each of them: those of the chunk to
  /// the right come first.
  __device__ void keys_again(int64_t t, int n) {
    Chunk<A>& c = t_.chunk;
    const bool carry = scaled_ & 1;
    for (int d = thread(); d < s_.size; d += threads()) t_.carried[d] = carry ? c.scales(0, d) : A(1);
    load_keys(t, n);
    __syncthreads();
    scaled_ = map_.keys_again(c, n, decay_, t);
    for (int d = thread(); d < s_.size; d += threads()) c.scales(n, d) = t_.carried[d];
    after_ = scaled_ >> 1 | static_cast<unsigned>(carry) << (n - 1);
    __syncthreads();
  }

  __device__ Tile<A> scales_after() const {
    const Tile<A>& scales = t_.chunk.scales;
    return {scales.at(1, 0), scales.ld, s_.tokens, s_.size};
  }

  /// The gradient of the final state, which R holds, from the gauge that it was handed out in to that of the passes.
  __device__ void begin_gradient(const Matrix<A>& r, A* rho) {
    if (!w_.factors || !p_.grad_state_out.data) return;
    __syncthreads();
    for (int d = warp(); d < s_.rows; d += warps()) {
      const A factor = w_.factors[head_row() * s_.size + d];
      for (int j = lane(); j < s_.columns; j += kWarpSize) r(d, j) *= factor;
      if (rho && lane() == 0) rho[d] *= factor;
    }
  }

  __device__ void final_gauge_of_queries() {
    t_.chunk.z = repeated(map_.z());
    t_.chunk.m = repeated(map_.m());
    t_.chunk.r = repeated(map_.r());
  }

  const AttentionBackwardParams& p_;
  Shape s_;
  const Workspace<A>& w_;
  WorkItem item_;
  Sequence sequence_;
  Segments segments_;
  Map map_;
  BackwardTiles<A> t_;
  DecayRates<A> decay_;
  int batch_;            // heads of a group at a time
  unsigned scaled_ = 0;  // tokens of the chunk that have factors
  unsigned after_ = 0;   // tokens after which S has factors
};

/// The forward scan: dq, and what the reverse scans need.
template <class Map>
class QueryPass : public BackwardPass<Map> {
  using Base = BackwardPass<Map>;
  using Base::p_, Base::s_, Base::w_, Base::item_, Base::sequence_, Base::segments_, Base::map_, Base::t_, Base::decay_,
      Base::batch_, Base::scaled_;
  using typename Base::A;

 public:
  __device__ QueryPass(const AttentionBackwardParams& p, const Shape& shape, const Workspace<A>& workspace,
                       Arena& arena)
      : Base(p, shape, workspace, arena, Pass::Queries) {}

  __device__ void run() {
    const A* state = state_row<A>(p_.state_in, item_.index, item_.head);
    map_.load(state, item_.first, item_.count);
    load_matrix(map_, state, this->matrix(true), s_, item_.first, item_.count);
    __syncthreads();
    const int64_t chunks = segments_.count();
    map_.save_gauge(this->gauge(chunks + 1), this->first_block());
    for (int64_t i = 0; i < chunks; ++i) {
      keys(i);
      if (p_.is_causal) {
        queries(segments_.begin(i), segments_.size(i), true);
      } else {
        multiply(segments_.size(i), 0, true);
      }
      if constexpr (Map::kHasValueGauge) {
        if (map_.must_move()) map_.move(this->matrix(true));
      }
    }
    map_.save_gauge(this->gauge(chunks), this->first_block());
    if (!p_.is_causal) {
      this->final_gauge_of_queries();
      for (int64_t t = 0; t < sequence_.query_len; t += s_.tokens) {
        const int64_t rest = sequence_.query_len - t;
        queries(t, rest < s_.tokens ? static_cast<int>(rest) : s_.tokens, false);
      }
    }
    if constexpr (Map::kHasKeyGauge) {
      for (int d = thread(); w_.factors && this->first_block() && d < s_.size; d += threads()) {
        w_.factors[this->head_row() * s_.size + d] = map_.final_factor(d);
      }
    }
    if (w_.received) receive();
  }

 private:
  __device__ void keys(int64_t i) {
    const int64_t t = segments_.begin(i);
    const int n = segments_.size(i);
    if constexpr (!Map::kHasValueGauge) map_.save_gauge(this->gauge(i), this->first_block());
    this->load_keys(t, n);
    this->load_values(t, n);
    __syncthreads();
    scaled_ = map_.keys(t_.chunk, n, decay_, t);
    if constexpr (Map::kHasValueGauge) map_.save_gauge(this->gauge(i), this->first_block());
    this->centre_values(n);
    __syncthreads();
  }

  __device__ void queries(int64_t t, int n, bool update) {
    const Chunk<A>& c = t_.chunk;
    for (int g = 0; g < p_.group; g += batch_) {
      const int heads = this->batch_of(g);
      this->load_queries(t, n, g, heads);
      __syncthreads();
      for (int i = warp(); i < n * heads; i += warps()) {
        const Row<A> row = map_.query(c, i, i / heads);
        if (lane() != 0) continue;
        t_.rows[i] = row;
        if (this->first_block()) w_.rows[this->query_row(t + i / heads, g + i % heads)] = row;
      }
      __syncthreads();
      multiply(n, heads, update && g == 0);
      for (int i = warp(); i < n * heads; i += warps()) {
        const A delta = warp_dot(c.phi.at(i, 0), t_.results.at(i, 0), s_.size);
        map_.query_gradient(c, i, i / heads, delta, t_.rows[i], t_.results.at(i, 0));
        if (lane() == 0) {
          w_.delta[item_.column_block * w_.query_rows + this->query_row(t + i / heads, g + i % heads)] = delta;
        }
      }
      __syncthreads();
      write(t, n, g, heads);
      __syncthreads();
    }
  }

  __device__ void write(int64_t t, int n, int g, int heads) {
    const auto scale = static_cast<A>(p_.scale);
    if (w_.dq) {
      for (int i = warp(); i < n * heads; i += warps()) {
        const int64_t row = item_.column_block * w_.query_rows + this->query_row(t + i / heads, g + i % heads);
        for (int d = lane(); d < s_.head_dim; d += kWarpSize) w_.dq[row * s_.head_dim + d] = t_.results(i, d) * scale;
      }
    } else {
      store_rows(p_.dtype,
                 RowBlock(p_.grad_q, sequence_.batch, item_.head * p_.group + g, sequence_.query_begin + t, 0, n, heads,
                          s_.head_dim),
                 t_.results, scale);
    }
    if (!w_.dq_total) return;
    for (int i = warp(); i < n; i += warps()) {
      A* total = w_.dq_total + (item_.column_block * w_.key_rows + this->key_row(t + i)) * s_.key_size;
      for (int d = lane(); d < s_.head_dim; d += kWarpSize) {
        A sum = g == 0 ? A(0) : total[d];
        for (int h = 0; h < heads; ++h) sum += t_.results(i * heads + h, d);
        total[d] = sum;
      }
    }
  }

  __device__ void multiply(int n, int reads, bool update) {
    const Chunk<A>& c = t_.chunk;
    Products<A> p;
    p.s = t_.s;
    p.rows = item_.count;
    p.columns = s_.size;
    p.tokens = n;
    p.updates = update;
    p.coefficients = c.v;
    p.vectors = c.psi;
    p.reads = reads;
    p.weights = t_.g;
    p.results = t_.results;
    p.scaling = Scaling::Columns;
    p.scales = c.scales;
    p.scaled = update ? scaled_ : 0;
    products(p);
    __syncthreads();
  }

  /// The final state times its gradient, by features.
  __device__ void receive() {
    const A* gradient = state_row<A>(p_.grad_state_out, item_.index, item_.head);
    A* to = w_.received + (item_.column_block * p_.sequences * p_.kv_heads + this->head_row()) * s_.size;
    __syncthreads();
    for (int d = warp(); d < s_.size; d += warps()) {
      A sum = 0;
      if (gradient && d < s_.rows) {
        const A* row = gradient + s_.matrix + static_cast<int64_t>(map_.row_in_state(d)) * s_.value_dim + item_.first;
        for (int j = lane(); j < item_.count; j += kWarpSize) sum += t_.s(j, d) * row[j];
        sum = warp_sum(sum);
        if (this->first_block()) sum += map_.z()[d] * gradient[Map::normaliser_in_state(s_, d)];
      }
      if (lane() == 0) to[d] = sum;
    }
  }
};

/// A reverse scan: dv, and the gradient of S.
template <class Map>
class ValuePass : public BackwardPass<Map> {
  using Base = BackwardPass<Map>;
  using Base::p_, Base::s_, Base::w_, Base::item_, Base::sequence_, Base::segments_, Base::map_, Base::t_, Base::batch_,
      Base::scaled_, Base::after_;
  using typename Base::A;

 public:
  __device__ ValuePass(const AttentionBackwardParams& p, const Shape& shape, const Workspace<A>& workspace,
                       Arena& arena)
      : Base(p, shape, workspace, arena, Pass::Values) {}

  __device__ void run() {
    const int64_t chunks = segments_.count();
    map_.load(nullptr, item_.first, item_.count);
    load_matrix(map_, state_row<A>(p_.grad_state_out, item_.index, item_.head), this->matrix(false), s_, item_.first,
                item_.count);
    this->begin_gradient(this->matrix(false), nullptr);
    __syncthreads();
    map_.load_gauge(this->gauge(chunks));
    __syncthreads();
    if (!p_.is_causal) collect_queries();
    for (int64_t i = chunks; i-- > 0;) {
      const int64_t t = segments_.begin(i);
      const int n = segments_.size(i);
      if (p_.is_causal) {
        if constexpr (Map::kHasValueGauge) map_.move_back(this->gauge(i), this->matrix(false), nullptr);
        map_.load_gauge(this->gauge(i));
        __syncthreads();
        this->keys_again(t, n);
        for (int g = 0; g < p_.group; g += batch_) {
          const int heads = this->batch_of(g);
          this->queries_again(t, n, g, heads);
          multiply(n, heads, g + heads == p_.group, g == 0);
        }
      } else {
        this->keys_again(t, n);
        multiply(n, 0, true, false);
      }
      store_rows(
          p_.dtype,
          RowBlock(p_.grad_v, sequence_.batch, item_.head, sequence_.key_begin + t, item_.first, n, 1, item_.count),
          t_.results, A(1));
      __syncthreads();
    }
    write_state(chunks);
  }

 private:
  __device__ void collect_queries() {
    this->final_gauge_of_queries();
    for (int64_t t = 0; t < sequence_.query_len; t += s_.tokens) {
      const int64_t rest = sequence_.query_len - t;
      const int n = rest < s_.tokens ? static_cast<int>(rest) : s_.tokens;
      for (int g = 0; g < p_.group; g += batch_) {
        const int heads = this->batch_of(g);
        this->queries_again(t, n, g, heads);
        multiply(n, heads, false, false);
      }
    }
  }

  __device__ void multiply(int n, int updates, bool read, bool scale) {
    const Chunk<A>& c = t_.chunk;
    Products<A> p;
    p.s = t_.s;
    p.rows = s_.rows;
    p.columns = s_.columns;
    p.tokens = n;
    p.reverse = true;
    p.updates = updates;
    p.coefficients = c.phi;
    p.vectors = t_.g;
    p.reads = read;
    p.weights = c.psi;
    p.results = t_.results;
    p.scaling = Scaling::Rows;
    p.scales = this->scales_after();
    p.scaled = scale ? after_ : 0;
    products(p);
    __syncthreads();
  }

  __device__ void write_state(int64_t chunks) {
    A* to = state_row<A>(p_.grad_state_in, item_.index, item_.head);
    if (!to) return;
    const Matrix<A> r = this->matrix(false);
    if (p_.is_causal && (scaled_ & 1)) {
      for (int d = warp(); d < s_.rows; d += warps()) {
        for (int j = lane(); j < s_.columns; j += kWarpSize) r(d, j) *= t_.chunk.scales(0, d);
      }
      __syncthreads();
    }
    if (!p_.is_causal || Map::kHasValueGauge) map_.move_back(this->gauge(chunks + 1), r, nullptr);
    save_matrix(map_, r, to, s_, item_.first, item_.count);
    map_.clear_gauge(to, this->first_block());
  }
};

/// A reverse scan with the transposed matrix: dk, and the gradients of decay and of z.
template <class Map>
class KeyPass : public BackwardPass<Map> {
  using Base = BackwardPass<Map>;
  using Base::p_, Base::s_, Base::w_, Base::item_, Base::sequence_, Base::segments_, Base::map_, Base::t_, Base::batch_,
      Base::scaled_, Base::after_;
  using typename Base::A;

 public:
  __device__ KeyPass(const AttentionBackwardParams& p, const Shape& shape, const Workspace<A>& workspace, Arena& arena)
      : Base(p, shape, workspace, arena, Pass::Keys) {}

  __device__ void run() {
    const int64_t chunks = segments_.count();
    const A* state = state_row<A>(p_.grad_state_out, item_.index, item_.head);
    map_.load(nullptr, item_.first, item_.count);
    load_matrix(map_, state, this->matrix(true), s_, item_.first, item_.count);
    for (int d = thread(); d < s_.size; d += threads()) {
      t_.rho[d] = state && this->first_block() && d < s_.rows ? state[Map::normaliser_in_state(s_, d)] : A(0);
    }
    this->begin_gradient(this->matrix(true), t_.rho);
    begin_decay();
    __syncthreads();
    map_.load_gauge(this->gauge(chunks));
    __syncthreads();
    if (!p_.is_causal) collect_queries();
    for (int64_t i = chunks; i-- > 0;) {
      const int64_t t = segments_.begin(i);
      const int n = segments_.size(i);
      if (p_.is_causal) {
        if constexpr (Map::kHasValueGauge) map_.move_back(this->gauge(i), this->matrix(true), t_.rho);
        map_.load_gauge(this->gauge(i));
        __syncthreads();
      }
      this->keys_again(t, n);
      this->load_values(t, n);
      __syncthreads();
      this->centre_values(n);
      if (p_.is_causal) {
        for (int g = 0; g < p_.group; g += batch_) {
          const int heads = this->batch_of(g);
          this->queries_again(t, n, g, heads);
          multiply(n, heads, g + heads == p_.group, g == 0);
          follow_rho(n, heads, g == 0, g + heads == p_.group);
        }
      } else {
        multiply(n, 0, true, false);
        follow_rho(n, 0, false, true);
      }
      key_gradients(t, n);
    }
    end_decay();
    write_state(chunks);
  }

 private:
  __device__ void collect_queries() {
    this->final_gauge_of_queries();
    for (int64_t t = 0; t < sequence_.query_len; t += s_.tokens) {
      const int64_t rest = sequence_.query_len - t;
      const int n = rest < s_.tokens ? static_cast<int>(rest) : s_.tokens;
      for (int g = 0; g < p_.group; g += batch_) {
        const int heads = this->batch_of(g);
        this->queries_again(t, n, g, heads);
        multiply(n, heads, false, false);
        for (int d = thread(); d < s_.size; d += threads()) {
          for (int i = 0; i < n * heads; ++i) t_.rho[d] -= t_.delta[i] * t_.chunk.phi(i, d);
        }
        __syncthreads();
      }
    }
  }

  /// rho through a chunk from right to left, and dpsi = R v + rho in place of R v.
  __device__ void follow_rho(int n, int heads, bool scale, bool add) {
    const Chunk<A>& c = t_.chunk;
    for (int d = thread(); d < s_.size; d += threads()) {
      A rho = t_.rho[d];
      for (int t = n - 1; t >= 0; --t) {
        if (scale && (after_ >> t & 1)) rho *= c.scales(t + 1, d);
        for (int g = 0; g < heads; ++g) rho -= t_.delta[t * heads + g] * c.phi(t * heads + g, d);
        if (add) t_.results(t, d) += rho;
      }
      t_.rho[d] = rho;
    }
    __syncthreads();
  }

  __device__ void multiply(int n, int updates, bool read, bool scale) {
    const Chunk<A>& c = t_.chunk;
    Products<A> p;
    p.s = t_.s;
    p.rows = item_.count;
    p.columns = s_.size;
    p.tokens = n;
    p.reverse = true;
    p.updates = updates;
    p.coefficients = t_.g;
    p.vectors = c.phi;
    p.reads = read;
    p.weights = c.v;
    p.results = t_.results;
    p.scaling = Scaling::Columns;
    p.scales = this->scales_after();
    p.scaled = scale ? after_ : 0;
    products(p);
    __syncthreads();
  }

  __device__ void key_gradients(int64_t t, int n) {
    const Chunk<A>& c = t_.chunk;
    const auto scale = static_cast<A>(p_.scale);
    for (int i = warp(); i < n; i += warps()) {
      A* dk = t_.results.at(i, 0);
      const bool padding = c.is_padding(i);
      if (p_.grad_decay_data) {
        const A along = warp_dot(c.psi.at(i, 0), dk, s_.size);
        if (lane() == 0) t_.along[i] = padding ? 0.0 : static_cast<double>(along);
      }
      if (padding) {
        for (int d = lane(); d < s_.size; d += kWarpSize) dk[d] = 0;
      } else {
        map_.key_gradient(c, i, dk);
      }
    }
    __syncthreads();
    if (p_.grad_decay_data) decay_gradients(t, n);
    if (w_.dk) {
      for (int i = warp(); i < n; i += warps()) {
        A* to = w_.dk + (item_.column_block * w_.key_rows + this->key_row(t + i)) * s_.head_dim;
        for (int d = lane(); d < s_.head_dim; d += kWarpSize) to[d] = t_.results(i, d) * scale;
      }
    } else {
      store_rows(p_.dtype,
                 RowBlock(p_.grad_k, sequence_.batch, item_.head, sequence_.key_begin + t, 0, n, 1, s_.head_dim),
                 t_.results, scale);
    }
    __syncthreads();
  }

  // The gradient of a rate is the sum over later tokens of dk - dq, less what the final state received (docs/math.md,
  // section 9).

  __device__ bool channel_decay() const { return p_.grad_decay.channel != 0; }

  __device__ void begin_decay() {
    if (!p_.grad_decay_data) return;
    const A* received = w_.received + (item_.column_block * p_.sequences * p_.kv_heads + this->head_row()) * s_.size;
    for (int d = thread(); d < s_.size; d += threads()) {
      t_.suffix[d] = -received[d];
      t_.sum[d] = 0;
    }
    for (int d = 0; d < s_.rows; ++d) total_suffix_ -= static_cast<double>(received[d]);
  }

  __device__ A* decay_entry(int64_t t) const {
    const Decay& to = p_.grad_decay;
    // Packed tokens tell the sequences apart by themselves; otherwise every sequence has its own part.
    const int64_t first = to.batch == 0 ? sequence_.key_begin : 0;
    const int64_t row = to.row == 0 ? 0 : first + t;
    A* base = w_.decay ? w_.decay + item_.column_block * w_.decay_size : static_cast<A*>(p_.grad_decay_data);
    return base + item_.index * to.batch + item_.head * to.head + row * to.row;
  }

  __device__ void decay_gradients(int64_t t, int n) {
    const Chunk<A>& c = t_.chunk;
    const bool per_token = p_.grad_decay.row != 0;
    if (!channel_decay()) {
      if (thread() != 0) return;
      for (int i = n - 1; i >= 0; --i) {
        total_suffix_ += t_.along[i];
        const A gradient = c.is_padding(i) ? A(0) : static_cast<A>(total_suffix_);
        total_sum_ += static_cast<double>(gradient);
        if (per_token) *decay_entry(t + i) = gradient;
      }
      return;
    }
    const A* total = w_.dq_total + (item_.column_block * w_.key_rows + this->key_row(t)) * s_.key_size;
    for (int d = thread(); d < s_.head_dim; d += threads()) {
      A suffix = t_.suffix[d];
      for (int i = n - 1; i >= 0; --i) {
        suffix += t_.results(i, d) - total[i * s_.key_size + d];
        const A gradient = c.is_padding(i) ? A(0) : suffix;
        t_.sum[d] += gradient;
        if (per_token) decay_entry(t + i)[d] = gradient;
      }
      t_.suffix[d] = suffix;
    }
  }

  __device__ void end_decay() {
    if (!p_.grad_decay_data || p_.grad_decay.row != 0) return;
    if (!channel_decay()) {
      if (thread() == 0) *decay_entry(0) = static_cast<A>(total_sum_);
      return;
    }
    for (int d = thread(); d < s_.head_dim; d += threads()) decay_entry(0)[d] = t_.sum[d];
  }

  __device__ void write_state(int64_t chunks) {
    A* to = state_row<A>(p_.grad_state_in, item_.index, item_.head);
    if (!to) return;
    const Matrix<A> r = this->matrix(true);
    if (p_.is_causal && (scaled_ & 1)) {
      for (int d = warp(); d < s_.rows; d += warps()) {
        for (int j = lane(); j < s_.columns; j += kWarpSize) r(d, j) *= t_.chunk.scales(0, d);
        if (lane() == 0) t_.rho[d] *= t_.chunk.scales(0, d);
      }
      __syncthreads();
    }
    if (!p_.is_causal || Map::kHasValueGauge) map_.move_back(this->gauge(chunks + 1), r, t_.rho);
    __syncthreads();
    A* parts = w_.z ? w_.z + (item_.column_block * p_.sequences * p_.kv_heads + this->head_row()) * s_.rows : nullptr;
    for (int d = thread(); d < s_.rows; d += threads()) {
      (parts ? parts[d] : to[Map::normaliser_in_state(s_, d)]) = t_.rho[d];
    }
  }

  double total_suffix_ = 0, total_sum_ = 0;  // rates per head or token, of thread 0
};

}  // namespace elattn::cuda
