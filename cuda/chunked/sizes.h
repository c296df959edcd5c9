#pragma once

#include <cmath>
#include <type_traits>

#include "cuda/chunked/plan.h"

/// Which calls the kernels of this folder take.
namespace elattn::cuda::chunked {

/// f(kSize, kValues) for the sizes that a call's are rounded up to.
template <class F>
auto with_sizes(const AttentionParams& p, F&& f) {
  using Small = std::integral_constant<int, 64>;
  using Large = std::integral_constant<int, kLargestDim>;
  const auto with_size = [&](auto size) { return p.value_dim <= Small::value ? f(size, Small()) : f(size, Large()); };
  return p.head_dim <= Small::value ? with_size(Small()) : with_size(Large());
}

inline bool is_aligned(const Rows& rows) {
  const auto strides = static_cast<uint64_t>(rows.batch | rows.head | rows.row) * sizeof(bf16);
  return (reinterpret_cast<uintptr_t>(rows.data) | strides) % 16 == 0;
}

inline bool has_size(int64_t dim) { return dim > 0 && dim <= kLargestDim && dim % kVector == 0; }

/// All that does not depend on the direction and the device.
inline bool can_run(const AttentionParams& p) {
  // The largest key is found before the scale is applied, so that must be positive.
  const auto scale = static_cast<float>(p.scale);
  return p.kernel == KernelKind::HadamardExp && p.dtype == DType::BFloat16 && !p.decay.data && has_size(p.head_dim) &&
         has_size(p.value_dim) && is_aligned(p.q) && is_aligned(p.k) && is_aligned(p.v) && scale > 0 &&
         std::isfinite(scale);
}

}  // namespace elattn::cuda::chunked
