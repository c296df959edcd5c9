#include "ops/grouped_linear_shape.h"

#include <ATen/core/Formatting.h>
#include <ATen/ops/empty.h>
#include <c10/core/SymBool.h>

namespace elattn {
namespace {

constexpr const char* kLinear = "elattn::grouped_linear";
constexpr const char* kOuter = "elattn::_grouped_outer";

void check_first(const char* op, const char* name, const at::Tensor& tensor, const char* shape) {
  TORCH_CHECK(tensor.dim() == 2, op, ": ", name, " must have shape ", shape, " but has ", tensor.sym_sizes());
  const auto type = tensor.scalar_type();
  TORCH_CHECK(type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf, op, ": ", name,
              " must have dtype Float, Double, BFloat16 or Half but has ", type);
}

void check_second(const char* op, const char* name, const at::Tensor& tensor, int64_t dim, const char* shape,
                  const char* first_name, const at::Tensor& first) {
  TORCH_CHECK(tensor.dim() == dim, op, ": ", name, " must have shape ", shape, " but has ", tensor.sym_sizes());
  TORCH_CHECK(tensor.scalar_type() == first.scalar_type(), op, ": ", name, " has dtype ", tensor.scalar_type(), " but ",
              first_name, " has ", first.scalar_type());
  TORCH_CHECK(tensor.device() == first.device(), op, ": ", name, " is on ", tensor.device(), " but ", first_name,
              " is on ", first.device());
}

void check_offsets(const char* op, const at::Tensor& offsets, const char* first_name, const at::Tensor& first) {
  TORCH_CHECK(offsets.scalar_type() == at::kInt, op, ": offsets must have dtype Int but has ", offsets.scalar_type());
  TORCH_CHECK(offsets.dim() == 1, op, ": offsets must have shape (E,) but has ", offsets.sym_sizes());
  TORCH_CHECK(offsets.device() == first.device(), op, ": offsets is on ", offsets.device(), " but ", first_name,
              " is on ", first.device());
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
