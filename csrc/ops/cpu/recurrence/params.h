#pragma once

#include <functional>

#include "ops/params.h"

namespace elattn::cpu {

/// Runs f(0) .. f(parts - 1), at the same time if there are threads.
using Parallel = std::function<void(int64_t parts, const std::function<void(int64_t part)>& f)>;

/// The kernels of one instruction set. Work items are (sequence, kv head, column block) in row-major order for forward,
/// (sequence, kv head) for backward and step; any partition into ranges gives the same bits.
struct Recurrence {
  void (*forward)(const AttentionParams&, int64_t begin, int64_t end);
  /// Causal calls whose heads are each shared by several threads, for the kernels whose gauge is that of the keys alone
  /// (not the squared ones).
  void (*forward_team)(const AttentionParams&, int64_t members, const Parallel&);
  void (*backward)(const AttentionBackwardParams&, int64_t begin, int64_t end);
  void (*backward_team)(const AttentionBackwardParams&, int64_t members, const Parallel&);
  void (*step)(const AttentionParams&, int64_t begin, int64_t end);
  int64_t (*max_column_blocks)(DType, int64_t value_dim);
  /// The most threads that a backward team may have.
  int64_t (*max_members)(DType, int64_t head_dim, int64_t value_dim);
};

/// The kernels for this machine; honours ATEN_CPU_CAPABILITY.
const Recurrence& recurrence();

}  // namespace elattn::cpu
