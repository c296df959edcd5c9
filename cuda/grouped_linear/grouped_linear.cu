#include <algorithm>

#include "cuda/grouped_linear/grouped_linear.h"
#include "cuda/launch.cuh"
#include "cuda/recurrence/rows.cuh"

namespace elattn::cuda {
namespace {

// A block of 16 x 16 threads computes a tile of kTile x kTile; each thread kPatch x kPatch of it, kDepth terms at a
// time.
constexpr int kTile = 64, kDepth = 16, kPatch = 4, kSide = kTile / kPatch, kGroupedThreads = kSide * kSide;

/// One factor of a product: element (i, k), of which [0, size) and [0, depth) exist.
struct Factor {
  const void* data;
  int64_t offset, row, depth_stride;
  int64_t size, depth;
};

/// Rows [first, first + kTile) and terms [k, k + kDepth) to `to` (kDepth, kTile); zero outside. Neighbouring threads
/// take elements that are neighbours in memory.
template <class T, class A>
__device__ void load_factor(const Tile<A>& to, const Factor& f, int64_t first, int64_t k) {
  const bool along_depth = f.depth_stride == 1;
  for (int n = thread(); n < kTile * kDepth; n += kGroupedThreads) {
    const int i = along_depth ? n / kDepth : n % kTile, j = along_depth ? n % kDepth : n / kTile;
    A x = 0;
    if (first + i < f.size && k + j < f.depth) {
      x = Element<T>::load(static_cast<const T*>(f.data)[f.offset + (first + i) * f.row + (k + j) * f.depth_stride]);
    }
    to(j, i) = x;
  }
}

/// to(i, j) = sum_k a(i, k) b(j, k) for one tile, rows from `first_row` and columns from `first_column` on.
template <class T, class A>
__device__ void tile_product(const Factor& a, const Factor& b, const GroupedMatrix& to, int64_t offset,
                             int64_t first_row, int64_t first_column) {
  Arena arena(shared_memory());
  const Tile<A> left = arena.tile<A>(kDepth, kTile), right = arena.tile<A>(kDepth, kTile);
  const int row = thread() / kSide * kPatch, column = thread() % kSide * kPatch;
  A sum[kPatch][kPatch] = {};
  for (int64_t k = 0; k < a.depth; k += kDepth) {
    load_factor<T>(left, a, first_row, k);
    load_factor<T>(right, b, first_column, k);
    __syncthreads();
    for (int d = 0; d < kDepth; ++d) {
#pragma unroll
      for (int i = 0; i < kPatch; ++i) {
#pragma unroll
        for (int j = 0; j < kPatch; ++j) sum[i][j] += left(d, row + i) * right(d, column + j);
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < kPatch; ++i) {
#pragma unroll
    for (int j = 0; j < kPatch; ++j) {
      const int64_t r = first_row + row + i, c = first_column + column + j;
      if (r >= a.size || c >= b.size) continue;
      static_cast<T*>(to.data)[offset + r * to.row + c * to.column] = Element<T>::store(sum[i][j]);
    }
  }
}

template <class A>
size_t tile_bytes() {
  Arena arena(nullptr);
  for (int i = 0; i < 2; ++i) arena.tile<A>(kDepth, kTile);
  return arena.bytes();
}

__host__ __device__ constexpr int64_t tiles(int64_t size) { return (size + kTile - 1) / kTile; }

/// Rows [begin, end) of a group.
struct Range {
  int64_t begin, end;
};

/// Of group e, whose predecessor ends at `begin`.
__device__ Range group_rows(const GroupedParams& p, int64_t e, int64_t begin) {
  const int64_t end = p.ends[e * p.ends_stride];
  return {begin, end < begin ? begin : end > p.rows ? p.rows : end};
}

/// Block (row tile, column tile) of all groups; row tiles are numbered through the groups.
template <class T, class A>
__global__ void __launch_bounds__(kGroupedThreads, 2) grouped_linear_kernel(GroupedParams p) {
  const int64_t columns = tiles(p.out);
  int64_t tile = blockIdx.x / columns, e = 0;
  Range rows{0, 0};
  for (; e < p.groups; ++e) {
    rows = group_rows(p, e, rows.end);
    const int64_t count = tiles(rows.end - rows.begin);
    if (tile < count) break;
    tile -= count;
  }
  if (e == p.groups) return;
  const Factor a{p.x.data, rows.begin * p.x.row, p.x.row, p.x.column, rows.end - rows.begin, p.in};
  const Factor b{p.weight.data, e * p.weight_group, p.weight.row, p.weight.column, p.out, p.in};
  tile_product<T, A>(a, b, p.y, rows.begin * p.y.row, tile * kTile, blockIdx.x % columns * kTile);
}

/// Block (group, row tile, column tile) of the weights.
template <class T, class A>
__global__ void __launch_bounds__(kGroupedThreads, 2) grouped_outer_kernel(GroupedParams p) {
  const int64_t columns = tiles(p.in), per_group = tiles(p.out) * columns;
  const int64_t e = blockIdx.x / per_group, tile = blockIdx.x % per_group;
  Range rows{0, 0};
  for (int64_t i = 0; i <= e; ++i) rows = group_rows(p, i, rows.end);
  const int64_t depth = rows.end - rows.begin;
  const Factor a{p.y.data, rows.begin * p.y.row, p.y.column, p.y.row, p.out, depth};
  const Factor b{p.x.data, rows.begin * p.x.row, p.x.column, p.x.row, p.in, depth};
  tile_product<T, A>(a, b, p.weight, e * p.weight_group, tile / columns * kTile, tile % columns * kTile);
}

/// f(element type, accumulation type) for a dtype.
template <class F>
cudaError_t with_types(DType dtype, F&& f) {
  switch (dtype) {
    case DType::Double: return f(double(), double());
    case DType::BFloat16: return f(__nv_bfloat16(), float());
    case DType::Half: return f(__half(), float());
    default: return f(float(), float());
  }
}

}  // namespace

cudaError_t grouped_linear(const GroupedParams& p, cudaStream_t stream) {
  // Each group may end within a tile.
  const int64_t blocks = p.rows == 0 ? 0 : (tiles(p.rows) + p.groups) * tiles(p.out);
  if (blocks == 0) return cudaSuccess;
  return with_types(p.dtype, [&](auto element, auto sum) {
    return launch(grouped_linear_kernel<decltype(element), decltype(sum)>, dim3(static_cast<unsigned>(blocks)),
                  dim3(kGroupedThreads), tile_bytes<decltype(sum)>(), stream, p);
  });
}

cudaError_t grouped_outer(const GroupedParams& p, cudaStream_t stream) {
  const int64_t blocks = p.groups * tiles(p.out) * tiles(p.in);
  if (blocks == 0) return cudaSuccess;
  return with_types(p.dtype, [&](auto element, auto sum) {
    return launch(grouped_outer_kernel<decltype(element), decltype(sum)>, dim3(static_cast<unsigned>(blocks)),
                  dim3(kGroupedThreads), tile_bytes<decltype(sum)>(), stream, p);
  });
}

}  // namespace elattn::cuda
