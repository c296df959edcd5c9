#include "ops/grouped_linear_shape.h"

#include <ATen/core/Formatting.h>
#include <ATen/ops/empty.h>
#include <c10/core/SymBool.h>

#include "ops/checks.h"

namespace elattn {
namespace {

constexpr const char* kLinear = "elattn::grouped_linear";
constexpr const char* kOuter = "elattn::_grouped_outer";

void check_first(const char* op, const char* name, const at::Tensor& tensor, const char* shape) {
  TORCH_CHECK(tensor.dim() == 2, op, ": ", name, " must have shape ", shape, " but has ", tensor.sym_sizes());
  check_floating(op, name, tensor);
}

void check_second(const char* op, const char* name, const at::Tensor& tensor, int64_t dim, const char* shape,
                  const char* first_name, const at::Tensor& first) {
  TORCH_CHECK(tensor.dim() == dim, op, ": ", name, " must have shape ", shape, " but has ", tensor.sym_sizes());
  check_same_dtype(op, name, tensor, first_name, first);
  check_device(op, name, tensor, first_name, first);
}

void check_offsets(const char* op, const at::Tensor& offsets, const char* first_name, const at::Tensor& first) {
  TORCH_CHECK(offsets.scalar_type() == at::kInt, op, ": offsets must have dtype Int but has ", offsets.scalar_type());
  TORCH_CHECK(offsets.dim() == 1, op, ": offsets must have shape (E,) but has ", offsets.sym_sizes());
  check_device(op, "offsets", offsets, first_name, first);
}

}  // namespace

GroupedShape grouped_linear_shape(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& offsets) {
  check_first(kLinear, "x", x, "(T, in)");
  check_second(kLinear, "weight", weight, 3, "(E, out, in)", "x", x);
  check_offsets(kLinear, offsets, "x", x);
  const GroupedShape shape{
      .rows = x.sym_size(0), .groups = weight.sym_size(0), .in = x.sym_size(1), .out = weight.sym_size(1)};
  TORCH_SYM_CHECK(weight.sym_size(2).sym_eq(shape.in), kLinear, ": weight has input size ", weight.sym_size(2),
                  " but x has ", shape.in);
  TORCH_SYM_CHECK(offsets.sym_size(0).sym_eq(shape.groups), kLinear, ": offsets has ", offsets.sym_size(0),
                  " groups but weight has ", shape.groups);
  return shape;
}

GroupedShape grouped_outer_shape(const at::Tensor& grad_out, const at::Tensor& x, const at::Tensor& offsets) {
  check_first(kOuter, "grad_out", grad_out, "(T, out)");
  check_second(kOuter, "x", x, 2, "(T, in)", "grad_out", grad_out);
  check_offsets(kOuter, offsets, "grad_out", grad_out);
  const GroupedShape shape{
      .rows = x.sym_size(0), .groups = offsets.sym_size(0), .in = x.sym_size(1), .out = grad_out.sym_size(1)};
  TORCH_SYM_CHECK(grad_out.sym_size(0).sym_eq(shape.rows), kOuter, ": grad_out has ", grad_out.sym_size(0),
                  " rows but x has ", shape.rows);
  return shape;
}

at::Tensor new_grouped_linear(const GroupedShape& shape, const at::Tensor& x) {
  return at::empty_symint({shape.rows, shape.out}, x.options());
}

at::Tensor new_grouped_outer(const GroupedShape& shape, const at::Tensor& x) {
  return at::empty_symint({shape.groups, shape.out, shape.in}, x.options());
}

}  // namespace elattn
