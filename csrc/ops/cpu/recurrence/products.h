#pragma once

#include <algorithm>

#include "ops/cpu/recurrence/stream.h"
#include "ops/cpu/recurrence/vec.h"

/// The blocked recurrence (docs/math.md, section 6): rank-1 updates of a matrix S held in memory, each followed by
/// products with it.
///
///     for every token:  S <- scale * S + sum_u coefficient_u vector_u^T;   result_r = sum_row weight_r[row] * S[row]
///
/// A block of kTokens tokens and kVectors vectors of columns stays in registers while the rows of S stream past once.
/// The operations of one token on one column are the same, in the same order, whatever the block, so every way of
/// cutting the work gives the same bits.
namespace elattn::cpu {
inline namespace CPU_CAPABILITY {

/// What multiplies S before a token's update: nothing, one factor per row, or one per column.
enum class Scaling { None, Rows, Columns };

/// Numbers of every token: update or read `i` of token `t` begins at data + t * step + i * stride.
template <typename T>
struct Operand {
  T* data = nullptr;
  int64_t step = 0, stride = 0;

  T* at(int64_t t, int64_t i = 0) const { return data + t * step + i * stride; }
  /// The same operand from element `offset` on; an absent operand stays absent.
  Operand from(int64_t t, int64_t offset) const { return {data ? at(t) + offset : nullptr, step, stride}; }
};

/// With `reverse` the tokens are taken from the last to the first.
template <typename A>
struct Products {
  A* s = nullptr;  // (rows, columns)
  int64_t s_stride = 0;
  int64_t rows = 0, columns = 0;  // columns: whole vectors
  int64_t tokens = 0;
  bool reverse = false;
  int64_t updates = 0, reads = 0;   // per token
  Operand<const A> coefficients{};  // (tokens, updates, rows)
  Operand<const A> vectors{};       // (tokens, updates, columns)
  Operand<const A> weights{};       // (tokens, reads, rows)
  Operand<A> results{};             // (tokens, reads, columns)
  Scaling scaling = Scaling::None;  // of the tokens marked in `scaled`
  Operand<const A> scales{};        // (tokens, rows or columns); ones where a token is not marked
  const bool* scaled = nullptr;     // (tokens)
  Stream* stream = nullptr;         // fetched on the way; empty afterwards
};

namespace detail {

/// Tokens of a block. 3 on 2 vectors are 12 fused multiply-adds for 2 loads, 2 stores and 6 broadcasts per row of S,
/// within 16 registers.
inline constexpr int kBlockTokens = 3;

/// Operands from the first token of a block and its first column on.
template <typename A>
struct Block {
  A* s;
  int64_t s_stride, rows;
  Operand<const A> coefficients, vectors, weights, scales;
  Operand<A> results;
  Lines ahead{};  // brought into the cache on the way
};

template <typename A, int kTokens, int kUpdates, int kReads, int kVectors, Scaling kScaling>
[[gnu::always_inline]] inline void block(const Block<A>& p) {
  constexpr int kU = std::max(kUpdates, 1), kR = std::max(kReads, 1);
  using V = Vec<A>;
  V vectors[kTokens][kU][kVectors], sums[kTokens][kR][kVectors], factors[kTokens][kVectors];
  // Locals: the compiler must take a store to S for a change of anything behind a pointer.
  const A *coefficients[kTokens][kU], *weights[kTokens][kR], *scales[kTokens];
  for (int t = 0; t < kTokens; ++t) {
    scales[t] = p.scales.at(t);
    for (int u = 0; u < kUpdates; ++u) coefficients[t][u] = p.coefficients.at(t, u);
    for (int r = 0; r < kReads; ++r) weights[t][r] = p.weights.at(t, r);
    for (int j = 0; j < kVectors; ++j) {
      for (int u = 0; u < kUpdates; ++u) vectors[t][u][j] = V::loadu(p.vectors.at(t, u) + j * kLanes<A>);
      for (int r = 0; r < kReads; ++r) sums[t][r][j] = V(A(0));
      if constexpr (kScaling == Scaling::Columns) factors[t][j] = V::loadu(scales[t] + j * kLanes<A>);
    }
  }
  A* s = p.s;
  const int64_t rows = p.rows, stride = p.s_stride;
  int64_t row = 0;
  const auto one_row = [&]() __attribute__((always_inline)) {
    V x[kVectors];
    for (int j = 0; j < kVectors; ++j) x[j] = V::loadu(s + j * kLanes<A>);
    for (int t = 0; t < kTokens; ++t) {
      if constexpr (kScaling == Scaling::Rows) {
        const V factor(scales[t][row]);
        for (int j = 0; j < kVectors; ++j) x[j] = x[j] * factor;
      } else if constexpr (kScaling == Scaling::Columns) {
        for (int j = 0; j < kVectors; ++j) x[j] = x[j] * factors[t][j];
      }
      for (int u = 0; u < kUpdates; ++u) {
        const V coefficient(coefficients[t][u][row]);
        for (int j = 0; j < kVectors; ++j) x[j] = at::vec::fmadd(coefficient, vectors[t][u][j], x[j]);
      }
      for (int r = 0; r < kReads; ++r) {
        const V weight(weights[t][r][row]);
        for (int j = 0; j < kVectors; ++j) sums[t][r][j] = at::vec::fmadd(weight, x[j], sums[t][r][j]);
      }
    }
    if constexpr (kUpdates > 0 || kScaling != Scaling::None) {
      for (int j = 0; j < kVectors; ++j) x[j].store(s + j * kLanes<A>);
    }
  };
  uintptr_t line = p.ahead.first;
  const uintptr_t step = p.ahead.step;
  const int64_t lines = std::min(rows, p.ahead.count);
  for (; row < lines; ++row, s += stride, line += step) {
    __builtin_prefetch(reinterpret_cast<const void*>(line), 0, 2);
    one_row();
  }
  for (; row < rows; ++row, s += stride) one_row();
  for (int t = 0; t < kTokens; ++t) {
    for (int r = 0; r < kReads; ++r) {
      for (int j = 0; j < kVectors; ++j) sums[t][r][j].store(p.results.at(t, r) + j * kLanes<A>);
    }
  }
}

template <typename A, int kTokens, int kUpdates, int kReads, int kVectors>
void block(const Block<A>& p, Scaling scaling) {
  switch (scaling) {
    case Scaling::None: return block<A, kTokens, kUpdates, kReads, kVectors, Scaling::None>(p);
    case Scaling::Rows: return block<A, kTokens, kUpdates, kReads, kVectors, Scaling::Rows>(p);
    case Scaling::Columns: return block<A, kTokens, kUpdates, kReads, kVectors, Scaling::Columns>(p);
  }
}

/// A token with several updates or reads: query heads that share a key head.
template <typename A, int kUpdates, int kReads>
void one_token(const Block<A>& p, Scaling scaling, bool two_vectors) {
  if (two_vectors) return block<A, 1, kUpdates, kReads, 2>(p, scaling);
  block<A, 1, kUpdates, kReads, 1>(p, scaling);
}

/// The updates, then the reads of one token, in pieces of 4, 2 and 1; one of the pieces does both.
template <typename A>
void one_token(Block<A> p, int64_t updates, int64_t reads, Scaling scaling, bool two_vectors) {
  const auto piece = [](int64_t n) { return n >= 4 ? 4 : n >= 2 ? 2 : n; };
  while (updates > 1 || (updates == 1 && reads == 0)) {
    const int64_t n = piece(updates);
    if (reads == 1 && n == updates) break;
    if (n == 4) one_token<A, 4, 0>(p, scaling, two_vectors);
    if (n == 2) one_token<A, 2, 0>(p, scaling, two_vectors);
    if (n == 1) one_token<A, 1, 0>(p, scaling, two_vectors);
    p.coefficients.data = p.coefficients.at(0, n);
    p.vectors.data = p.vectors.at(0, n);
    updates -= n;
    scaling = Scaling::None;
    p.ahead.count = 0;
  }
  while (reads > 0) {
    const int64_t n = piece(reads);
    if (updates == 0) {
      if (n == 4) one_token<A, 0, 4>(p, scaling, two_vectors);
      if (n == 2) one_token<A, 0, 2>(p, scaling, two_vectors);
      if (n == 1) one_token<A, 0, 1>(p, scaling, two_vectors);
    } else if (updates == 1) {
      if (n == 4) one_token<A, 1, 4>(p, scaling, two_vectors);
      if (n == 2) one_token<A, 1, 2>(p, scaling, two_vectors);
      if (n == 1) one_token<A, 1, 1>(p, scaling, two_vectors);
    } else {
      if (updates == 4) one_token<A, 4, 1>(p, scaling, two_vectors);
      if (updates == 2) one_token<A, 2, 1>(p, scaling, two_vectors);
    }
    p.weights.data = p.weights.at(0, n);
    p.results.data = p.results.at(0, n);
    reads -= n;
    updates = 0;
    scaling = Scaling::None;
    p.ahead.count = 0;
  }
}

/// All tokens on the columns of one block.
template <typename A, int kUpdates, int kReads, int kVectors>
void all_tokens(Block<A> p, const Products<A>& all) {
  const auto advance = [&](int64_t n) {
    p.coefficients = p.coefficients.from(n, 0);
    p.vectors = p.vectors.from(n, 0);
    p.weights = p.weights.from(n, 0);
    p.results = p.results.from(n, 0);
    p.scales = p.scales.from(n, 0);
  };
  const auto prepare = [&](int64_t t, int64_t n) {
    p.ahead = all.stream->next();
    if (all.scaling == Scaling::None) return Scaling::None;
    for (int64_t i = t; i < t + n; ++i) {
      if (all.scaled[all.reverse ? all.tokens - 1 - i : i]) return all.scaling;
    }
    return Scaling::None;
  };
  int64_t t = 0;
  if (all.updates <= 1 && all.reads <= 1) {
    for (; t + kBlockTokens <= all.tokens; t += kBlockTokens, advance(kBlockTokens)) {
      block<A, kBlockTokens, kUpdates, kReads, std::min(kVectors, 2)>(p, prepare(t, kBlockTokens));
    }
    for (; t < all.tokens; ++t, advance(1)) block<A, 1, kUpdates, kReads, kVectors>(p, prepare(t, 1));
  } else {
    for (; t < all.tokens; ++t, advance(1)) {
      const Scaling scaling = prepare(t, 1);
      one_token(p, all.updates, all.reads, scaling, kVectors == 2);
    }
  }
}

}  // namespace detail

template <typename A>
void products(const Products<A>& all) {
  if (all.tokens == 0) return all.stream->clear();
  const int64_t passes = (all.columns + 2 * kLanes<A> - 1) / (2 * kLanes<A>);
  all.stream->begin(passes * all.tokens / (all.updates <= 1 && all.reads <= 1 ? detail::kBlockTokens : 1));
  const int64_t first = all.reverse ? all.tokens - 1 : 0;
  const auto from_first = [&](auto operand, int64_t column) {
    operand = operand.from(first, column);
    if (all.reverse) operand.step = -operand.step;
    return operand;
  };
  for (int64_t column = 0; column < all.columns;) {
    const bool two = column + 2 * kLanes<A> <= all.columns;
    const detail::Block<A> p{all.s + column,
                             all.s_stride,
                             all.rows,
                             from_first(all.coefficients, 0),
                             from_first(all.vectors, column),
                             from_first(all.weights, 0),
                             from_first(all.scales, all.scaling == Scaling::Columns ? column : 0),
                             from_first(all.results, column)};
    if (all.updates == 0) {
      two ? detail::all_tokens<A, 0, 1, 2>(p, all) : detail::all_tokens<A, 0, 1, 1>(p, all);
    } else if (all.reads == 0) {
      two ? detail::all_tokens<A, 1, 0, 2>(p, all) : detail::all_tokens<A, 1, 0, 1>(p, all);
    } else {
      two ? detail::all_tokens<A, 1, 1, 2>(p, all) : detail::all_tokens<A, 1, 1, 1>(p, all);
    }
    column += two ? 2 * kLanes<A> : kLanes<A>;
  }
  all.stream->clear();
}

}  // namespace CPU_CAPABILITY
}  // namespace elattn::cpu
