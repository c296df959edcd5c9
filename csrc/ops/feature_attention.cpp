#include "ops/feature_attention.h"

#include <torch/library.h>

#include "ops/arguments.h"

namespace elattn {
namespace {

AttentionArguments arguments(const FeatureAttentionOptions& o) {
  return {.is_causal = o.is_causal,
          .enable_gqa = o.enable_gqa,
          .key_padding_mask = o.key_padding_mask,
          .cu_seqlens = o.cu_seqlens,
          .state = o.state};
}

}  // namespace

at::Tensor feature_attention(const at::Tensor& phi, const at::Tensor& psi, const at::Tensor& v,
                             const FeatureAttentionOptions& options) {
  return dispatch::attention(arguments(options), phi, psi, v);
}

std::tuple<at::Tensor, at::Tensor> feature_attention_with_state(const at::Tensor& phi, const at::Tensor& psi,
                                                                const at::Tensor& v,
                                                                const FeatureAttentionOptions& options) {
  return dispatch::attention_with_state(arguments(options), phi, psi, v);
}

TORCH_LIBRARY_FRAGMENT(elattn, m) {
  const std::string options =
      "*, bool is_causal=False, bool enable_gqa=False, Tensor? key_padding_mask=None, Tensor? cu_seqlens=None, "
      "Tensor? state=None)";
  const auto define = [&](const std::string& inputs, const std::string& outputs) {
    m.def((inputs + options + outputs).c_str(), {at::Tag::pt2_compliant_tag});
  };
  define("feature_attention(Tensor phi, Tensor psi, Tensor v, ", " -> Tensor");
  define("feature_attention_with_state(Tensor phi, Tensor psi, Tensor v, ", " -> (Tensor, Tensor)");
  define("_feature_attention_backward(Tensor grad_out, Tensor? grad_state, Tensor phi, Tensor psi, Tensor v, ",
         " -> (Tensor grad_phi, Tensor grad_psi, Tensor grad_v, Tensor grad_state_in)");
}

}  // namespace elattn
