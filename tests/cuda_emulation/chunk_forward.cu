// Linear attention by chunks of 64 tokens on tensor cores, one block per head: small, and with all that the emulation
// has to get right at once (two-stage cp.async, ldmatrix, three kinds of mma, exchange through shared memory, tails).

#include "cuda/async_copy.cuh"
#include "cuda/launch.cuh"
#include "cuda/mma.cuh"
#include "cuda/tile.cuh"
#include "tests/cuda_emulation/chunk_forward.h"

namespace elattn::cuda::example {
namespace {

using bf16 = __nv_bfloat16;

constexpr int kChunk = 64;
constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kVector = 16 / sizeof(bf16);  // elements in 16 bytes

__device__ __forceinline__ uint32_t pack(float low, float high) {
  const __nv_bfloat162_raw raw = __floats2bfloat162_rn(low, high);
  return raw.x | static_cast<uint32_t>(raw.y) << 16;
}

/// Rows of a chunk, twice: one is multiplied while the other is loaded.
struct Storage {
  Tile<bf16> q[2], k[2], v[2];  // (tokens, size)
  Tile<float> state;            // (size, value size)
};

__host__ __device__ Storage carve(Arena& arena) {
  Storage s;
  for (int stage = 0; stage < 2; ++stage) {
    s.q[stage] = arena.tile<bf16>(kChunk, kDim);
    s.k[stage] = arena.tile<bf16>(kChunk, kDim);
    s.v[stage] = arena.tile<bf16>(kChunk, kDim);
  }
  s.state = arena.tile<float>(kDim, kDim);
  return s;
}

template <Planted kPlanted>
__device__ void load_rows(const Tile<bf16>& to, const bf16* from, int first, int length) {
  for (int i = static_cast<int>(threadIdx.x); i < kChunk * kDim / kVector; i += kThreads) {
    const int row = i / (kDim / kVector), column = i % (kDim / kVector) * kVector;
    const bool valid = first + row < length || kPlanted == Planted::kTailLoaded;
    cp_async<16>(to.at(row, column), from + (valid ? static_cast<size_t>(first + row) : 0) * kDim + column,
                 valid ? 16 : 0);
  }
}

/// Each warp has 16 rows: of the tokens for o and the scores, of the state's keys for the state. In both a lane holds
/// the accumulators of 8 blocks of 8 columns.
struct Lane {
  int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  int g = lane / 4;
  int t = lane % 4;
};

using Accumulator = float[kDim / 8][4];

/// o += q S. The features of a block of 8 are taken in the order in which the registers of q hold them.
__device__ void add_past(const Lane& l, const uint32_t (&q)[4][4], const Tile<float>& state, Accumulator& o) {
#pragma unroll
  for (int step = 0; step < kDim / 8; ++step) {
    const uint32_t upper = q[step / 2][step % 2 * 2], lower = q[step / 2][step % 2 * 2 + 1];
    const uint32_t a[4] = {upper << 16, lower << 16, upper & 0xffff0000u, lower & 0xffff0000u};
    const int row = 8 * step + 2 * l.t;
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
      mma_m16n8k8_tf32(o[n], a, __float_as_uint(state(row, 8 * n + l.g)), __float_as_uint(state(row + 1, 8 * n + l.g)));
    }
  }
}

/// o += (q k^T, of keys not after the query) v.
template <Planted kPlanted>
__device__ void add_present(const Lane& l, const uint32_t (&q)[4][4], const Tile<bf16>& k, const Tile<bf16>& v,
                            Accumulator& o) {
  for (int keys = 0; keys <= l.warp; ++keys) {
    float scores[2][4] = {};
#pragma unroll
    for (int step = 0; step < kDim / 16; ++step) {
      uint32_t b[4];
      ldmatrix_x4(b, k.at(16 * keys + l.lane / 16 * 8 + l.lane % 8, 16 * step + l.lane / 8 % 2 * 8));
      mma_m16n8k16<bf16>(scores[0], q[step], b[0], b[1]);
      mma_m16n8k16<bf16>(scores[1], q[step], b[2], b[3]);
    }
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const int row = 16 * l.warp + l.g + (kPlanted == Planted::kFragmentRow ? 4 : 8) * (e / 2 % 2);
      const int key = 16 * keys + 8 * (e / 4) + 2 * l.t + e % 2;
      if (key > row) scores[e / 4][e % 4] = 0;
    }
    const uint32_t a[4] = {pack(scores[0][0], scores[0][1]), pack(scores[0][2], scores[0][3]),
                           pack(scores[1][0], scores[1][1]), pack(scores[1][2], scores[1][3])};
#pragma unroll
    for (int n = 0; n < kDim / 16; ++n) {
      uint32_t b[4];
      ldmatrix_x4_trans(b, v.at(16 * keys + l.lane % 16, 16 * n + l.lane / 16 * 8));
      mma_m16n8k16<bf16>(o[2 * n], a, b[0], b[1]);
      mma_m16n8k16<bf16>(o[2 * n + 1], a, b[2], b[3]);
    }
  }
}

