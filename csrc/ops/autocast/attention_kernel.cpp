#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "ops/arguments.h"

namespace elattn {
namespace {

/// q, k and v in the autocast dtype, as scaled_dot_product_attention has them; decay in float32. States are never cast.
/// float64 stays float64. The backward needs no wrapper: autograd hands it what the forward has cast.
template <c10::DispatchKey key, c10::DeviceType device>
struct Autocast {
  static at::Tensor input(const at::Tensor& tensor) {
    return at::autocast::cached_cast(at::autocast::get_autocast_dtype(device), tensor, device);
  }

  static AttentionArguments cast(AttentionArguments a) {
    a.decay = at::autocast::cached_cast(at::kFloat, a.decay, device);
    return a;
  }

  static at::Tensor attention(const AttentionArguments& a, const at::Tensor& q, const at::Tensor& k,
                              const at::Tensor& v) {
    c10::impl::ExcludeDispatchKeyGuard no_autocast(key);
    return dispatch::attention(cast(a), input(q), input(k), input(v));
  }

  static OutAndState attention_with_state(const AttentionArguments& a, const at::Tensor& q, const at::Tensor& k,
                                          const at::Tensor& v) {
    c10::impl::ExcludeDispatchKeyGuard no_autocast(key);
    return dispatch::attention_with_state(cast(a), input(q), input(k), input(v));
  }

  static at::Tensor attention_step(const StepArguments& a, const at::Tensor& q, const at::Tensor& k,
                                   const at::Tensor& v, const at::Tensor& state) {
    c10::impl::ExcludeDispatchKeyGuard no_autocast(key);
    StepArguments cast = a;
    cast.decay = at::autocast::cached_cast(at::kFloat, a.decay, device);
    return dispatch::attention_step(cast, input(q), input(k), input(v), state);
  }

  static void add_to(torch::Library& m) {
    m.impl("attention", Unpacked<attention>::attention);
    m.impl("attention_with_state", Unpacked<attention_with_state>::attention);
    m.impl("attention_step", Unpacked<attention_step>::attention);
    m.impl("feature_attention", Unpacked<attention>::feature_attention);
    m.impl("feature_attention_with_state", Unpacked<attention_with_state>::feature_attention);
    m.impl("feature_attention_step", Unpacked<attention_step>::feature_attention);
  }
};

}  // namespace

TORCH_LIBRARY_IMPL(elattn, AutocastCPU, m) { Autocast<c10::DispatchKey::AutocastCPU, at::kCPU>::add_to(m); }

TORCH_LIBRARY_IMPL(elattn, AutocastCUDA, m) { Autocast<c10::DispatchKey::AutocastCUDA, at::kCUDA>::add_to(m); }

}  // namespace elattn
