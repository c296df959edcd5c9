#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "ops/grouped_linear.h"

namespace elattn {
namespace {

/// x and weight in the autocast dtype, as torch.nn.functional.linear has them; float64 stays float64. The backward
/// needs no wrapper: autograd hands it what the forward has cast.
template <c10::DispatchKey key, c10::DeviceType device>
at::Tensor grouped_linear_autocast(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& offsets) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(key);
  const auto type = at::autocast::get_autocast_dtype(device);
  return grouped_linear(at::autocast::cached_cast(type, x, device), at::autocast::cached_cast(type, weight, device),
                        offsets);
}

}  // namespace

TORCH_LIBRARY_IMPL(elattn, AutocastCPU, m) {
  m.impl("grouped_linear", grouped_linear_autocast<c10::DispatchKey::AutocastCPU, at::kCPU>);
}

TORCH_LIBRARY_IMPL(elattn, AutocastCUDA, m) {
  m.impl("grouped_linear", grouped_linear_autocast<c10::DispatchKey::AutocastCUDA, at::kCUDA>);
}

}  // namespace elattn
