#include "ops/arguments.h"

#include <ATen/core/dispatch/Dispatcher.h>

namespace elattn {
namespace {

template <class Signature>
c10::TypedOperatorHandle<Signature> operator_handle(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

std::string kernel_list(bool with_features) {
  std::string list;
  for (std::string_view name : kKernelNames) list.append(list.empty() ? "" : ", ").append(name);
  if (with_features) list.append(", ").append(kFeaturesName);
  return list;
}

/// A pair of operators that differ in who supplies the kernel. Looked up once, on the first call.
template <auto f>
struct OperatorPair;

template <class R, class... Tensors, R (*f)(const AttentionArguments&, Tensors...)>
struct OperatorPair<f> {
  c10::TypedOperatorHandle<decltype(Unpacked<f>::attention)> attention;
  c10::TypedOperatorHandle<decltype(Unpacked<f>::feature_attention)> feature_attention;

  OperatorPair(const char* attention_name, const char* feature_name)
      : attention(operator_handle<decltype(Unpacked<f>::attention)>(attention_name)),
        feature_attention(operator_handle<decltype(Unpacked<f>::feature_attention)>(feature_name)) {}

  R operator()(const AttentionArguments& a, Tensors... tensors) const {
    if (a.kernel == KernelKind::Features) {
      auto result =
          feature_attention.call(tensors..., a.is_causal, a.enable_gqa, a.key_padding_mask, a.cu_seqlens, a.state);
      if constexpr (std::is_same_v<R, Gradients>) {
        auto& [grad_phi, grad_psi, grad_v, grad_state] = result;
        return {grad_phi, grad_psi, grad_v, at::Tensor(), grad_state};
      } else {
        return result;
      }
    }
    return attention.call(tensors..., kernel_name(a.kernel), a.is_causal, a.scale, a.eps, a.enable_gqa,
                          a.key_padding_mask, a.cu_seqlens, a.decay, a.state);
  }
};

}  // namespace

KernelKind attention_kernel(const char* op, std::string_view name) {
  const auto kind = kernel_kind(name);
  TORCH_CHECK(kind && *kind != KernelKind::Features, op, ": unknown kernel \"", name, "\"; the kernels are ",
              kernel_list(false));
  return *kind;
}

KernelKind state_kernel(const char* op, std::string_view name) {
  const auto kind = kernel_kind(name);
  TORCH_CHECK(kind, op, ": unknown kernel \"", name, "\"; the kernels are ", kernel_list(true));
  return *kind;
}

namespace dispatch {

at::Tensor attention(const AttentionArguments& a, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
  static const OperatorPair<attention> op("elattn::attention", "elattn::feature_attention");
  return op(a, q, k, v);
}

OutAndState attention_with_state(const AttentionArguments& a, const at::Tensor& q, const at::Tensor& k,
                                 const at::Tensor& v) {
  static const OperatorPair<attention_with_state> op("elattn::attention_with_state",
                                                     "elattn::feature_attention_with_state");
  return op(a, q, k, v);
}

Gradients attention_backward(const AttentionArguments& a, const at::Tensor& grad_out, const OptionalTensor& grad_state,
                             const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
  static const OperatorPair<attention_backward> op("elattn::_attention_backward",
                                                   "elattn::_feature_attention_backward");
  return op(a, grad_out, grad_state, q, k, v);
}

at::Tensor attention_step(const StepArguments& a, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                          const at::Tensor& state) {
  if (a.kernel == KernelKind::Features) {
    static const auto op =
        operator_handle<decltype(Unpacked<attention_step>::feature_attention)>("elattn::feature_attention_step");
    return op.call(q, k, v, state, a.enable_gqa, a.slots);
  }
  static const auto op = operator_handle<decltype(Unpacked<attention_step>::attention)>("elattn::attention_step");
  return op.call(q, k, v, state, kernel_name(a.kernel), a.scale, a.eps, a.enable_gqa, a.decay, a.slots);
}

}  // namespace dispatch
}  // namespace elattn
