#include <torch/library.h>

#include "cuda/ops/device.h"
#include "ops/attention_inputs.h"

namespace elattn::cuda {
namespace {

at::Tensor attention_step(const StepArguments& a, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                          const at::Tensor& state) {
  const char* op = step_name(a.kernel);
  const StepInputs in(a, q, k, v, state);
  const DeviceScope scope(q);
  StepParams params;
  in.fill(params);
  if (a.slots) {
    params.device_slots = a.slots->const_data_ptr();
    params.slots_are_int32 = a.slots->scalar_type() == at::kInt;
    params.slots_stride = a.slots->stride(0);
  }
  const char* reason = unsupported_step(params, scope.device());
  TORCH_CHECK(!reason, op, ": ", reason);
  check_launch(op, step(params, scope.device(), scope.stream()));
  return in.out();
}

}  // namespace

TORCH_LIBRARY_IMPL(elattn, ELATTN_CUDA_KEY, m) {
  m.impl("attention_step", Unpacked<attention_step>::attention);
  m.impl("feature_attention_step", Unpacked<attention_step>::feature_attention);
}

}  // namespace elattn::cuda
