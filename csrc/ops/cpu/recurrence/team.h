#pragma once

#include <functional>

#include "ops/cpu/recurrence/backward.h"
#include "ops/cpu/recurrence/forward.h"

/// Causal calls by several threads at every (sequence, kv head), where there are fewer heads than threads. Columns of
/// the products are shared out, and so are the tokens whose features are computed; only the gauge and the normaliser of
/// the keys, which run from token to token, are computed by every member. Members work on a block of tokens at a time
/// and wait for one another at its end. The bits are those of one thread.
namespace elattn::cpu {
inline namespace CPU_CAPABILITY {

template <typename Map>
void forward_team(const AttentionParams& p, const Format<typename Map::Scalar>& format, int64_t members,
                  const Parallel& parallel) {
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
  const int64_t size = team.front()->feature_size();
  Buffers<A> buffers;
  const FeatureRows<A> halves[] = {FeatureRows<A>(kBlock, p.group, size, buffers),
                                   FeatureRows<A>(kBlock, p.group, size, buffers)};

  for (int64_t item = 0; item < p.sequences * p.kv_heads; ++item) {
    const int64_t index = item / p.kv_heads, head = item % p.kv_heads, len = sequence(p, index).key_len;
    for (auto& member : team) member->open(index, head);
    const auto chunks = [&](int64_t block, auto&& f) {
      if (block < 0) return;
      for (int64_t t = block * kBlock; t < std::min((block + 1) * kBlock, len); t += kChunk) {
        f(t, std::min(kChunk, len - t), halves[block % 2].from(t - block * kBlock, p.group, size));
      }
    };
    // A block is multiplied while the features of the next are computed.
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
}

/// At most `lines_of` head_dim and value_dim members.
template <typename Map>
void backward_team(const AttentionBackwardParams& p, const Format<typename Map::Scalar>& format, int64_t members,
                   const Parallel& parallel) {
  constexpr int64_t kChunksEach = 4;
  // Chunk c of a block belongs to member c % members, so that nobody else touches its rows of the next block before
  // the member has done with those of this one.
  const int64_t block_chunks = kChunksEach * members, block_tokens = block_chunks * kChunk;

  Scans<Map> scans(p, block_tokens);
  std::vector<std::unique_ptr<Backward<Map>>> team;
  for (int64_t i = 0; i < members; ++i) team.push_back(std::make_unique<Backward<Map>>(p, format, scans, i, members));
  Backward<Map>& first = *team.front();

  for (int64_t item = 0; item < p.sequences * p.kv_heads; ++item) {
    for (auto& member : team) member->open(item / p.kv_heads, item % p.kv_heads);
    first.begin();
    for (int64_t t = 0; t < first.length(); t += kChunk) {
      scans.add_segment(t, std::min(kChunk, first.length() - t), t % block_tokens);
    }
    const int64_t chunks = static_cast<int64_t>(scans.segments.size());
    const int64_t blocks = (chunks + block_chunks - 1) / block_chunks;
    const auto own = [&](int64_t c, int64_t i) { return c % members == i; };
    // f(chunk) for the chunks of a block, if there is one, from left to right or back.
    const auto forth = [&](int64_t block, auto&& f) {
      for (int64_t c = std::max<int64_t>(block, 0) * block_chunks; c < std::min((block + 1) * block_chunks, chunks);
           ++c)
        f(c);
    };
    const auto back = [&](int64_t block, auto&& f) {
      for (int64_t c = std::min((block + 1) * block_chunks, chunks); c-- > block * block_chunks;) f(c);
    };
    for (int64_t block = 0; block <= blocks; ++block) {
      parallel(members, [&](int64_t i) {
        Backward<Map>& member = *team[static_cast<size_t>(i)];
        forth(block - 1, [&](int64_t c) {
          if (!own(c, i)) return;
          member.read_queries(c);
          member.query_gradients(c);
        });
        forth(block, [&](int64_t c) { own(c, i) ? member.featurise(c) : member.pass_keys(c); });
      });
      parallel(members, [&](int64_t i) { forth(block, [&](int64_t c) { team[static_cast<size_t>(i)]->scan(c); }); });
    }
    first.turn();
    for (int64_t block = blocks; block-- > 0;) {
      parallel(members, [&](int64_t i) {
        Backward<Map>& member = *team[static_cast<size_t>(i)];
        if (i == 0) member.carry_scale(std::min(block_tokens, first.length() - block * block_tokens));
        forth(block, [&](int64_t c) {
          if (own(c, i)) member.featurise_again(c);
        });
      });
      parallel(members, [&](int64_t i) {
        Backward<Map>& member = *team[static_cast<size_t>(i)];
        back(block, [&](int64_t c) {
          member.read_keys(c);
          member.scan_back(c);
        });
      });
      back(block, [&](int64_t c) { first.decay_gradient(c); });
    }
    first.end();
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace elattn::cpu
