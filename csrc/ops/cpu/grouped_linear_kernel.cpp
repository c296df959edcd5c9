#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/mm.h>
#include <c10/util/SmallVector.h>
#include <c10/util/irange.h>
#include <torch/library.h>

#include <algorithm>

#include "ops/cpu/grain_size.h"
#include "ops/grouped_linear_shape.h"

/// One matrix product per group. Threads share the work evenly however the rows are spread over the groups, each with
/// products of its own: one product after the other, divided among threads, would make small groups wait for each
/// other.
namespace elattn::cpu {
namespace {

using Ends = c10::SmallVector<int64_t, 32>;

/// The ends of the groups: not decreasing, the last at `rows`.
Ends checked_ends(const char* op, const at::Tensor& offsets, int64_t rows) {
  const int32_t* data = offsets.const_data_ptr<int32_t>();
  Ends ends(offsets.size(0));
  int64_t last = 0;
  for (const auto e : c10::irange(offsets.size(0))) {
    const int64_t end = data[e * offsets.stride(0)];
    TORCH_CHECK(end >= last, op, ": offsets must not decrease, starting from 0, but offsets[", e, "] is ", end,
                " after ", last);
    ends[e] = last = end;
  }
  TORCH_CHECK(last == rows, op, ": offsets must end at the number of rows, ", rows, ", but ends at ", last);
  return ends;
}

at::Tensor grouped_linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& offsets) {
  const GroupedShape shape = grouped_linear_shape(x, weight, offsets);
  const Ends ends = checked_ends("elattn::grouped_linear", offsets, x.size(0));
  const at::Tensor out = new_grouped_linear(shape, x);
  at::parallel_for(0, x.size(0), grain_size(out.size(1) * x.size(1)), [&](int64_t begin, int64_t end) {
    at::AutoDispatchBelowADInplaceOrView guard;  // threads of the pool do not inherit the caller's
    for (int64_t e = std::upper_bound(ends.begin(), ends.end(), begin) - ends.begin(); begin < end; ++e) {
      const int64_t rows = std::min(ends[e], end) - begin;
      if (rows == 0) continue;
      at::Tensor part = out.narrow(0, begin, rows);
      at::mm_out(part, x.narrow(0, begin, rows), weight.select(0, e).t());
      begin += rows;
    }
  });
  return out;
}

at::Tensor grouped_outer(const at::Tensor& grad_out, const at::Tensor& x, const at::Tensor& offsets) {
  const GroupedShape shape = grouped_outer_shape(grad_out, x, offsets);
  const Ends ends = checked_ends("elattn::_grouped_outer", offsets, x.size(0));
  const at::Tensor grad_weight = new_grouped_outer(shape, x);
  const int64_t out = grad_out.size(1);
  for (const auto e : c10::irange(grad_weight.size(0))) {
    if (ends[e] == (e == 0 ? 0 : ends[e - 1])) grad_weight.select(0, e).zero_();
  }
  // A unit of work is one row of one column of grad_out: group e has the units from first * out to ends[e] * out, and a
  // thread takes the columns that begin in its range.
  at::parallel_for(0, x.size(0) * out, grain_size(x.size(1)), [&](int64_t begin, int64_t end) {
    at::AutoDispatchBelowADInplaceOrView guard;
    int64_t e = std::upper_bound(ends.begin(), ends.end(), begin / out) - ends.begin();
    for (int64_t first = e == 0 ? 0 : ends[e - 1]; first * out < end; first = ends[e++]) {
      const int64_t rows = ends[e] - first;
      if (rows == 0) continue;
      const auto column = [&](int64_t unit) {
        return std::clamp<int64_t>((unit - first * out + rows - 1) / rows, 0, out);
      };
      const int64_t from = column(std::max(begin, first * out)), columns = column(end) - from;
      if (columns == 0) continue;
      at::Tensor part = grad_weight.select(0, e).narrow(0, from, columns);
      at::mm_out(part, grad_out.narrow(0, first, rows).narrow(1, from, columns).t(), x.narrow(0, first, rows));
    }
  });
  return grad_weight;
}

}  // namespace

TORCH_LIBRARY_IMPL(elattn, CPU, m) {
  m.impl("grouped_linear", grouped_linear);
  m.impl("_grouped_outer", grouped_outer);
}

}  // namespace elattn::cpu
