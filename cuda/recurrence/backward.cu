#include "cuda/launch.cuh"
#include "cuda/recurrence/backward.cuh"
#include "cuda/recurrence/shape.h"

namespace elattn::cuda {
namespace {

template <class Map>
__global__ void __launch_bounds__(kMaxThreads, 2)
    query_kernel(AttentionBackwardParams p, Shape shape, Workspace<typename Map::Scalar> workspace) {
  Arena arena(shared_memory());
  QueryPass<Map>(p, shape, workspace, arena).run();
}

template <class Map>
__global__ void __launch_bounds__(kMaxThreads, 2)
    value_kernel(AttentionBackwardParams p, Shape shape, Workspace<typename Map::Scalar> workspace) {
  Arena arena(shared_memory());
  ValuePass<Map>(p, shape, workspace, arena).run();
}

template <class Map>
__global__ void __launch_bounds__(kMaxThreads, 2)
    key_kernel(AttentionBackwardParams p, Shape shape, Workspace<typename Map::Scalar> workspace) {
  Arena arena(shared_memory());
  KeyPass<Map>(p, shape, workspace, arena).run();
}

/// The sum of the parts of every column block, which are `stride` apart.
template <class A>
__device__ A sum_of_parts(const A* parts, int blocks, int64_t stride) {
  A sum = 0;
  for (int b = 0; b < blocks; ++b) sum += parts[b * stride];
  return sum;
}

/// Parts of rows (batch, head, token, dim) to a tensor. One block per 16 rows.
constexpr int kSumRows = 16;

template <class A>
__global__ void __launch_bounds__(kMaxThreads, 2) sum_rows_kernel(const A* parts, int blocks, Rows to, DType dtype,
                                                                  int64_t rows, int64_t heads, int64_t len, int dim) {
  for (int i = warp(); i < kSumRows; i += warps()) {
    const int64_t row = static_cast<int64_t>(blockIdx.x) * kSumRows + i;
    if (row >= rows) break;
    const int64_t at = row / len / heads * to.batch + row / len % heads * to.head + row % len * to.row;
    for (int d = lane(); d < dim; d += kWarpSize) {
      store_element(dtype, to.data, at + d, sum_of_parts(parts + row * dim + d, blocks, rows * dim));
    }
  }
}

template <class A>
__global__ void __launch_bounds__(kMaxThreads, 2) sum_kernel(const A* parts, int blocks, A* to, int64_t size) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * threads() + thread();
  if (i < size) to[i] = sum_of_parts(parts + i, blocks, size);
}

/// One block per (sequence, kv head).
template <class Map, class A = typename Map::Scalar>
__global__ void __launch_bounds__(kMaxThreads, 2)
    sum_normalisers_kernel(const A* parts, AttentionBackwardParams p, Shape shape) {
  A* to = state_row<A>(p.grad_state_in, blockIdx.x / p.kv_heads, blockIdx.x % p.kv_heads);
  for (int d = thread(); d < shape.rows; d += threads()) {
    const A* first = parts + static_cast<int64_t>(blockIdx.x) * shape.rows + d;
    to[Map::normaliser_in_state(shape, d)] =
        sum_of_parts(first, shape.column_blocks(), p.sequences * p.kv_heads * shape.rows);
  }
}

/// `queries` is the shape of the passes of queries and keys, which have the same column blocks. All three have the same
/// chunks.
struct Shapes {
  Shape queries, values;
};

template <class Map>
std::optional<Shapes> backward_shapes(const AttentionParams& p, const Device& device) {
  const std::optional<Shape> queries =
      fitting_shape(p, device, std::min(round_up(p.value_dim, kWarpSize), kMaxThreads), 2, [](const Shape& s) {
        return std::max(backward_bytes<Map>(s, Pass::Queries), backward_bytes<Map>(s, Pass::Keys));
      });
  if (!queries) return std::nullopt;
  Shape values = *queries;
  while (values.columns > kWarpSize &&
         (p.sequences * p.kv_heads * values.column_blocks() < device.multiprocessors ||
          backward_bytes<Map>(values, Pass::Values) > static_cast<size_t>(device.shared_memory_per_block))) {
    values.columns = round_up(values.columns / 2, kWarpSize);
  }
  return Shapes{*queries, values};
}

template <class Map, class A = typename Map::Scalar>
Workspace<A> lay_out(const AttentionBackwardParams& p, const Shape& s, WorkspaceArena& arena) {
  Workspace<A> w;
  const bool packed = p.cu_seqlens;
  const int64_t batch = packed ? 1 : p.sequences, blocks = s.column_blocks(), heads = p.sequences * p.kv_heads;
  w.query_rows = batch * p.kv_heads * p.group * p.query_len;
  w.key_rows = batch * p.kv_heads * p.key_len;
  const Segments segments(p.key_len, s.tokens, Map::kHasValueGauge);
  const int64_t ramp = std::max(segments.ramp, 0);
  w.gauge_slots = packed ? ramp + 3 : segments.count() + 2;
  const int64_t slots = packed ? p.kv_heads * packed_gauge_slots(p, s, w.gauge_slots) : heads * w.gauge_slots;
  arena.take(w.rows, w.query_rows);
  arena.take(w.delta, blocks * w.query_rows);
  arena.take(w.gauges, slots * Map::gauge_size(s));
  if (Map::kHasKeyGauge && !p.decay.data) arena.take(w.factors, heads * s.size);
  if (p.grad_decay_data) {
    arena.take(w.received, blocks * heads * s.size);
    if (p.grad_decay.channel != 0) arena.take(w.dq_total, blocks * w.key_rows * s.key_size);
  }
  if (blocks > 1) {
    arena.take(w.dq, blocks * w.query_rows * s.head_dim);
    arena.take(w.dk, blocks * w.key_rows * s.head_dim);
    if (p.grad_decay_data) {
      const bool per_token = p.grad_decay.row != 0;
      w.decay_size = (packed && per_token ? 1 : p.sequences) * p.kv_heads * (per_token ? p.key_len : 1) *
                     (p.grad_decay.channel != 0 ? p.head_dim : 1);
      arena.take(w.decay, blocks * w.decay_size);
    }
    if (p.grad_state_in.data) arena.take(w.z, blocks * heads * s.rows);
  }
  return w;
}

template <class Map, class A = typename Map::Scalar>
cudaError_t sum_parts(const AttentionBackwardParams& p, const Shape& s, const Workspace<A>& w, cudaStream_t stream) {
  const int blocks = s.column_blocks();
  const auto sum_rows = [&](const A* parts, const Rows& to, int64_t rows, int64_t heads, int64_t len) {
    if (rows == 0) return cudaSuccess;
    return launch(sum_rows_kernel<A>, grid((rows + kSumRows - 1) / kSumRows), dim3(kMaxThreads), 0, stream, parts,
                  blocks, to, p.dtype, rows, heads, len, s.head_dim);
  };
  cudaError_t error = sum_rows(w.dq, p.grad_q, w.query_rows, p.kv_heads * p.group, p.query_len);
  if (error == cudaSuccess) error = sum_rows(w.dk, p.grad_k, w.key_rows, p.kv_heads, p.key_len);
  if (error == cudaSuccess && w.decay && w.decay_size > 0) {
    error = launch(sum_kernel<A>, grid((w.decay_size + kMaxThreads - 1) / kMaxThreads), dim3(kMaxThreads), 0, stream,
                   w.decay, blocks, static_cast<A*>(p.grad_decay_data), w.decay_size);
  }
  if (error == cudaSuccess && w.z) {
    error =
        launch(sum_normalisers_kernel<Map>, grid(p.sequences * p.kv_heads), dim3(kMaxThreads), 0, stream, w.z, p, s);
  }
  return error;
}

}  // namespace