/// S += k^T v.
template <Planted kPlanted>
__device__ void add_to_state(const Lane& l, const Tile<bf16>& k, const Tile<bf16>& v, Accumulator& state) {
#pragma unroll
  for (int step = 0; step < kChunk / 16; ++step) {
    const bool swapped = kPlanted == Planted::kMatricesSwapped;
    const int row = swapped ? l.lane % 16 : l.lane / 16 * 8 + l.lane % 8;
    const int column = swapped ? l.lane / 16 * 8 : l.lane / 8 % 2 * 8;
    uint32_t a[4];
    ldmatrix_x4_trans(a, k.at(16 * step + row, 16 * l.warp + column));
#pragma unroll
    for (int n = 0; n < kDim / 16; ++n) {
      uint32_t b[4];
      ldmatrix_x4_trans(b, v.at(16 * step + l.lane % 16, 16 * n + l.lane / 16 * 8));
      mma_m16n8k16<bf16>(state[2 * n], a, b[0], b[1]);
      mma_m16n8k16<bf16>(state[2 * n + 1], a, b[2], b[3]);
    }
  }
}

/// Through the warp's own rows of `staging`, from which whole rows are stored.
template <Planted kPlanted>
__device__ void store_rows(const Lane& l, const Accumulator& o, float scale, const Tile<bf16>& staging, bf16* out,
                           int first, int length) {
  if (kPlanted != Planted::kNoSyncwarp) __syncwarp();
#pragma unroll
  for (int n = 0; n < kDim / 8; ++n) {
    for (int half = 0; half < 2; ++half) {
      bf16* pair = staging.at(16 * l.warp + l.g + 8 * half, 8 * n + 2 * l.t);
      *reinterpret_cast<uint32_t*>(pair) = pack(scale * o[n][2 * half], scale * o[n][2 * half + 1]);
    }
  }
  if (kPlanted != Planted::kNoSyncwarp) __syncwarp();
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = 16 * l.warp + 4 * i + l.lane / 8, column = l.lane % 8 * kVector, token = first + row;
    if (token < length || (kPlanted == Planted::kTailStored && token == length)) {
      *reinterpret_cast<uint4*>(out + static_cast<size_t>(token) * kDim + column) =
          *reinterpret_cast<const uint4*>(staging.at(row, column));
    }
  }
}

