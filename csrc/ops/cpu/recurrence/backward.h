#pragma once

#include "ops/cpu/recurrence/scans.h"

namespace elattn::cpu {
inline namespace CPU_CAPABILITY {

/// Gradients of one (sequence, kv head), docs/math.md, sections 2, 3.3, 4 and 9. A forward scan with S transposed gives
/// u = S g, hence delta = g . y and dq; a reverse scan with R = sum phi g^T, rho = -sum phi delta and R transposed
/// gives dv and dk. Both scans are rank-1 updates followed by products along rows (products.h). Gauges are constants
/// for differentiation.
///
/// The steps of the causal scans may be taken by several members of a team (team.h), of which this is one: products
/// for columns of its own, features and dq for tokens of its own. It has all columns and tokens if it is alone.
template <typename Map>
class Backward {
 public:
  using A = typename Map::Scalar;

  Backward(const AttentionBackwardParams& p, const Format<A>& format, Scans<Map>& scans, int64_t member = 0,
           int64_t members = 1)
      : p_(p),
        columns_(padded<A>(p.value_dim)),
        key_size_(padded<A>(p.head_dim)),
        map_(p, buffers_, 0, columns_),
        size_(map_.padded_rows()),
        own_features_(part_of<A>(size_, member, members)),
        own_values_(part_of<A>(columns_, member, members)),
        own_keys_{own_features_.first, std::min(own_features_.count, key_size_ - own_features_.first)},
        scans_(scans),
        features_(p, map_, format, buffers_),
        values_(format, p.v, 1, 0, p.value_dim, columns_, A(1), A(0), chunk_size(p), buffers_),
        grads_(format, p.grad_out, p.group, 0, p.value_dim, columns_, A(1), A(0), chunk_size(p), buffers_),
        grad_q_(format, p.grad_q, p.group, 0, p.head_dim, key_size_, A(p.scale), chunk_size(p), buffers_),
        grad_k_(format, p.grad_k, 1, own_keys_.first, own_keys_.within(p.head_dim), own_keys_.count, A(p.scale),
                chunk_size(p), buffers_),
        grad_v_(format, p.grad_v, 1, own_values_.first, own_values_.within(p.value_dim), own_values_.count, A(1),
                chunk_size(p), buffers_),
        w_(buffers_.take(chunk_size(p) * size_)) {}

  void run(int64_t index, int64_t head) {
    open(index, head);
    begin();
    p_.is_causal ? causal() : bidirectional();
    end();
  }

  /// The parts of `run`. Every member opens the head; one of them begins, turns and ends.
  void open(int64_t index, int64_t head) {
    sequence_ = sequence(p_, index);
    index_ = index;
    head_ = head;
    map_.load(state_row<A>(p_.state_in, index, head));
    features_.open(sequence_, head);
    features_.use(scans_.features);
    values_.open(sequence_.batch, head, sequence_.key_begin);
    grads_.open(sequence_.batch, head * p_.group, sequence_.query_begin);
    grad_q_.open(sequence_.batch, head * p_.group, sequence_.query_begin);
    grad_k_.open(sequence_.batch, head, sequence_.key_begin);
    grad_v_.open(sequence_.batch, head, sequence_.key_begin);
  }

  void begin() {
    const A* state = state_row<A>(p_.state_in, index_, head_);
    map_.save_gauge_before(scans_.first_gauge);
    map_.save_gauge_after(scans_.first_gauge);
    fill(scans_.transposed, p_.value_dim * scans_.transposed_stride, A(0));
    if (state) load_matrix(map_, state, p_.value_dim, 0, p_.value_dim, transposed());
    scans_.rows.assign(static_cast<size_t>(sequence_.query_len * p_.group), Row<A>{});
    scans_.segments.clear();
    scans_.gauges.clear();
    if (scans_.decay.per_channel()) scans_.dq_total.resize(static_cast<size_t>(sequence_.key_len * key_size_));
  }

  /// From the forward to the reverse scan.
  void turn() {
    begin_decay();
    begin_reverse(true);
    features_.use(scans_.features);
    features_.scaled()[0] = false;  // no token is to the right of the last one
    fill(features_.scales().at(0), size_, A(1));
  }

  void end() {
    if (p_.is_causal) end_causal();
    if (A* to = state_row<A>(p_.grad_state_in, index_, head_)) {
      fill(to, state_layout(p_.kernel).size(p_.head_dim, p_.value_dim), A(0));
      save_matrix(map_, gradient(), p_.value_dim, 0, p_.value_dim, to);
      map_.save_normaliser(scans_.rho, to);
    }
  }

  int64_t length() const { return sequence_.key_len; }

  /// Keys of a segment whose features are another member's.
  void pass_keys(size_t index) { features_.pass_keys(scans_.segments[index].begin, scans_.segments[index].size); }

  /// Features of a segment, which ends with the token after which the gauge moves.
  void featurise(size_t index) {
    auto& [t, n, first] = scans_.segments[index];
    map_.save_gauge_before(scans_.gauge(index));
    const bool* skip = enter(index);
    features_.read_queries(t, n);
    Operand<const A> v;
    if constexpr (Map::kHasValueGauge) v = read_values(t, n, skip);
    n = features_.keys(t, n, v, [&](int64_t i) {
      std::copy_n(map_.z(), size_, scans_.z + (first + i) * size_);
      for (int64_t g = 0; g < p_.group; ++g) scans_.row(t + i, g) = features_.query(i, g);
    });
    map_.save_gauge_after(scans_.gauge(index));
    centre(n);
    features_.complete_scales(n);
  }

  /// S and u = S g over a segment, in the columns of this member.
  void scan(size_t index) {
    const auto [t, n, first] = scans_.segments[index];
    const bool* skip = enter(index);
    Products<A> both = along_features(n);
    both.updates = 1;
    both.coefficients = Map::kHasValueGauge ? raw_values() : values_.read(t, n, skip);
    both.vectors = features_.psi().from(0, own_features_.first);
    both.reads = p_.group;
    both.weights = grads_.read(t, n);
    both.results = {u(first) + own_features_.first, p_.group * size_, size_};
    scale_by(both, Scaling::Columns, 0, own_features_.first);
    const int64_t next = std::min(kChunk, sequence_.key_len - t - n);
    values_.announce(t + n, next, stream_);
    grads_.announce(t + n, next, stream_);
    products(both);
  }

  /// delta and dq of a segment; its queries have been read last.
  void query_gradients(size_t index) {
    const auto [t, n, first] = scans_.segments[index];
    enter(index);
    query_gradients(t, n, u(first), scans_.z + first * size_, size_);
  }

  /// The scale of the first token held becomes that of the token after the last of the `tokens` to its left, which take
  /// its place.
  void carry_scale(int64_t tokens) {
    features_.use(scans_.features);
    features_.scaled()[tokens] = features_.scaled()[0];
    std::copy_n(features_.scales().at(0), size_, features_.scales().at(tokens));
  }

  /// The features of a segment in the reverse pass.
  void featurise_again(size_t index) {
    const auto [t, n, first] = scans_.segments[index];
    map_.load_gauge(scans_.gauge(index));
    enter(index);
    features_.read_keys(t, n);
    features_.read_queries(t, n);
    for (int64_t i = 0; i < n; ++i) {
      features_.template key<true>(i, t + i, nullptr);
      for (int64_t g = 0; g < p_.group; ++g) features_.query_again(i, g, scans_.row(t + i, g));
      // All of them: whether the token after the segment is scaled is not known here.
      if (!features_.scaled()[i]) fill(features_.scales().at(i), size_, A(1));
    }
  }

  /// R and rho over a segment from right to left, dv and dk, in the columns of this member; the keys have been read
  /// last.
  void scan_back(size_t index) {
    const auto [t, n, first] = scans_.segments[index];
    const Segment next = index > 0 ? scans_.segments[index - 1] : Segment{0, 0, 0};
    const bool* skip = enter(index);
    const Operand<const A> v = read_values(t, n, skip), g = grads_.read(t, n);
    centre(n);

    Products<A> values = along_values(n);
    values.reverse = true;
    values.updates = p_.group;
    values.coefficients = features_.phi();
    values.vectors = g.from(0, own_values_.first);
    values.reads = 1;
    values.weights = features_.psi();
    values.results = grad_v_.buffer();
    scale_by(values, Scaling::Rows, 1, 0);
    grad_v_.announce(t, n, stream_);
    products(values);
    grad_v_.write(t, n);

    Products<A> keys = along_features(n);
    keys.reverse = true;
    keys.updates = p_.group;
    keys.coefficients = g;
    keys.vectors = features_.phi().from(0, own_features_.first);
    keys.reads = 1;
    keys.weights = v;
    keys.results = {w_ + own_features_.first, size_, size_};
    scale_by(keys, Scaling::Columns, 1, own_features_.first);
    values_.announce(next.begin, next.size, stream_);
    grads_.announce(next.begin, next.size, stream_);
    grad_k_.announce(t, n, stream_);
    products(keys);

    A* rho = scans_.rho + own_features_.first;
    for (int64_t i = n - 1; i >= 0; --i) {
      if (features_.scaled()[i + 1]) {
        const A* scale = features_.scales().at(i + 1) + own_features_.first;
        for (int64_t d = 0; d < own_features_.count; d += kLanes<A>)
          (Vec<A>::loadu(rho + d) * Vec<A>::loadu(scale + d)).store(rho + d);
      }
      subtract_delta(i, t + i);
      key_gradient(i, dpsi(first + i));
      if (!scans_.decay.per_channel()) continue;
      scans_.decay.add_token(t + i, own_keys_, features_.is_padding(i), grad_k_.buffer().at(i), scans_.dq_of(t + i));
    }
    grad_k_.write(t, n);
  }

  /// The gradient of one rate per head or token over a segment from right to left; every member has been back over it.
  void decay_gradient(size_t index) {
    if (!scans_.decay.is_asked_for() || scans_.decay.per_channel()) return;
    const auto [t, n, first] = scans_.segments[index];
    enter(index);
    for (int64_t i = n - 1; i >= 0; --i) {
      const bool is_padding = features_.is_padding(i);
      const A by_weight = is_padding ? A(0) : dot(features_.psi().at(i), dpsi(first + i), size_);
      scans_.decay.add_token(t + i, is_padding, by_weight);
    }
  }

  /// Keys and queries of a segment once more, for a member that has been elsewhere since.
  void read_keys(size_t index) {
    enter(index);
    features_.read_keys(scans_.segments[index].begin, scans_.segments[index].size);
  }
  void read_queries(size_t index) { features_.read_queries(scans_.segments[index].begin, scans_.segments[index].size); }

 private:
  Matrix<A> transposed() const { return {scans_.transposed, 1, scans_.transposed_stride}; }
  Matrix<A> gradient() const { return {scans_.r, scans_.r_stride, 1}; }
  A* u(int64_t row) const { return scans_.u + row * p_.group * size_; }
  A* dpsi(int64_t row) const { return scans_.u + row * size_; }

  /// Goes to the features and the padding of a segment.
  const bool* enter(size_t index) {
    const auto [t, n, first] = scans_.segments[index];
    features_.use(scans_.features.from(first, p_.group, size_));
    return features_.read_padding(t, n);
  }

  /// A product with S transposed or R transposed: rows are value columns, columns are features.
  Products<A> along_features(int64_t n) {
    Products<A> product;
    product.s = scans_.transposed + own_features_.first;
    product.s_stride = scans_.transposed_stride;
    product.rows = p_.value_dim;
    product.columns = own_features_.count;
    product.tokens = n;
    product.stream = &stream_;
    return product;
  }

  /// A product with R: rows are features, columns are value columns.
  Products<A> along_values(int64_t n) {
    Products<A> product;
    product.s = scans_.r + own_values_.first;
    product.s_stride = scans_.r_stride;
    product.rows = map_.rows();
    product.columns = own_values_.count;
    product.tokens = n;
    product.stream = &stream_;
    return product;
  }

  void scale_by(Products<A>& product, Scaling scaling, int64_t shift, int64_t column) {
    product.scaling = scaling;
    product.scales = {features_.scales().at(shift) + column, size_, 0};
    product.scaled = features_.scaled() + shift;
  }

  Operand<const A> raw_values() const { return {raw_values_.data, raw_values_.step, raw_values_.stride}; }

  Operand<const A> read_values(int64_t t, int64_t n, const bool* skip) {
    if constexpr (!Map::kHasValueGauge) return values_.read(t, n, skip);
    raw_values_ = values_.read_copy(t, n, skip);
    return raw_values();
  }

  void centre(int64_t n) {
    if constexpr (Map::kHasValueGauge) centre_values(map_, raw_values_, n, columns_);
  }

  /// delta and dq of tokens [t, t + n), whose u and z (of every token, or the same for all) are known.
  void query_gradients(int64_t t, int64_t n, const A* u, const A* z, int64_t z_step) {
    for (int64_t i = 0; i < n; ++i) {
      A* total = scans_.decay.per_channel() ? scans_.dq_of(t + i) : nullptr;
      if (total) fill(total, key_size_, A(0));
      for (int64_t g = 0; g < p_.group; ++g, u += size_) {
        const A* phi = features_.phi().at(i, g);
        Row<A>& now = scans_.row(t + i, g);
        now.delta = dot(phi, u, size_);
        A* dq = grad_q_.buffer().at(i, g);
        map_.query_gradient(features_.q(i, g), phi, u, z + i * z_step, now, dq);
        if (total) add(total, dq, key_size_);
      }
    }
    grad_q_.write(t, n);
  }

  /// dk of token i, once w = R v is known and rho has arrived at the token.
  void key_gradient(int64_t i, A* dpsi) {
    A* dk = grad_k_.buffer().at(i);
    if (features_.is_padding(i)) return fill(dk, own_keys_.count, A(0));
    const auto [first, count] = own_features_;
    for (int64_t d = first; d < first + count; d += kLanes<A>) {
      (Vec<A>::loadu(w_ + i * size_ + d) + Vec<A>::loadu(scans_.rho + d)).store(dpsi + d);
    }
    map_.key_gradient(features_.k(i) + first, features_.psi().at(i) + first, dpsi + first, dk, own_keys_.count);
  }

  void subtract_delta(int64_t i, int64_t t) {
    const auto [first, count] = own_features_;
    for (int64_t g = 0; g < p_.group; ++g) {
      add_multiple(scans_.rho + first, -scans_.row(t, g).delta, features_.phi().at(i, g) + first, count);
    }
  }

  /// R, its transpose (if asked for) and rho from the gradient of the final state.
  void begin_reverse(bool with_transposed) {
    fill(scans_.r, map_.rows() * scans_.r_stride, A(0));
    fill(scans_.rho, size_, A(0));
    if (with_transposed) fill(scans_.transposed, p_.value_dim * scans_.transposed_stride, A(0));
    const A* state = state_row<A>(p_.grad_state_out, index_, head_);
    if (!state) return;
    load_matrix(map_, state, p_.value_dim, 0, p_.value_dim, gradient());
    map_.load_normaliser(state, scans_.rho);
    if (with_transposed) load_matrix(map_, state, p_.value_dim, 0, p_.value_dim, transposed());
  }

  void causal() {
    const int64_t len = sequence_.key_len;
    auto& segments = scans_.segments;
    for (int64_t t = 0; t < len; t += segments.back().size) {
      const size_t i = scans_.add_segment(t, std::min(kChunk, len - t), 0);
      featurise(i);
      const int64_t n = segments[i].size, next = std::min(kChunk, len - t - n);
      features_.announce_keys(t + n, next, stream_);
      features_.announce_queries(t + n, next, stream_);
      grad_q_.announce(t, n, stream_);
      scan(i);
      query_gradients(i);
      if constexpr (Map::kHasValueGauge) {
        if (features_.moves()) map_.move(transposed());
      }
    }
    turn();
    for (size_t i = segments.size(); i-- > 0;) {
      const Segment next = i > 0 ? segments[i - 1] : Segment{0, 0, 0};
      carry_scale(segments[i].size);
      if constexpr (Map::kHasValueGauge) map_.move_back(scans_.gauge(i), gradient(), transposed(), scans_.rho);
      featurise_again(i);
      features_.announce_keys(next.begin, next.size, stream_);
      features_.announce_queries(next.begin, next.size, stream_);
      scan_back(i);
      decay_gradient(i);
    }
  }

  void end_causal() {
    if (scans_.features.scaled[0]) {  // the scale of the first token, from its gauge to that of the initial state
      const A* scale = scans_.features.scales;
      for (int64_t r = 0; r < map_.rows(); ++r) {
        multiply(scans_.r + r * scans_.r_stride, scale[r], columns_);
        scans_.rho[r] *= scale[r];
      }
    }
    if constexpr (Map::kHasValueGauge) map_.move_back(scans_.first_gauge, gradient(), transposed(), scans_.rho);
    scans_.decay.close();
  }

  void bidirectional() {
    for (int64_t t = 0; t < sequence_.key_len;) t += collect_keys(t, std::min(kChunk, sequence_.key_len - t));
    begin_reverse(false);
    for (int64_t t = 0; t < sequence_.query_len; t += kChunk)
      spread_queries(t, std::min(kChunk, sequence_.query_len - t));
    const Matrix<A> from = gradient(), to = transposed();
    for (int64_t j = 0; j < p_.value_dim; ++j) {
      for (int64_t r = 0; r < map_.rows(); ++r) to(r, j) = from(r, j);
    }
    for (int64_t t = 0; t < sequence_.key_len; t += kChunk) spread_keys(t, std::min(kChunk, sequence_.key_len - t));
    map_.move_back(scans_.first_gauge, gradient(), transposed(), scans_.rho);
  }

  /// S of all keys.
  int64_t collect_keys(int64_t t, int64_t n) {
    const bool* skip = features_.read_padding(t, n);
    const Operand<const A> v = read_values(t, n, skip);
    n = features_.keys(t, n, v, [](int64_t) {});
    centre(n);
    features_.complete_scales(n);
    Products<A> update = along_features(n);
    update.updates = 1;
    update.coefficients = v;
    update.vectors = features_.psi();
    scale_by(update, Scaling::Columns, 0, 0);
    const int64_t next = std::min(kChunk, sequence_.key_len - t - n);
    features_.announce_keys(t + n, next, stream_);
    values_.announce(t + n, next, stream_);
    products(update);
    if constexpr (Map::kHasValueGauge) {
      if (features_.moves()) map_.move(transposed());
    }
    return n;
  }

  /// dq, and what the queries send back to S and z.
  void spread_queries(int64_t t, int64_t n) {
    features_.read_queries(t, n);
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t g = 0; g < p_.group; ++g) scans_.row(t + i, g) = features_.query(i, g);
    }
    Products<A> read = along_features(n);
    read.reads = p_.group;
    read.weights = grads_.read(t, n);
    read.results = {u(0), p_.group * size_, size_};
    grad_q_.announce(t, n, stream_);
    products(read);
    query_gradients(t, n, u(0), map_.z(), 0);
    for (int64_t i = 0; i < n; ++i) subtract_delta(i, t + i);
    Products<A> update = along_values(n);
    update.updates = p_.group;
    update.coefficients = features_.phi();
    update.vectors = read.weights;
    const int64_t next = std::min(kChunk, sequence_.query_len - t - n);
    features_.announce_queries(t + n, next, stream_);
    grads_.announce(t + n, next, stream_);
    products(update);
  }