size_t backward_workspace(const AttentionBackwardParams& p, const Device& device) {
  return with_map(p, [&](auto* map) -> size_t {
    using Map = std::remove_pointer_t<decltype(map)>;
    const std::optional<Shapes> shapes = backward_shapes<Map>(p, device);
    if (!shapes) return 0;
    WorkspaceArena arena(nullptr);
    lay_out<Map>(p, shapes->queries, arena);
    return arena.bytes();
  });
}

cudaError_t backward(const AttentionBackwardParams& p, void* memory, const Device& device, cudaStream_t stream) {
  return with_map(p, [&](auto* map) {
    using Map = std::remove_pointer_t<decltype(map)>;
    const std::optional<Shapes> shapes = backward_shapes<Map>(p, device);
    const int64_t heads = p.sequences * p.kv_heads;
    if (!shapes || heads * shapes->queries.column_blocks() == 0) return cudaSuccess;
    const Shape &queries = shapes->queries, &values = shapes->values;
    WorkspaceArena arena(memory);
    const Workspace<typename Map::Scalar> w = lay_out<Map>(p, queries, arena);
    const auto run = [&](auto kernel, const Shape& shape, Pass pass) {
      return launch(kernel, grid(heads * shape.column_blocks()), dim3(kMaxThreads), backward_bytes<Map>(shape, pass),
                    stream, p, shape, w);
    };
    cudaError_t error = run(query_kernel<Map>, queries, Pass::Queries);
    if (error == cudaSuccess) error = run(value_kernel<Map>, values, Pass::Values);
    if (error == cudaSuccess) error = run(key_kernel<Map>, queries, Pass::Keys);
    if (error == cudaSuccess && queries.column_blocks() > 1) error = sum_parts<Map>(p, queries, w, stream);
    return error;
  });
}

}  // namespace elattn::cuda
