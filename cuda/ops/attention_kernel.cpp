#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "cuda/chunked/chunked.h"
#include "cuda/ops/device.h"
#include "ops/attention_inputs.h"

namespace elattn::cuda {
namespace {

/// The values of cu_seqlens are not checked: that would wait for the GPU.
AttentionInputs inputs(const AttentionArguments& a, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
  return {a, q, k, v, [&](const AttentionShape&) { return a.cu_seqlens->to(at::kLong).contiguous(); }};
}

void check_supported(const char* op, const AttentionParams& params, const Device& device) {
  const char* reason = unsupported(params, device);
  TORCH_CHECK(!reason, op, ": ", reason);
}

at::Tensor workspace_of(size_t bytes, const at::Tensor& like) {
  return at::empty({static_cast<int64_t>(bytes)}, like.options().dtype(at::kByte));
}

void run_forward(const AttentionArguments& a, const AttentionInputs& in, const at::Tensor& out,
                 const at::Tensor& final_state) {
  const char* op = attention_name(a.kernel);
  const DeviceScope scope(out);
  in.forward(out, final_state, [&](AttentionParams& params) {
    if (chunked::can_forward(params, scope.device())) {
      const at::Tensor workspace = workspace_of(chunked::forward_workspace(params, scope.device()), out);
      check_launch(op, chunked::forward(params, workspace.mutable_data_ptr(), scope.device(), scope.stream()));
      return;
    }
    check_supported(op, params, scope.device());
    check_launch(op, forward(params, scope.device(), scope.stream()));
  });
}

at::Tensor attention(const AttentionArguments& a, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
  const AttentionInputs in = inputs(a, q, k, v);
  const at::Tensor out = new_output(in.shape(), q);
  run_forward(a, in, out, {});
  return out;
}

OutAndState attention_with_state(const AttentionArguments& a, const at::Tensor& q, const at::Tensor& k,
                                 const at::Tensor& v) {
  const AttentionInputs in = inputs(a, q, k, v);
  const at::Tensor out = new_output(in.shape(), q);
  const at::Tensor final_state = new_final_state(in.shape(), q);
  run_forward(a, in, out, final_state);
  return {out, final_state};
}

Gradients attention_backward(const AttentionArguments& a, const at::Tensor& grad_out, const OptionalTensor& grad_state,
                             const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
  const char* op = attention_name(a.kernel);
  const DeviceScope scope(q);
  return inputs(a, q, k, v).backward(grad_out, grad_state, q, k, v, [&](AttentionBackwardParams& params) {
    if (chunked::can_backward(params, scope.device())) {
      const at::Tensor workspace = workspace_of(chunked::backward_workspace(params, scope.device()), q);
      check_launch(op, chunked::backward(params, workspace.mutable_data_ptr(), scope.device(), scope.stream()));
      return;
    }
    check_supported(op, params, scope.device());
    const at::Tensor workspace = workspace_of(backward_workspace(params, scope.device()), q);
    check_launch(op, backward(params, workspace.mutable_data_ptr(), scope.device(), scope.stream()));
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(elattn, ELATTN_CUDA_KEY, m) {
  implement_attention<attention, attention_with_state, attention_backward>(m);
}

}  // namespace elattn::cuda
