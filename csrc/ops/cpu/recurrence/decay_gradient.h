#pragma once

#include "ops/cpu/recurrence/chunks.h"
#include "ops/cpu/recurrence/map.h"

namespace elattn::cpu {
inline namespace CPU_CAPABILITY {

/// The gradient of the rates of one (sequence, kv head), token by token from the last to the first: the sum over later
/// tokens of dk - dq, less what the final state received (docs/math.md, section 9). It is written where rates are per
/// token, and summed up where they are not.
template <typename A>
class DecayGradient {
 public:
  DecayGradient(const AttentionBackwardParams& p, Buffers<A>& buffers)
      : to_(p.grad_decay), data_(static_cast<A*>(p.grad_decay_data)), head_dim_(p.head_dim) {
    suffix_ = buffers.take(padded<A>(head_dim_));
    sum_ = buffers.take(padded<A>(head_dim_));
  }

  bool is_asked_for() const { return data_; }
  bool per_channel() const { return data_ && to_.channel != 0; }

  void open(const Sequence& s, int64_t index, int64_t head) {
    if (!data_) return;
    // Packed tokens tell the sequences apart by themselves; otherwise every sequence has its own part.
    const int64_t first = to_.batch == 0 ? s.key_begin : 0;
    from_ = data_ + index * to_.batch + head * to_.head + first * to_.row;
    fill(suffix_, padded<A>(head_dim_), A(0));
    fill(sum_, padded<A>(head_dim_), A(0));
    total_suffix_ = total_sum_ = 0;
  }

  /// What the final state received in feature d.
  void subtract_received(int64_t d, A received) {
    if (per_channel()) suffix_[d] -= received;
    total_suffix_ -= received;
  }

  /// Token t with rates per channel, in some of the channels: dk of these, dq of all.
  void add_token(int64_t t, const Columns& channels, bool is_padding, const A* dk, const A* dq) {
    const auto [first, count] = channels;
    A *suffix = suffix_ + first, *to = from_ + t * to_.row + first;
    add(suffix, dk, count);
    add_multiple(suffix, A(-1), dq + first, count);
    if (to_.row == 0) {
      if (!is_padding) add(sum_ + first, suffix, count);
    } else if (is_padding) {
      fill(to, channels.within(head_dim_), A(0));
    } else {
      std::copy_n(suffix, channels.within(head_dim_), to);
    }
  }

  /// Token t with one rate: psi . dpsi is the derivative by the log of its weight.
  void add_token(int64_t t, bool is_padding, A by_weight) {
    total_suffix_ += by_weight;
    const A gradient = is_padding ? A(0) : static_cast<A>(total_suffix_);
    total_sum_ += gradient;
    if (to_.row != 0) from_[t * to_.row] = gradient;
  }

  void close() {
    if (!data_ || to_.row != 0) return;
    if (per_channel()) {
      std::copy_n(sum_, head_dim_, from_);
    } else {
      *from_ = static_cast<A>(total_sum_);
    }
  }

 private:
  Decay to_;
  A* data_;
  int64_t head_dim_;
  A* from_ = nullptr;                        // the entry of the first token
  A *suffix_, *sum_;                         // (padded head_dim), rates per channel
  double total_suffix_ = 0, total_sum_ = 0;  // rates per head or token
};

}  // namespace CPU_CAPABILITY
}  // namespace elattn::cpu