  /// dk and dv, in the final gauge.
  void spread_keys(int64_t t, int64_t n) {
    const bool* skip = features_.read_padding(t, n);
    features_.read_keys(t, n);
    const Operand<const A> v = read_values(t, n, skip);
    centre(n);
    for (int64_t i = 0; i < n; ++i) features_.template key<true>(i, t + i, nullptr);
    Products<A> values = along_values(n);
    values.reads = 1;
    values.weights = features_.psi();
    values.results = grad_v_.buffer();
    const int64_t next = std::min(kChunk, sequence_.key_len - t - n);
    features_.announce_keys(t + n, next, stream_);
    grad_v_.announce(t, n, stream_);
    products(values);
    grad_v_.write(t, n);
    Products<A> keys = along_features(n);
    keys.reads = 1;
    keys.weights = v;
    keys.results = {w_, size_, size_};
    values_.announce(t + n, next, stream_);
    grad_k_.announce(t, n, stream_);
    products(keys);
    for (int64_t i = 0; i < n; ++i) key_gradient(i, dpsi(i));
    grad_k_.write(t, n);
  }

  /// What the final state received of every feature, for the gradient of decay.
  void begin_decay() {
    scans_.decay.open(sequence_, index_, head_);
    if (!scans_.decay.is_asked_for() || !p_.grad_state_out.data) return;
    begin_reverse(false);
    const Matrix<A> s = transposed(), r = gradient();
    for (int64_t d = 0; d < map_.rows(); ++d) {
      A received = map_.z()[d] * scans_.rho[d];
      for (int64_t j = 0; j < p_.value_dim; ++j) received += s(d, j) * r(d, j);
      scans_.decay.subtract_received(d, received);
    }
  }

  const AttentionBackwardParams& p_;
  int64_t columns_, key_size_;  // padded value_dim and head_dim
  Buffers<A> buffers_;
  Map map_;
  int64_t size_;  // padded rows of the map
  Columns own_features_, own_values_, own_keys_;
  Scans<Map>& scans_;
  FeatureChunks<Map> features_;
  Reader<A> values_, grads_;
  Writer<A> grad_q_, grad_k_, grad_v_;
  A* w_;  // (tokens, size)
  Stream stream_;
  Operand<A> raw_values_;
  Sequence sequence_{};
  int64_t index_ = 0, head_ = 0;
};

}  // namespace CPU_CAPABILITY
}  // namespace elattn::cpu
