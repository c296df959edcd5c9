#pragma once

#include <functional>

#include "ops/cpu/recurrence/forward.h"

namespace elattn::cpu {
inline namespace CPU_CAPABILITY {

/// One (sequence, kv head) of a causal forward by several threads, where there are fewer heads than threads. Value
/// columns are shared out, as are the queries; only the normaliser of the keys, which runs from token to token, is
/// computed by every member. In every round the members multiply one block of tokens and prepare the features of the
/// next, so that they wait for one another once a block. The bits are those of one thread.
template <typename Map>
void forward_team(const AttentionParams& p, const Format<typename Map::Scalar>& format, int64_t index, int64_t head,
                  int64_t members, const Parallel& parallel) {
  using A = typename Map::Scalar;
  constexpr int64_t kBlock = 16 * kChunk;
  const int64_t vectors = padded<A>(p.value_dim) / kLanes<A>;
  members = std::min(members, vectors);

  std::vector<std::unique_ptr<Forward<Map>>> team;
  for (int64_t i = 0; i < members; ++i) {
    const int64_t first = vectors * i / members * kLanes<A>;
    const int64_t last = std::min(vectors * (i + 1) / members * kLanes<A>, p.value_dim);
    team.push_back(std::make_unique<Forward<Map>>(p, format, first, last - first));
  }
  const int64_t size = team.front()->feature_size(), len = team.front()->open(index, head).key_len;
  for (int64_t i = 1; i < members; ++i) team[static_cast<size_t>(i)]->open(index, head);

  Buffers<A> buffers;
  const FeatureRows<A> halves[] = {FeatureRows<A>(kBlock, p.group, size, buffers),
                                   FeatureRows<A>(kBlock, p.group, size, buffers)};
  const auto chunks = [&](int64_t block, auto&& f) {
    if (block < 0) return;
    for (int64_t t = block * kBlock; t < std::min((block + 1) * kBlock, len); t += kChunk) {
      f(t, std::min(kChunk, len - t), halves[block % 2].from(t - block * kBlock, p.group, size));
    }
  };
  for (int64_t block = 0; (block - 1) * kBlock < len; ++block) {
    parallel(members, [&](int64_t i) {
      Forward<Map>& member = *team[static_cast<size_t>(i)];
      chunks(block - 1, [&](int64_t t, int64_t n, const FeatureRows<A>& rows) { member.multiply(t, n, rows); });
      chunks(block, [&](int64_t t, int64_t n, const FeatureRows<A>& rows) {
        member.featurise(t, n, t / kChunk % members == i, rows);
      });
    });
  }
  for (auto& member : team) member->close(index, head);
}

}  // namespace CPU_CAPABILITY
}  // namespace elattn::cpu
