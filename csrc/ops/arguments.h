#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <tuple>
#include <type_traits>

#include "ops/kernel_kind.h"

/// Between the flat argument lists of the schemas and one struct. feature_attention is attention whose kernel is
/// Features: below the schemas both have one implementation.
namespace elattn {

using OptionalTensor = std::optional<at::Tensor>;

/// The keyword arguments of attention and feature_attention.
struct AttentionArguments {
  KernelKind kernel = KernelKind::Features;
  bool is_causal = false;
  double scale = 1, eps = 0;
  bool enable_gqa = false;
  OptionalTensor key_padding_mask = {}, cu_seqlens = {}, decay = {}, state = {};
};

/// The keyword arguments of attention_step and feature_attention_step.
struct StepArguments {
  KernelKind kernel = KernelKind::Features;
  double scale = 1, eps = 0;
  bool enable_gqa = false;
  OptionalTensor decay = {}, slots = {};
};

using OutAndState = std::tuple<at::Tensor, at::Tensor>;

/// Gradients of q, k, v, decay and state.
using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

/// Gradients of phi, psi, v and state.
using FeatureGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

/// What the feature operator returns where the attention operator returns R: the same without the gradient of decay.
template <class R>
using FeatureResult = std::conditional_t<std::is_same_v<R, Gradients>, FeatureGradients, R>;

template <class R>
FeatureResult<R> to_feature_result(R result) {
  if constexpr (std::is_same_v<R, Gradients>) {
    auto& [grad_phi, grad_psi, grad_v, grad_decay, grad_state] = result;
    return {grad_phi, grad_psi, grad_v, grad_state};
  } else {
    return result;
  }
}

/// What messages call the operator.
inline const char* attention_name(KernelKind kernel) {
  return kernel == KernelKind::Features ? "elattn::feature_attention" : "elattn::attention";
}

inline const char* step_name(KernelKind kernel) {
  return kernel == KernelKind::Features ? "elattn::feature_attention_step" : "elattn::attention_step";
}

/// The kernel called `name`, or an error on behalf of `op` that lists the kernels.
KernelKind attention_kernel(const char* op, std::string_view name);

/// Same for operators on states, for which "features" is a kernel too.
KernelKind state_kernel(const char* op, std::string_view name);

/// `f(const AttentionArguments&, tensors...)` or `f(const StepArguments&, tensors...)` with the argument lists of the
/// schemas, ready to be registered.
template <auto f>
struct Unpacked;

template <class R, class... Tensors, R (*f)(const AttentionArguments&, Tensors...)>
struct Unpacked<f> {
  static R attention(Tensors... tensors, std::string_view kernel, bool is_causal, double scale, double eps,
                     bool enable_gqa, const OptionalTensor& key_padding_mask, const OptionalTensor& cu_seqlens,
                     const OptionalTensor& decay, const OptionalTensor& state) {
    return f({attention_kernel("elattn::attention", kernel), is_causal, scale, eps, enable_gqa, key_padding_mask,
              cu_seqlens, decay, state},
             tensors...);
  }

  static FeatureResult<R> feature_attention(Tensors... tensors, bool is_causal, bool enable_gqa,
                                            const OptionalTensor& key_padding_mask, const OptionalTensor& cu_seqlens,
                                            const OptionalTensor& state) {
    return to_feature_result(f({.is_causal = is_causal,
                                .enable_gqa = enable_gqa,
                                .key_padding_mask = key_padding_mask,
                                .cu_seqlens = cu_seqlens,
                                .state = state},
                               tensors...));
  }
};

template <class R, class... Tensors, R (*f)(const StepArguments&, Tensors...)>
struct Unpacked<f> {
  static R attention(Tensors... tensors, std::string_view kernel, double scale, double eps, bool enable_gqa,
                     const OptionalTensor& decay, const OptionalTensor& slots) {
    return f({attention_kernel("elattn::attention_step", kernel), scale, eps, enable_gqa, decay, slots}, tensors...);
  }

  static R feature_attention(Tensors... tensors, bool enable_gqa, const OptionalTensor& slots) {
    return f({.enable_gqa = enable_gqa, .slots = slots}, tensors...);
  }
};

/// Registers the implementations of one dispatch key for attention and feature_attention; `m` is a torch::Library.
template <auto attention, auto attention_with_state, auto attention_backward, class Library>
void implement_attention(Library& m) {
  m.impl("attention", Unpacked<attention>::attention);
  m.impl("attention_with_state", Unpacked<attention_with_state>::attention);
  m.impl("_attention_backward", Unpacked<attention_backward>::attention);
  m.impl("feature_attention", Unpacked<attention>::feature_attention);
  m.impl("feature_attention_with_state", Unpacked<attention_with_state>::feature_attention);
  m.impl("_feature_attention_backward", Unpacked<attention_backward>::feature_attention);
}

/// Calls through the dispatcher: elattn::attention, or elattn::feature_attention where the kernel is Features.
namespace dispatch {

at::Tensor attention(const AttentionArguments& arguments, const at::Tensor& q, const at::Tensor& k,
                     const at::Tensor& v);
OutAndState attention_with_state(const AttentionArguments& arguments, const at::Tensor& q, const at::Tensor& k,
                                 const at::Tensor& v);
/// For Features the gradient of decay is undefined.
Gradients attention_backward(const AttentionArguments& arguments, const at::Tensor& grad_out,
                             const OptionalTensor& grad_state, const at::Tensor& q, const at::Tensor& k,
                             const at::Tensor& v);
at::Tensor attention_step(const StepArguments& arguments, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                          const at::Tensor& state);

}  // namespace dispatch

}  // namespace elattn
