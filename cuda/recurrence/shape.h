#pragma once

#include <algorithm>
#include <optional>
#include <type_traits>

#include "cuda/recurrence/features.cuh"
#include "cuda/recurrence/hadamard_exp.cuh"
#include "cuda/recurrence/recurrence.h"
#include "cuda/recurrence/squared.cuh"

/// How a launch cuts the work.
namespace elattn::cuda {

inline int round_up(int64_t x, int unit) { return static_cast<int>((x + unit - 1) / unit * unit); }

/// Everything but the sizes of blocks.
inline Shape base_shape(const AttentionParams& p) {
  Shape s;
  s.head_dim = static_cast<int>(p.head_dim);
  s.value_dim = static_cast<int>(p.value_dim);
  s.key_size = round_up(p.head_dim, kWarpSize);
  s.rows = s.head_dim + (is_squared(p.kernel) ? 2 : 0);
  s.size = round_up(s.rows, kWarpSize);
  const StateLayout layout = state_layout(p.kernel);
  const auto offset = [&](const char* field) { return layout.offset(field, p.head_dim, p.value_dim); };
  if (is_squared(p.kernel)) {
    s.matrix = offset("sv");
    s.c = offset("c");
    s.e = offset("e");
    s.n = offset("n");
    s.sk = offset("sk");
    s.skk = offset("skk");
  } else {
    s.matrix = offset("S");
    s.z = offset("z");
    s.m = offset("m");
    s.r = offset("r");
  }
  return s;
}

/// Tokens whose queries fit into `chunk` rows, a power of two. Under decay the mean of squared kernels follows the
/// latest keys, and the gauge must be able to follow it after every token.
inline int tokens_of(const AttentionParams& p, int chunk) {
  int tokens = is_squared(p.kernel) && p.decay.data ? 1 : chunk;
  while (tokens > 1 && tokens * p.group > chunk) tokens /= 2;
  return tokens;
}

/// Of a block: a warp for each 32 of its columns, and no fewer, as the others share the work on q and k.
inline constexpr int kMaxThreads = 128;

/// f(pointer to the type of map) for the map of a call's kernel and dtype.
template <class F>
auto with_map(const AttentionParams& p, F&& f) {
  const auto of_type = [&](auto accumulator) {
    using A = decltype(accumulator);
    if (p.kernel == KernelKind::HadamardExp) return f(static_cast<HadamardExp<A>*>(nullptr));
    if (is_squared(p.kernel)) return f(static_cast<Squared<A>*>(nullptr));
    return f(static_cast<Features<A>*>(nullptr));
  };
  return p.dtype == DType::Double ? of_type(double()) : of_type(float());
}

/// The shape with at most `columns` columns per block, and a chunk as large as possible, whose `bytes(shape)` fit into
/// shared memory; nothing if there is none. Rather than have chunks of fewer than `good_chunk` rows it takes fewer
/// columns.
template <class Bytes>
std::optional<Shape> fitting_shape(const AttentionParams& p, const Device& device, int columns, int good_chunk,
                                   Bytes&& bytes) {
  Shape s = base_shape(p);
  const auto fits = [&](int chunk) {
    s.chunk = chunk;
    s.tokens = tokens_of(p, chunk);
    return bytes(s) <= static_cast<size_t>(device.shared_memory_per_block);
  };
  for (const int least : {good_chunk, 1}) {
    for (s.columns = columns; s.columns > 0;
         s.columns = s.columns == kWarpSize ? 0 : round_up(s.columns / 2, kWarpSize)) {
      for (int chunk = kMaxChunk; chunk >= least; chunk /= 2) {
        if (fits(chunk)) return s;
      }
    }
  }
  return std::nullopt;
}

}  // namespace elattn::cuda
