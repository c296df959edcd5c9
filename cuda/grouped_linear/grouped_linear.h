#pragma once

#include <driver_types.h>

#include <cstdint>

#include "ops/params.h"

/// Products of groups of rows on a GPU. No PyTorch type here.
namespace elattn::cuda {

/// A matrix with strides in elements.
struct GroupedMatrix {
  void* data = nullptr;
  int64_t row = 0, column = 0;
};

/// Group e has the rows from the end of the group before it to ends[e * ends_stride]. Whatever the ends hold, no row
/// beyond `rows` is touched.
struct GroupedParams {
  DType dtype = DType::Float;
  int64_t rows = 0, groups = 0, in = 0, out = 0;
  const int32_t* ends = nullptr;
  int64_t ends_stride = 0;
  GroupedMatrix x;           // (rows, in)
  GroupedMatrix y;           // (rows, out): the result of grouped_linear, or the gradient that arrives there
  GroupedMatrix weight;      // (out, in) of one group: the weight, or its gradient
  int64_t weight_group = 0;  // stride from group to group
};

/// y = x weight^T, group by group.
cudaError_t grouped_linear(const GroupedParams& params, cudaStream_t stream);
/// weight = y^T x, group by group; 0 for a group without rows.
cudaError_t grouped_outer(const GroupedParams& params, cudaStream_t stream);

}  // namespace elattn::cuda
