#include "cuda/grouped_linear/fma_product.cuh"
#include "cuda/grouped_linear/grouped_linear.cuh"
#include "cuda/grouped_linear/mma_product.cuh"
#include "cuda/launch.cuh"

namespace elattn::cuda {
namespace {

using namespace grouped;

/// A block for each row tile of all groups and column tile of y.
template <class Product>
__global__ void __launch_bounds__(Product::kThreads, Product::kBlocks) grouped_linear_kernel(GroupedParams p) {
  using T = typename Product::Type;
  const int64_t columns = tiles(p.out, Product::kColumns);
  const int64_t tile = blockIdx.x / columns, column = blockIdx.x % columns * Product::kColumns;
  const int64_t e = group_of<Product::kRows>(p, tile);
  if (e >= p.groups) return;
  const GroupRows rows = group_rows(p, e);
  const int64_t row = (tile - last_row_tile(e, rows.begin, Product::kRows)) * Product::kRows;
  if (row >= rows.count) return;
  Product::run(matrix<T>(p.y, rows.begin * p.y.row, rows.count, p.out),
               matrix<const T>(p.x, rows.begin * p.x.row, rows.count, p.in),
               matrix<const T>(p.weight, e * p.weight_group, p.out, p.in), row, column);
}

/// A block for each group and tile of its weight.
template <class Product>
__global__ void __launch_bounds__(Product::kThreads, Product::kBlocks) grouped_outer_kernel(GroupedParams p) {
  using T = typename Product::Type;
  const int64_t columns = tiles(p.in, Product::kColumns), per_group = tiles(p.out, Product::kRows) * columns;
  const int64_t e = blockIdx.x / per_group, tile = blockIdx.x % per_group;
  const GroupRows rows = group_rows(p, e);
  Product::run(matrix<T>(p.weight, e * p.weight_group, p.out, p.in),
               matrix<const T>(p.y, rows.begin * p.y.row, rows.count, p.out).transposed(),
               matrix<const T>(p.x, rows.begin * p.x.row, rows.count, p.in).transposed(),
               tile / columns * Product::kRows, tile % columns * Product::kColumns);
}

template <class Product>
cudaError_t launch_product(void (*kernel)(GroupedParams), int64_t blocks, const GroupedParams& p, cudaStream_t stream) {
  if (blocks == 0) return cudaSuccess;
  return launch(kernel, grid(blocks), dim3(Product::kThreads), Product::bytes(), stream, p);
}

template <class Product>
cudaError_t launch_linear(const GroupedParams& p, cudaStream_t stream) {
  const int64_t row_tiles = p.rows == 0 ? 0 : last_row_tile(p.groups, p.rows, Product::kRows);
  return launch_product<Product>(grouped_linear_kernel<Product>, row_tiles * tiles(p.out, Product::kColumns), p,
                                 stream);
}

template <class Product>
cudaError_t launch_outer(const GroupedParams& p, cudaStream_t stream) {
  const int64_t per_group = tiles(p.out, Product::kRows) * tiles(p.in, Product::kColumns);
  return launch_product<Product>(grouped_outer_kernel<Product>, p.groups * per_group, p, stream);
}

template <class T>
cudaError_t linear(const GroupedParams& p, cudaStream_t stream) {
  if constexpr (sizeof(T) == 2) {
    const Matrix<const T> x = matrix<const T>(p.x, 0, p.rows, p.in), weight = matrix<const T>(p.weight, 0, p.out, p.in);
    if (x.in_packs() && p.weight_group % Pack<T>::kSize == 0) {
      if (weight.in_packs()) return launch_linear<MmaProduct<T, Along::Depth, Along::Depth>>(p, stream);
      // The gradient of x is a product with the transposed weight.
      if (weight.transposed().in_packs()) return launch_linear<MmaProduct<T, Along::Depth, Along::Rows>>(p, stream);
    }
  }
  return launch_linear<FmaProduct<T>>(p, stream);
}

template <class T>
cudaError_t outer(const GroupedParams& p, cudaStream_t stream) {
  if constexpr (sizeof(T) == 2) {
    const Matrix<const T> x = matrix<const T>(p.x, 0, p.rows, p.in), y = matrix<const T>(p.y, 0, p.rows, p.out);
    if (x.in_packs() && y.in_packs()) return launch_outer<MmaProduct<T, Along::Rows, Along::Rows>>(p, stream);
  }
  return launch_outer<FmaProduct<T>>(p, stream);
}

}  // namespace

cudaError_t grouped_linear(const GroupedParams& p, cudaStream_t stream) {
  switch (p.dtype) {
    case DType::Double: return linear<double>(p, stream);
    case DType::BFloat16: return linear<__nv_bfloat16>(p, stream);
    case DType::Half: return linear<__half>(p, stream);
    default: return linear<float>(p, stream);
  }
}

cudaError_t grouped_outer(const GroupedParams& p, cudaStream_t stream) {
  switch (p.dtype) {
    case DType::Double: return outer<double>(p, stream);
    case DType::BFloat16: return outer<__nv_bfloat16>(p, stream);
    case DType::Half: return outer<__half>(p, stream);
    default: return outer<float>(p, stream);
  }
}

}  // namespace elattn::cuda
