#include <torch/library.h>

#include "cuda/grouped_linear/grouped_linear.h"
#include "cuda/ops/device.h"
#include "ops/fill_params.h"
#include "ops/grouped_linear_shape.h"

/// The values of offsets are not checked: that would wait for the GPU.
namespace elattn::cuda {
namespace {

GroupedMatrix matrix(const at::Tensor& tensor) { return {data(tensor), tensor.stride(-2), tensor.stride(-1)}; }

GroupedParams params(const at::Tensor& x, const at::Tensor& y, const at::Tensor& weight, const at::Tensor& offsets) {
  GroupedParams p;
  p.dtype = kernel_dtype(x);
  p.rows = x.size(0);
  p.groups = weight.size(0);
  p.in = x.size(1);
  p.out = y.size(1);
  p.ends = offsets.const_data_ptr<int32_t>();
  p.ends_stride = offsets.stride(0);
  p.x = matrix(x);
  p.y = matrix(y);
  p.weight = matrix(weight);
  p.weight_group = weight.stride(0);
  return p;
}

at::Tensor linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& offsets) {
  const at::Tensor out = new_grouped_linear(grouped_linear_shape(x, weight, offsets), x);
  const DeviceScope scope(x);
  check_launch("elattn::grouped_linear", grouped_linear(params(x, out, weight, offsets), scope.stream()));
  return out;
}

at::Tensor outer(const at::Tensor& grad_out, const at::Tensor& x, const at::Tensor& offsets) {
  const at::Tensor grad_weight = new_grouped_outer(grouped_outer_shape(grad_out, x, offsets), x);
  const DeviceScope scope(x);
  check_launch("elattn::_grouped_outer", grouped_outer(params(x, grad_out, grad_weight, offsets), scope.stream()));
  return grad_weight;
}

}  // namespace

TORCH_LIBRARY_IMPL(elattn, ELATTN_CUDA_KEY, m) {
  m.impl("grouped_linear", linear);
  m.impl("_grouped_outer", outer);
}

}  // namespace elattn::cuda
