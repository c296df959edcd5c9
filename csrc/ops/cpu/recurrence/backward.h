#pragma once

#include "ops/cpu/recurrence/forward.h"

namespace elattn::cpu {
inline namespace CPU_CAPABILITY {

/// Gradients of one (sequence, kv head), docs/math.md, sections 2, 3.3, 4 and 9. A forward scan with S transposed gives
/// u = S g, hence delta = g . y and dq; a reverse scan with R = sum phi g^T, rho = -sum phi delta and R transposed
/// gives dv and dk. Both scans are rank-1 updates followed by products along rows (products.h). Gauges are constants
/// for differentiation.
template <typename Map>
class Backward {
 public:
  using A = typename Map::Scalar;

  Backward(const AttentionBackwardParams& p, const Format<A>& format)
      : p_(p),
        columns_(padded<A>(p.value_dim)),
        key_size_(padded<A>(p.head_dim)),
        map_(p, buffers_, 0, columns_),
        size_(map_.padded_rows()),
        features_(p, map_, format, buffers_),
        values_(format, p.v, 1, 0, p.value_dim, columns_, A(1), A(0), chunk_size(p), buffers_),
        grads_(format, p.grad_out, p.group, 0, p.value_dim, columns_, A(1), A(0), chunk_size(p), buffers_),
        grad_q_(format, p.grad_q, p.group, 0, p.head_dim, key_size_, A(p.scale), chunk_size(p), buffers_),
        grad_k_(format, p.grad_k, 1, 0, p.head_dim, key_size_, A(p.scale), chunk_size(p), buffers_),
        grad_v_(format, p.grad_v, 1, 0, p.value_dim, columns_, A(1), chunk_size(p), buffers_) {
    const int64_t chunk = chunk_size(p);
    transposed_ = buffers_.take(p.value_dim * size_);
    r_ = buffers_.take(map_.rows() * columns_);
    rho_ = buffers_.take(size_);
    z_ = buffers_.take(chunk * size_);
    u_ = buffers_.take(chunk * p.group * size_);
    w_ = buffers_.take(chunk * size_);
    dpsi_ = buffers_.take(size_);
    first_gauge_ = buffers_.take(map_.gauge_size());
    suffix_ = buffers_.take(key_size_);
    decay_sum_ = buffers_.take(key_size_);
  }

  void run(int64_t index, int64_t head) {
    sequence_ = sequence(p_, index);
    index_ = index;
    head_ = head;
    const A* state = state_row<A>(p_.state_in, index, head);
    map_.load(state);
    map_.save_gauge_before(first_gauge_);
    map_.save_gauge_after(first_gauge_);
    fill(transposed_, p_.value_dim * size_, A(0));
    if (state) load_matrix(map_, state, p_.value_dim, 0, p_.value_dim, transposed());
    features_.open(sequence_, head);
    values_.open(sequence_.batch, head, sequence_.key_begin);
    grads_.open(sequence_.batch, head * p_.group, sequence_.query_begin);
    grad_q_.open(sequence_.batch, head * p_.group, sequence_.query_begin);
    grad_k_.open(sequence_.batch, head, sequence_.key_begin);
    grad_v_.open(sequence_.batch, head, sequence_.key_begin);
    p_.is_causal ? causal() : bidirectional();
    if (A* to = state_row<A>(p_.grad_state_in, index, head)) {
      fill(to, state_layout(p_.kernel).size(p_.head_dim, p_.value_dim), A(0));
      save_matrix(map_, gradient(), p_.value_dim, 0, p_.value_dim, to);
      map_.save_normaliser(rho_, to);
    }
  }

 private:
  /// Tokens seen in one gauge, one chunk at most.
  struct Segment {
    int64_t begin, size;
  };

  Matrix<A> transposed() const { return {transposed_, 1, size_}; }
  Matrix<A> gradient() const { return {r_, columns_, 1}; }
  Row<A>& row(int64_t t, int64_t g) { return rows_[static_cast<size_t>(t * p_.group + g)]; }
  A* segment_gauge(size_t i) { return gauges_.data() + static_cast<int64_t>(i) * map_.gauge_size(); }
  bool channel_decay() const { return p_.grad_decay_data && p_.grad_decay.channel != 0; }

  /// A product with S transposed or R transposed: rows are value columns, columns are features.
  Products<A> along_features(int64_t n) {
    Products<A> product;
    product.s = transposed_;
    product.s_stride = size_;
    product.rows = p_.value_dim;
    product.columns = size_;
    product.tokens = n;
    product.stream = &stream_;
    return product;
  }

  /// A product with R: rows are features, columns are value columns.
  Products<A> along_values(int64_t n) {
    Products<A> product;
    product.s = r_;
    product.s_stride = columns_;
    product.rows = map_.rows();
    product.columns = columns_;
    product.tokens = n;
    product.stream = &stream_;
    return product;
  }

  void scale_by(Products<A>& product, Scaling scaling, int64_t shift) {
    product.scaling = scaling;
    product.scales = {features_.scales().at(shift), size_, 0};
    product.scaled = features_.scaled() + shift;
  }

  Operand<const A> read_values(int64_t t, int64_t n, const bool* skip) {
    if constexpr (Map::kHasValueGauge) {
      raw_values_ = values_.read_copy(t, n, skip);
      return {raw_values_.data, raw_values_.step, raw_values_.stride};
    } else {
      return values_.read(t, n, skip);
    }
  }

  void centre(int64_t n) {
    if constexpr (Map::kHasValueGauge) centre_values(map_, raw_values_, n, columns_);
  }

  /// delta and dq of tokens [t, t + n), whose u and z (of every token, or the same for all) are known.
  void query_gradients(int64_t t, int64_t n, const A* z, int64_t z_step) {
    for (int64_t i = 0; i < n; ++i) {
      A* total = dq_total_.empty() ? nullptr : dq_total_.data() + (t + i) * key_size_;
      if (total) fill(total, key_size_, A(0));
      for (int64_t g = 0; g < p_.group; ++g) {
        const A *phi = features_.phi().at(i, g), *u = u_ + (i * p_.group + g) * size_;
        Row<A>& now = row(t + i, g);
        now.delta = dot(phi, u, size_);
        A* dq = grad_q_.buffer().at(i, g);
        map_.query_gradient(features_.q(i, g), phi, u, z + i * z_step, now, dq);
        if (total) add(total, dq, key_size_);
      }
    }
    grad_q_.write(t, n);
  }

  /// dk of token i, once w = R v is known and rho has arrived at the token.
  void key_gradient(int64_t i) {
    A* dk = grad_k_.buffer().at(i);
    if (features_.is_padding(i)) return fill(dk, key_size_, A(0));
    for (int64_t d = 0; d < size_; d += kLanes<A>) {
      (Vec<A>::loadu(w_ + i * size_ + d) + Vec<A>::loadu(rho_ + d)).store(dpsi_ + d);
    }
    map_.key_gradient(features_.k(i), features_.psi().at(i), dpsi_, dk);
  }

  void subtract_delta(int64_t i, int64_t t) {
    for (int64_t g = 0; g < p_.group; ++g) add_multiple(rho_, -row(t, g).delta, features_.phi().at(i, g), size_);
  }

  /// R, its transpose (if asked for) and rho from the gradient of the final state.
  void begin_reverse(bool with_transposed) {
    fill(r_, map_.rows() * columns_, A(0));
    fill(rho_, size_, A(0));
    if (with_transposed) fill(transposed_, p_.value_dim * size_, A(0));
    const A* state = state_row<A>(p_.grad_state_out, index_, head_);
    if (!state) return;
    load_matrix(map_, state, p_.value_dim, 0, p_.value_dim, gradient());
    map_.load_normaliser(state, rho_);
    if (with_transposed) load_matrix(map_, state, p_.value_dim, 0, p_.value_dim, transposed());
  }

  void causal() {
    const int64_t len = sequence_.key_len;
    rows_.assign(static_cast<size_t>(len * p_.group), Row<A>{});
    segments_.clear();
    gauges_.clear();
    if (channel_decay()) dq_total_.resize(static_cast<size_t>(len * key_size_));
    for (int64_t t = 0; t < len;) t += forward_segment(t, std::min(kChunk, len - t));
    begin_decay();
    begin_reverse(true);
    features_.scaled()[segments_.empty() ? 0 : segments_.back().size] = false;
    for (size_t i = segments_.size(); i-- > 0;) reverse_segment(i);
    if (features_.scaled()[0] &&
        len > 0) {  // the scale of the first token, from its gauge to that of the initial state
      const A* scale = features_.scales().at(0);
      for (int64_t r = 0; r < map_.rows(); ++r) multiply(r_ + r * columns_, scale[r], columns_);
      for (int64_t r = 0; r < map_.rows(); ++r) rho_[r] *= scale[r];
    }
    if constexpr (Map::kHasValueGauge) map_.move_back(first_gauge_, gradient(), transposed(), rho_);
    end_decay();
  }

  int64_t forward_segment(int64_t t, int64_t n) {
    gauges_.resize(gauges_.size() + static_cast<size_t>(map_.gauge_size()));
    map_.save_gauge_before(segment_gauge(segments_.size()));
    const bool* skip = features_.read_padding(t, n);
    features_.read_queries(t, n);
    const Operand<const A> v = read_values(t, n, skip);
    n = features_.keys(t, n, v, [&](int64_t i) {
      std::copy_n(map_.z(), size_, z_ + i * size_);
      for (int64_t g = 0; g < p_.group; ++g) row(t + i, g) = features_.query(i, g);
    });
    map_.save_gauge_after(segment_gauge(segments_.size()));
    segments_.push_back({t, n});
    centre(n);
    features_.complete_scales(n);
    Products<A> both = along_features(n);
    both.updates = 1;
    both.coefficients = v;
    both.vectors = features_.psi();
    both.reads = p_.group;
    both.weights = grads_.read(t, n);
    both.results = {u_, p_.group * size_, size_};
    scale_by(both, Scaling::Columns, 0);
    const int64_t next = std::min(kChunk, sequence_.key_len - t - n);
    features_.announce_keys(t + n, next, stream_);
    features_.announce_queries(t + n, next, stream_);
    values_.announce(t + n, next, stream_);
    grads_.announce(t + n, next, stream_);
    grad_q_.announce(t, n, stream_);
    products(both);
    query_gradients(t, n, z_, size_);
    if constexpr (Map::kHasValueGauge) {
      if (features_.moves()) map_.move(transposed());
    }
    return n;
  }

  void reverse_segment(size_t index) {
    const auto [t, n] = segments_[index];
    const Segment next = index > 0 ? segments_[index - 1] : Segment{0, 0};
    // The scale of the first token of the segment to the right is applied after the last token of this one.
    std::copy_n(features_.scales().at(0), size_, w_);
    const bool carry = index + 1 < segments_.size() && features_.scaled()[0];
    if constexpr (Map::kHasValueGauge) {
      map_.move_back(segment_gauge(index), gradient(), transposed(), rho_);
    } else {
      map_.load_gauge(segment_gauge(index));
    }
    const bool* skip = features_.read_padding(t, n);
    features_.read_keys(t, n);
    features_.read_queries(t, n);
    const Operand<const A> v = read_values(t, n, skip);
    for (int64_t i = 0; i < n; ++i) {
      features_.template key<true>(i, t + i, nullptr);
      for (int64_t g = 0; g < p_.group; ++g) features_.query_again(i, g, row(t + i, g));
    }
    features_.scaled()[n] = carry;
    if (carry) std::copy_n(w_, size_, features_.scales().at(n));
    features_.complete_scales(n + 1);
    centre(n);
    const Operand<const A> g = grads_.read(t, n);

    Products<A> values = along_values(n);
    values.reverse = true;
    values.updates = p_.group;
    values.coefficients = features_.phi();
    values.vectors = g;
    values.reads = 1;
    values.weights = features_.psi();
    values.results = grad_v_.buffer();
    scale_by(values, Scaling::Rows, 1);
    features_.announce_keys(next.begin, next.size, stream_);
    features_.announce_queries(next.begin, next.size, stream_);
    grad_v_.announce(t, n, stream_);
    products(values);
    grad_v_.write(t, n);

    Products<A> keys = along_features(n);
    keys.reverse = true;
    keys.updates = p_.group;
    keys.coefficients = g;
    keys.vectors = features_.phi();
    keys.reads = 1;
    keys.weights = v;
    keys.results = {w_, size_, size_};
    scale_by(keys, Scaling::Columns, 1);
    values_.announce(next.begin, next.size, stream_);
    grads_.announce(next.begin, next.size, stream_);
    grad_k_.announce(t, n, stream_);
    products(keys);

    for (int64_t i = n - 1; i >= 0; --i) {
      if (features_.scaled()[i + 1]) {
        const A* scale = features_.scales().at(i + 1);
        for (int64_t d = 0; d < size_; d += kLanes<A>)
          (Vec<A>::loadu(rho_ + d) * Vec<A>::loadu(scale + d)).store(rho_ + d);
      }
      subtract_delta(i, t + i);
      key_gradient(i);
      if (p_.grad_decay_data) decay_gradient(i, t + i);
    }
    grad_k_.write(t, n);
  }

  void bidirectional() {
    rows_.assign(static_cast<size_t>(sequence_.query_len * p_.group), Row<A>{});
    for (int64_t t = 0; t < sequence_.key_len;) t += collect_keys(t, std::min(kChunk, sequence_.key_len - t));
    begin_reverse(false);
    for (int64_t t = 0; t < sequence_.query_len; t += kChunk)
      spread_queries(t, std::min(kChunk, sequence_.query_len - t));
    const Matrix<A> from = gradient(), to = transposed();
    for (int64_t j = 0; j < p_.value_dim; ++j) {
      for (int64_t r = 0; r < map_.rows(); ++r) to(r, j) = from(r, j);
    }
    for (int64_t t = 0; t < sequence_.key_len; t += kChunk) spread_keys(t, std::min(kChunk, sequence_.key_len - t));
    map_.move_back(first_gauge_, gradient(), transposed(), rho_);
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
    scale_by(update, Scaling::Columns, 0);
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
      for (int64_t g = 0; g < p_.group; ++g) row(t + i, g) = features_.query(i, g);
    }
    Products<A> read = along_features(n);
    read.reads = p_.group;
    read.weights = grads_.read(t, n);
    read.results = {u_, p_.group * size_, size_};
    grad_q_.announce(t, n, stream_);
    products(read);
    query_gradients(t, n, map_.z(), 0);
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
    for (int64_t i = 0; i < n; ++i) key_gradient(i);
    grad_k_.write(t, n);
  }

  /// The gradient of a rate is the sum over later tokens of dk - dq, less what the final state received (docs/math.md,
  /// section 9).
  void begin_decay() {
    if (!p_.grad_decay_data) return;
    fill(suffix_, key_size_, A(0));
    fill(decay_sum_, key_size_, A(0));
    total_suffix_ = 0;
    total_sum_ = 0;
    const A* state = state_row<A>(p_.grad_state_out, index_, head_);
    if (!state) return;
    begin_reverse(false);
    const Matrix<A> s = transposed(), r = gradient();
    for (int64_t d = 0; d < map_.rows(); ++d) {
      A received = map_.z()[d] * rho_[d];
      for (int64_t j = 0; j < p_.value_dim; ++j) received += s(d, j) * r(d, j);
      if (channel_decay()) suffix_[d] -= received;
      total_suffix_ -= received;
    }
  }

  A* decay_entry(int64_t t) const {
    const Decay& to = p_.grad_decay;
    // Packed tokens tell the sequences apart by themselves; otherwise every sequence has its own part.
    const int64_t first = to.batch == 0 ? sequence_.key_begin : 0;
    const int64_t row = to.row == 0 ? 0 : first + t;
    return static_cast<A*>(p_.grad_decay_data) + index_ * to.batch + head_ * to.head + row * to.row;
  }

  void decay_gradient(int64_t i, int64_t t) {
    const Decay& to = p_.grad_decay;
    if (!channel_decay()) {
      total_suffix_ += features_.is_padding(i) ? A(0) : dot(features_.psi().at(i), dpsi_, size_);
      const A gradient = features_.is_padding(i) ? A(0) : static_cast<A>(total_suffix_);
      total_sum_ += gradient;
      if (to.row != 0) *decay_entry(t) = gradient;
      return;
    }
    add(suffix_, grad_k_.buffer().at(i), key_size_);
    add_multiple(suffix_, A(-1), dq_total_.data() + t * key_size_, key_size_);
    if (features_.is_padding(i)) {
      if (to.row != 0) fill(decay_entry(t), p_.head_dim, A(0));
      return;
    }
    if (to.row != 0) {
      std::copy_n(suffix_, p_.head_dim, decay_entry(t));
    } else {
      add(decay_sum_, suffix_, key_size_);
    }
  }

  void end_decay() {
    const Decay& to = p_.grad_decay;
    if (!p_.grad_decay_data || to.row != 0) return;
    if (channel_decay()) {
      std::copy_n(decay_sum_, p_.head_dim, decay_entry(0));
    } else {
      *decay_entry(0) = static_cast<A>(total_sum_);
    }
  }

  const AttentionBackwardParams& p_;
  int64_t columns_, key_size_;  // padded value_dim and head_dim
  Buffers<A> buffers_;
  Map map_;
  int64_t size_;  // padded rows of the map
  FeatureChunks<Map> features_;
  Reader<A> values_, grads_;
  Writer<A> grad_q_, grad_k_, grad_v_;
  A* transposed_;   // (value_dim, size): S, then R, transposed
  A* r_;            // (rows, columns)
  A* rho_;          // (size): the gradient of z
  A *z_, *u_, *w_;  // (tokens, size), (tokens, group, size), (tokens, size)
  A* dpsi_;         // (size)
  A* first_gauge_;
  A *suffix_, *decay_sum_;                   // (padded head_dim), rates per channel
  double total_suffix_ = 0, total_sum_ = 0;  // rates per head or token
  Stream stream_;
  Operand<A> raw_values_;
  Sequence sequence_{};
  int64_t index_ = 0, head_ = 0;
  std::vector<Row<A>> rows_;  // (queries, group)
  std::vector<Segment> segments_;
  std::vector<A> gauges_;    // of the segments
  std::vector<A> dq_total_;  // (tokens, padded head_dim), summed over the group; only with rates per channel
};

}  // namespace CPU_CAPABILITY
}  // namespace elattn::cpu
