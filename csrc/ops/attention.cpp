#include "ops/attention.h"

#include <torch/library.h>

#include "ops/arguments.h"

namespace elattn {
namespace {

AttentionArguments arguments(const AttentionOptions& o) {
  return {attention_kernel("elattn::attention", o.kernel),
          o.is_causal,
          o.scale,
          o.eps,
          o.enable_gqa,
          o.key_padding_mask,
          o.cu_seqlens,
          o.decay,
          o.state};
}

}  // namespace

at::Tensor attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const AttentionOptions& options) {
  return dispatch::attention(arguments(options), q, k, v);
}

std::tuple<at::Tensor, at::Tensor> attention_with_state(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                                        const AttentionOptions& options) {
  return dispatch::attention_with_state(arguments(options), q, k, v);
}

TORCH_LIBRARY_FRAGMENT(elattn, m) {
  // For torch.compile `kernel` is not keyword-only, and the tag keeps Inductor from passing it by keyword all the same:
  // a parameter of Inductor's own bears that name.
  const std::string options =
      "str kernel=\"hadamard_exp\", *, bool is_causal=False, float scale=1.0, float eps=0.0, bool enable_gqa=False, "
      "Tensor? key_padding_mask=None, Tensor? cu_seqlens=None, Tensor? decay=None, Tensor? state=None)";
  const auto define = [&](const std::string& inputs, const std::string& outputs) {
    m.def((inputs + options + outputs).c_str(), {at::Tag::pt2_compliant_tag, at::Tag::needs_fixed_stride_order});
  };
  define("attention(Tensor q, Tensor k, Tensor v, ", " -> Tensor");
  define("attention_with_state(Tensor q, Tensor k, Tensor v, ", " -> (Tensor, Tensor)");
  define("_attention_backward(Tensor grad_out, Tensor? grad_state, Tensor q, Tensor k, Tensor v, ",
         " -> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_decay, Tensor grad_state_in)");
}

}  // namespace elattn