template <Planted kPlanted>
__global__ void __launch_bounds__(kThreads) chunk_forward_kernel(ChunkForward p) {
  Arena arena(shared_memory());
  const Storage s = carve(arena);
  const Lane l;
  const size_t head = static_cast<size_t>(blockIdx.x) * static_cast<size_t>(p.length) * kDim;
  const int chunks = (p.length + kChunk - 1) / kChunk;
  const auto load = [&](int chunk) {
    if (chunk < chunks) {
      load_rows<kPlanted>(s.q[chunk % 2], p.q + head, chunk * kChunk, p.length);
      load_rows<kPlanted>(s.k[chunk % 2], p.k + head, chunk * kChunk, p.length);
      load_rows<kPlanted>(s.v[chunk % 2], p.v + head, chunk * kChunk, p.length);
    }
    cp_async_commit();
  };

  Accumulator state = {};
  load(0);
  for (int chunk = 0; chunk < chunks; ++chunk) {
    const int stage = chunk % 2;
    load(chunk + 1);
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
      for (int e = 0; e < 4; ++e) {
        s.state(16 * l.warp + l.g + 8 * (e / 2), 8 * n + 2 * l.t + e % 2) = __uint_as_float(to_tf32(state[n][e]));
      }
    }
    cp_async_wait<kPlanted == Planted::kWaitTooWeak ? 2 : 1>();
    if (kPlanted != Planted::kNoBarrierAfterLoad) __syncthreads();

    uint32_t q[4][4];
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      ldmatrix_x4(q[step], s.q[stage].at(16 * l.warp + l.lane % 16, 16 * step + l.lane / 16 * 8));
    }
    Accumulator o = {};
    add_past(l, q, s.state, o);
    add_present<kPlanted>(l, q, s.k[stage], s.v[stage], o);
    add_to_state<kPlanted>(l, s.k[stage], s.v[stage], state);
    store_rows<kPlanted>(l, o, p.scale, s.q[stage], p.o + head, chunk * kChunk, p.length);
    if (kPlanted == Planted::kDivergentBarrier && l.warp == 3 && chunk + 1 == chunks) continue;
    if (kPlanted != Planted::kNoBarrierAtEnd) __syncthreads();
  }

  float* out = p.final_state + static_cast<size_t>(blockIdx.x) * kDim * kDim;
#pragma unroll
  for (int n = 0; n < kDim / 8; ++n) {
    for (int half = 0; half < 2; ++half) {
      *reinterpret_cast<float2*>(out + (16 * l.warp + l.g + 8 * half) * kDim + 8 * n + 2 * l.t) =
          make_float2(state[n][2 * half], state[n][2 * half + 1]);
    }
  }
  cp_async_wait<0>();
}

template <Planted kPlanted>
cudaError_t launch_planted(const ChunkForward& p) {
  Arena arena(nullptr);
  carve(arena);
  const size_t bytes = arena.bytes() - (kPlanted == Planted::kSharedTooSmall ? 1024 : 0);
  return launch(chunk_forward_kernel<kPlanted>, dim3(static_cast<unsigned>(p.heads)), dim3(kThreads), bytes, nullptr,
                p);
}

}  // namespace

cudaError_t chunk_forward(const ChunkForward& p, Planted planted) {
  switch (planted) {
    case Planted::kNothing: return launch_planted<Planted::kNothing>(p);
    case Planted::kNoBarrierAfterLoad: return launch_planted<Planted::kNoBarrierAfterLoad>(p);
    case Planted::kNoBarrierAtEnd: return launch_planted<Planted::kNoBarrierAtEnd>(p);
    case Planted::kNoSyncwarp: return launch_planted<Planted::kNoSyncwarp>(p);
    case Planted::kWaitTooWeak: return launch_planted<Planted::kWaitTooWeak>(p);
    case Planted::kFragmentRow: return launch_planted<Planted::kFragmentRow>(p);
    case Planted::kMatricesSwapped: return launch_planted<Planted::kMatricesSwapped>(p);
    case Planted::kTailStored: return launch_planted<Planted::kTailStored>(p);
    case Planted::kTailLoaded: return launch_planted<Planted::kTailLoaded>(p);
    case Planted::kDivergentBarrier: return launch_planted<Planted::kDivergentBarrier>(p);
    case Planted::kSharedTooSmall: return launch_planted<Planted::kSharedTooSmall>(p);
  }
  return cudaErrorInvalidValue;
}

}  // namespace elattn::cuda::example
