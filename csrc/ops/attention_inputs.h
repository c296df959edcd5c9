#pragma once

#include <ATen/core/Tensor.h>

#include <functional>

#include "ops/attention_shape.h"
#include "ops/params.h"

/// From the tensors of a call to what the kernels of every backend read.
namespace elattn {

/// The inputs as the kernels read them, and their owner while the kernels run.
class AttentionInputs {
 public:
  /// `cu_seqlens`: how the backend reads those of the arguments, which are given: (N + 1,) int64, contiguous.
  AttentionInputs(const AttentionArguments& arguments, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                  const std::function<at::Tensor(const AttentionShape&)>& cu_seqlens);

  const AttentionShape& shape() const { return shape_; }

  /// Everything but the results.
  void fill(AttentionParams& params) const;

  /// Runs a forward that writes `out` and, if it is defined, `final_state`.
  void forward(const at::Tensor& out, const at::Tensor& final_state,
               const std::function<void(AttentionParams&)>& run) const;

  /// Runs a backward with the gradients that arrive at the outputs, and returns those of the inputs.
  Gradients backward(const at::Tensor& grad_out, const OptionalTensor& grad_state, const at::Tensor& q,
                     const at::Tensor& k, const at::Tensor& v,
                     const std::function<void(AttentionBackwardParams&)>& run) const;

 private:
  bool packed() const { return cu_seqlens_.defined(); }
  Rows input_rows(const at::Tensor& tensor) const;
  at::Tensor new_partial_grad_decay(const AttentionParams& params) const;

  const AttentionArguments& arguments_;
  AttentionShape shape_;
  at::Tensor q_, k_, v_, cu_seqlens_, decay_, state_;
};

/// The same for attention_step and feature_attention_step; allocates the output.
class StepInputs {
 public:
  StepInputs(const StepArguments& arguments, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
             const at::Tensor& state);

  const at::Tensor& out() const { return out_; }

  /// Everything but the slots.
  void fill(AttentionParams& params) const;

 private:
  const StepArguments& arguments_;
  AttentionShape shape_;
  at::Tensor q_, k_, v_, state_, out_, decay_;
};

}  // namespace elattn
