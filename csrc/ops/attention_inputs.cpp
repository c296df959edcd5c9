#include "ops/attention_inputs.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/ops/empty.h>

#include "ops/fill_params.h"

namespace elattn {

AttentionInputs::AttentionInputs(const AttentionArguments& arguments, const at::Tensor& q, const at::Tensor& k,
                                 const at::Tensor& v,
                                 const std::function<at::Tensor(const AttentionShape&)>& cu_seqlens)
    : arguments_(arguments),
      shape_(attention_shape(arguments, q, k, v)),
      q_(dense_rows(q)),
      k_(dense_rows(k)),
      v_(dense_rows(v)) {
  if (arguments.cu_seqlens) cu_seqlens_ = cu_seqlens(shape_);
  if (arguments.decay) decay_ = arguments.decay->to(accumulation_type(q));
  if (arguments.state) state_ = dense_rows(*arguments.state);
}

/// Rows of all sequences when packed, so that `batch` does not count.
Rows AttentionInputs::input_rows(const at::Tensor& tensor) const {
  Rows result = rows(tensor);
  if (packed()) result.batch = 0;
  return result;
}

void AttentionInputs::fill(AttentionParams& params) const {
  fill_sizes(params, shape_, arguments_.kernel, q_);
  params.is_causal = arguments_.is_causal;
  params.scale = arguments_.scale;
  params.eps = arguments_.eps;
  params.q = input_rows(q_);
  params.k = input_rows(k_);
  params.v = input_rows(v_);
  if (arguments_.key_padding_mask) {
    const at::Tensor& mask = *arguments_.key_padding_mask;
    params.padding = mask.const_data_ptr<bool>();
    params.padding_batch = mask.stride(0);
    params.padding_row = mask.stride(1);
  }
  if (packed()) params.cu_seqlens = cu_seqlens_.const_data_ptr<int64_t>();
  if (decay_.defined()) {
    params.decay = decay_rates(decay_);
    if (packed()) params.decay.batch = 0;
  }
  if (state_.defined()) params.state_in = state_rows(state_);
}

void AttentionInputs::forward(const at::Tensor& out, const at::Tensor& final_state,
                              const std::function<void(AttentionParams&)>& run) const {
  AttentionParams params;
  fill(params);
  params.out = input_rows(out);
  if (final_state.defined()) params.state_out = state_rows(final_state);
  run(params);
}

/// The gradient of decay before the sum over what decay was broadcast to:
/// (1 or sequences, Hkv, 1 or L, 1 or D), in the accumulation type.
at::Tensor AttentionInputs::new_partial_grad_decay(const AttentionParams& params) const {
  const int64_t dims = decay_.dim();
  const bool per_token = dims >= 3;
  const bool per_channel = dims == 2 || dims == 4;
  return at::empty({packed() && per_token ? 1 : params.sequences, params.kv_heads, per_token ? params.key_len : 1,
                    per_channel ? params.head_dim : 1},
                   decay_.options());
}

Gradients AttentionInputs::backward(const at::Tensor& grad_out_in, const OptionalTensor& grad_state_in,
                                    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                    const std::function<void(AttentionBackwardParams&)>& run) const {
  check_gradients(shape_, arguments_, q, grad_out_in, grad_state_in);
  Gradients gradients = new_gradients(shape_, arguments_, q, k, v);
  auto& [grad_q, grad_k, grad_v, grad_decay, grad_state] = gradients;

  AttentionBackwardParams params;
  fill(params);
  const at::Tensor grad_out = dense_rows(grad_out_in);
  params.grad_out = input_rows(grad_out);
  at::Tensor grad_final_state;
  if (grad_state_in) {
    grad_final_state = dense_rows(*grad_state_in);
    params.grad_state_out = state_rows(grad_final_state);
  }
  params.grad_q = input_rows(grad_q);
  params.grad_k = input_rows(grad_k);
  params.grad_v = input_rows(grad_v);
  if (state_.defined()) params.grad_state_in = state_rows(grad_state);
  at::Tensor partial;
  if (decay_.defined()) {
    partial = new_partial_grad_decay(params);
    params.grad_decay_data = partial.mutable_data_ptr();
    params.grad_decay = decay_rates(partial);
    if (decay_.dim() < 3) params.grad_decay.row = 0;
    if (decay_.dim() % 2 == 1) params.grad_decay.channel = 0;
    if (packed() && decay_.dim() >= 3) params.grad_decay.batch = 0;
  }

  run(params);

  if (decay_.defined()) {
    if (decay_.dim() < 3) partial = partial.sum(0);
    grad_decay.copy_(partial.view(decay_.sizes()));
  }
  return gradients;
}

StepInputs::StepInputs(const StepArguments& arguments, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                       const at::Tensor& state)
    : arguments_(arguments),
      shape_(attention_step_shape(arguments, q, k, v, state)),
      q_(dense_rows(q)),
      k_(dense_rows(k)),
      v_(dense_rows(v)),
      state_(state) {
  TORCH_CHECK(at::has_internal_overlap(state) != at::MemOverlap::Yes, step_name(arguments.kernel),
              ": the rows of state must not share memory; clone() makes them separate");
  out_ = new_step_output(shape_, q_);
  if (arguments.decay) decay_ = arguments.decay->to(state.scalar_type());
}

void StepInputs::fill(AttentionParams& params) const {
  fill_sizes(params, shape_, arguments_.kernel, q_);
  params.is_causal = true;
  params.scale = arguments_.scale;
  params.eps = arguments_.eps;
  params.q = rows(q_);
  params.k = rows(k_);
  params.v = rows(v_);
  params.out = rows(out_);
  if (decay_.defined()) params.decay = step_decay_rates(decay_);
  params.state_out = {state_.mutable_data_ptr(), state_.stride(0), state_.stride(1)};
  params.state_in = params.state_out;
}

}  // namespace elattn
