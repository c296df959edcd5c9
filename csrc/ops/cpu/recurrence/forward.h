#pragma once

#include "ops/cpu/recurrence/chunks.h"
#include "ops/cpu/recurrence/map.h"

namespace elattn::cpu {
inline namespace CPU_CAPABILITY {

/// The features of up to a chunk of tokens.
template <typename A>
struct FeatureRows {
  A* phi = nullptr;        // (tokens, group, size)
  A* psi = nullptr;        // (tokens, size)
  A* scales = nullptr;     // (tokens, size)
  bool* scaled = nullptr;  // (tokens)

  FeatureRows() = default;
  FeatureRows(int64_t tokens, int64_t group, int64_t size, Buffers<A>& buffers)
      : phi(buffers.take(tokens * group * size)),
        psi(buffers.take(tokens * size)),
        scales(buffers.take(tokens * size)),
        scaled(reinterpret_cast<bool*>(buffers.take(tokens))) {}

  /// From token t on.
  FeatureRows from(int64_t t, int64_t group, int64_t size) const {
    FeatureRows rows;
    rows.phi = phi + t * group * size;
    rows.psi = psi + t * size;
    rows.scales = scales + t * size;
    rows.scaled = scaled + t;
    return rows;
  }
};

/// Keys and queries of one (sequence, kv head) turned into features chunk by chunk. Forward and backward walk the
/// tokens with it.
template <typename Map>
class FeatureChunks {
 public:
  using A = typename Map::Scalar;

  FeatureChunks(const AttentionParams& p, Map& map, const Format<A>& format, Buffers<A>& buffers)
      : p_(p),
        map_(map),
        size_(map.padded_rows()),
        queries_(format, p.q, p.group, 0, p.head_dim, padded<A>(p.head_dim), A(p.scale), map.query_fill(),
                 chunk_size(p), buffers),
        keys_(format, p.k, 1, 0, p.head_dim, padded<A>(p.head_dim), A(p.scale), map.key_fill(), chunk_size(p), buffers),
        decay_(p.decay, map.decay_channels(), buffers),
        padding_(p),
        unused_(buffers.take(2 * size_)) {}

  /// Where features go from now on, and come from.
  void use(const FeatureRows<A>& rows) { rows_ = rows; }

  void open(const Sequence& s, int64_t head) {
    sequence_ = s;
    queries_.open(s.batch, head * p_.group, s.query_begin);
    keys_.open(s.batch, head, s.key_begin);
    decay_.open(s.batch, head, s.key_begin);
  }

  const bool* read_padding(int64_t t, int64_t n) { return skip_ = padding_.read(sequence_, t, n); }
  void read_keys(int64_t t, int64_t n) { k_ = keys_.read(t, n, skip_); }
  void read_queries(int64_t t, int64_t n) { q_ = queries_.read(t, n); }

  /// Tokens [t, t + n) will be read soon.
  void announce_keys(int64_t t, int64_t n, Stream& stream) const { keys_.announce(t, n, stream); }
  void announce_queries(int64_t t, int64_t n, Stream& stream) const { queries_.announce(t, n, stream); }

  /// Token i of the chunk, which is token t of the sequence. kAgain: in the reverse pass, without the normaliser.
  template <bool kAgain>
  void key(int64_t i, int64_t t, const A* v) {
    A *psi = rows_.psi + i * size_, *scale = rows_.scales + i * size_;
    if (skip_ && skip_[i]) {
      fill(psi, size_, A(0));
      rows_.scaled[i] = false;
    } else if constexpr (kAgain) {
      rows_.scaled[i] = map_.key_again(k_.at(i), decay_.row(t), psi, scale);
    } else {
      rows_.scaled[i] = map_.key(k_.at(i), v, decay_.row(t), psi, scale);
    }
  }

  /// psi of tokens [t, t + n) or fewer: up to the one after which the gauge moves. Calls then(i) after token i of the
  /// chunk and returns how many there were.
  template <typename F>
  int64_t keys(int64_t t, int64_t n, const Operand<const A>& v, F&& then) {
    read_keys(t, n);
    moves_ = false;
    for (int64_t i = 0; i < n; ++i) {
      key<false>(i, t + i, v.data ? v.at(i) : nullptr);
      then(i);
      if constexpr (Map::kHasValueGauge) {
        if ((moves_ = map_.must_move())) return i + 1;
      }
    }
    return n;
  }

  /// Takes the keys of tokens [t, t + n), whose features another member of the team computes, into the gauge and the
  /// normaliser.
  void pass_keys(int64_t t, int64_t n) {
    read_padding(t, n);
    read_keys(t, n);
    for (int64_t i = 0; i < n; ++i) {
      if (!is_padding(i)) map_.key(k_.at(i), nullptr, decay_.row(t + i), unused_, unused_ + size_);
    }
  }

  /// Whether the gauge moves after the tokens of `keys`.
  bool moves() const { return moves_; }

  Row<A> query(int64_t i, int64_t g) { return map_.query(q_.at(i, g), rows_.phi + (i * p_.group + g) * size_); }
  void query_again(int64_t i, int64_t g, const Row<A>& row) {
    map_.query_again(q_.at(i, g), row, rows_.phi + (i * p_.group + g) * size_);
  }

  /// Factors of one for the tokens of a chunk that are not scaled, if others are.
  void complete_scales(int64_t n) {
    if (std::none_of(rows_.scaled, rows_.scaled + n, [](bool x) { return x; })) return;
    for (int64_t i = 0; i < n; ++i) {
      if (!rows_.scaled[i]) fill(rows_.scales + i * size_, size_, A(1));
    }
  }

  bool is_padding(int64_t i) const { return skip_ && skip_[i]; }
  const A* q(int64_t i, int64_t g) const { return q_.at(i, g); }
  const A* k(int64_t i) const { return k_.at(i); }
  Operand<const A> phi() const { return {rows_.phi, p_.group * size_, size_}; }
  Operand<const A> psi() const { return {rows_.psi, size_, size_}; }
  Operand<A> scales() const { return {rows_.scales, size_, size_}; }
  bool* scaled() { return rows_.scaled; }

 private:
  const AttentionParams& p_;
  Map& map_;
  int64_t size_;
  Reader<A> queries_, keys_;
  DecayReader<A> decay_;
  Padding padding_;
  Sequence sequence_{};
  const bool* skip_ = nullptr;
  bool moves_ = false;
  Operand<const A> q_, k_;
  A* unused_;  // psi and scale of one token
  FeatureRows<A> rows_;
};

/// v' = v - e for the tokens that are read.
template <typename Map, typename A = typename Map::Scalar>
void centre_values(const Map& map, const Operand<A>& v, int64_t n, int64_t columns) {
  for (int64_t i = 0; i < n; ++i) add_multiple(v.at(i), A(-1), map.value_gauge(), columns);
}

/// Outputs, and states where asked for, of one work item: value columns [first, first + count) of one (sequence, kv
/// head).
template <typename Map>
class Forward {
 public:
  using A = typename Map::Scalar;

  Forward(const AttentionParams& p, const Format<A>& format, int64_t first, int64_t count)
      : p_(p),
        first_(first),
        count_(count),
        columns_(padded<A>(count)),
        map_(p, buffers_, first, columns_),
        features_(p, map_, format, buffers_),
        rows_(chunk_size(p), p.group, map_.padded_rows(), buffers_),
        values_(format, p.v, 1, first, count, columns_, A(1), A(0), chunk_size(p), buffers_),
        outputs_(format, p.out, p.group, first, count, columns_, A(1), chunk_size(p), buffers_) {}

  void run(int64_t index, int64_t head) {
    const Sequence s = open(index, head);
    p_.is_causal ? causal(s) : bidirectional(s);
    close(index, head);
  }

  /// The parts of `run`, for a team.
  Sequence open(int64_t index, int64_t head) {
    const Sequence s = sequence(p_, index);
    begin(s, head, state_row<A>(p_.state_in, index, head), own_matrix(), columns_);
    return s;
  }

  void close(int64_t index, int64_t head) {
    if (A* state = state_row<A>(p_.state_out, index, head)) {
      save_matrix(map_, Matrix<A>{s_, s_stride_, 1}, p_.value_dim, first_, count_, state);
      map_.save_columns(state);
      if (first_ == 0) map_.save(state);
    }
  }

  /// Features of tokens [t, t + n) to `rows`; where they are not `owned`, the keys only pass.
  void featurise(int64_t t, int64_t n, bool owned, const FeatureRows<A>& rows) {
    if (!owned) return features_.pass_keys(t, n);
    features_.use(rows);
    features_.read_padding(t, n);
    features<true>(t, n, {});
    features_.complete_scales(n);
  }

  /// Outputs of tokens [t, t + n) from the features in `rows`.
  void multiply(int64_t t, int64_t n, const FeatureRows<A>& rows) {
    features_.use(rows);
    const Operand<const A> v = read_values(t, n, features_.read_padding(t, n));
    multiply<true>(t, n, v);
  }

  int64_t feature_size() const { return map_.padded_rows(); }

  /// One token; the state is changed in place.
  void step(int64_t index, int64_t head, A* state) {
    const Sequence s = sequence(p_, index);
    // S is used where it is, unless its rows are no whole vectors or lie in another order than the map's.
    const bool in_place = !Map::kHasValueGauge && count_ == columns_;
    begin(s, head, state, in_place ? state + map_.matrix_offset() : own_matrix(), in_place ? p_.value_dim : columns_);
    causal(s);
    if (!in_place) save_matrix(map_, Matrix<A>{s_, s_stride_, 1}, p_.value_dim, first_, count_, state);
    map_.save_columns(state);
    map_.save(state);
  }

  /// The output of an inactive entry.
  void skip(int64_t index, int64_t head) {
    const Sequence s = sequence(p_, index);
    outputs_.open(s.batch, head * p_.group, s.query_begin);
    for (int64_t g = 0; g < p_.group; ++g) fill(outputs_.buffer().at(0, g), columns_, A(0));
    outputs_.write(0, 1);
  }

 private:
  A* own_matrix() {
    if (!own_) own_ = buffers_.take(map_.rows() * columns_);
    return own_;
  }

  void begin(const Sequence& s, int64_t head, const A* state, A* matrix, int64_t stride) {
    sequence_ = s;
    s_ = matrix;
    s_stride_ = stride;
    map_.load(state);
    if (s_ == own_) {
      fill(s_, map_.rows() * columns_, A(0));
      if (state) load_matrix(map_, state, p_.value_dim, first_, count_, Matrix<A>{s_, s_stride_, 1});
    }
    features_.open(s, head);
    features_.use(rows_);
    values_.open(s.batch, head, s.key_begin);
    outputs_.open(s.batch, head * p_.group, s.query_begin);
  }

  Products<A> product(int64_t n) {
    Products<A> product;
    product.s = s_;
    product.s_stride = s_stride_;
    product.rows = map_.rows();
    product.columns = columns_;
    product.tokens = n;
    product.stream = &stream_;
    return product;
  }

  void update(Products<A>& product, const Operand<const A>& v) {
    product.updates = 1;
    product.coefficients = features_.psi();
    product.vectors = v;
    product.scaling = Scaling::Rows;
    product.scales = {features_.scales().data, features_.scales().step, 0};
    product.scaled = features_.scaled();
  }

  void read(Products<A>& product) {
    product.reads = p_.group;
    product.weights = features_.phi();
    product.results = outputs_.buffer();
  }

  /// y = e + phi S, and 0 in rows without keys.
  void write(int64_t t, int64_t n) {
    if constexpr (Map::kHasValueGauge) {
      for (int64_t i = 0; i < n; ++i) {
        for (int64_t g = 0; g < p_.group; ++g) {
          if (inverse_[i * p_.group + g] != 0) add(outputs_.buffer().at(i, g), map_.value_gauge(), columns_);
        }
      }
    }
    outputs_.write(t, n);
  }

  void query(int64_t i) {
    for (int64_t g = 0; g < p_.group; ++g) {
      const Row<A> row = features_.query(i, g);
      if constexpr (Map::kHasValueGauge) inverse_[static_cast<size_t>(i * p_.group + g)] = row.inverse;
    }
  }

  /// Values of tokens [t, t + n), in a buffer where they are to be centred.
  Operand<const A> read_values(int64_t t, int64_t n, const bool* skip) {
    if constexpr (!Map::kHasValueGauge) return values_.read(t, n, skip);
    uncentred_ = values_.read_copy(t, n, skip);
    return {uncentred_.data, uncentred_.step, uncentred_.stride};
  }

  /// Features of tokens [t, t + n) or fewer: up to the one after which the gauge moves. Returns how many.
  template <bool kQueries>
  int64_t features(int64_t t, int64_t n, const Operand<const A>& v) {
    if constexpr (kQueries) features_.read_queries(t, n);
    return features_.keys(t, n, v, [this](int64_t i) {
      if constexpr (kQueries) query(i);
    });
  }

  template <bool kQueries>
  void multiply(int64_t t, int64_t n, const Operand<const A>& v) {
    Products<A> both = product(n);
    update(both, v);
    if constexpr (kQueries) read(both);
    const int64_t next = std::min(kChunk, sequence_.key_len - t - n);
    features_.announce_keys(t + n, next, stream_);
    values_.announce(t + n, next, stream_);
    if constexpr (kQueries) {
      features_.announce_queries(t + n, next, stream_);
      outputs_.announce(t, n, stream_);
    }
    products(both);
    if constexpr (kQueries) write(t, n);
  }

  /// Some tokens from t on, at most to `len`. Returns how many.
  template <bool kQueries>
  int64_t chunk(int64_t t, int64_t len) {
    int64_t n = std::min(kChunk, len - t);
    const Operand<const A> v = read_values(t, n, features_.read_padding(t, n));
    n = features<kQueries>(t, n, v);
    features_.complete_scales(n);
    if constexpr (Map::kHasValueGauge) centre_values(map_, uncentred_, n, columns_);
    multiply<kQueries>(t, n, v);
    if constexpr (Map::kHasValueGauge) {
      if (features_.moves()) map_.move(Matrix<A>{s_, s_stride_, 1});
    }
    return n;
  }

  void causal(const Sequence& s) {
    if constexpr (Map::kHasValueGauge) inverse_.resize(static_cast<size_t>(chunk_size(p_) * p_.group));
    for (int64_t t = 0; t < s.key_len;) t += chunk<true>(t, s.key_len);
  }

  void bidirectional(const Sequence& s) {
    if constexpr (Map::kHasValueGauge) inverse_.resize(static_cast<size_t>(chunk_size(p_) * p_.group));
    for (int64_t t = 0; t < s.key_len;) t += chunk<false>(t, s.key_len);
    for (int64_t t = 0; t < s.query_len; t += kChunk) {
      const int64_t n = std::min(kChunk, s.query_len - t);
      features_.read_queries(t, n);
      for (int64_t i = 0; i < n; ++i) query(i);
      Products<A> rows = product(n);
      read(rows);
      features_.announce_queries(t + n, std::min(kChunk, s.query_len - t - n), stream_);
      outputs_.announce(t, n, stream_);
      products(rows);
      write(t, n);
    }
  }

  const AttentionParams& p_;
  int64_t first_, count_, columns_;
  Buffers<A> buffers_;
  Map map_;
  FeatureChunks<Map> features_;
  FeatureRows<A> rows_;
  Reader<A> values_;
  Writer<A> outputs_;
  A* own_ = nullptr;  // (rows, columns), unless S is used where it is
  A* s_ = nullptr;
  int64_t s_stride_ = 0;
  Sequence sequence_{};
  Stream stream_;
  Operand<A> uncentred_;
  std::vector<A> inverse_;  // (tokens, group), for maps with a value gauge
};

}  // namespace CPU_CAPABILITY
}  // namespace elattn::cpu
