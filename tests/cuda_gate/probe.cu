// One of each instruction that cubin.py counts. gate.py compiles it first: if the counts are not those of its table,
// the toolkit has changed its encoding, and nothing else that is counted can be believed.

#include "cuda/async_copy.cuh"
#include "cuda/mma.cuh"

namespace elattn::cuda {

__global__ void probe(float4* out, const float4* in, float* f, int* counters, int n) {
  auto* shared = reinterpret_cast<float4*>(shared_memory());
  shared[threadIdx.x] = in[threadIdx.x];  // LDG.128, STS.128
  cp_async<16>(shared + 64 + threadIdx.x, in);
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  uint32_t r[4];
  ldmatrix_x4(r, shared + threadIdx.x % 7);
  float c[4] = {};
  mma_m16n8k16<__nv_bfloat16>(c, r, r[0], r[1]);
  c[0] += __shfl_xor_sync(kFullMask, c[0], 1);
  atomicMax(counters, static_cast<int>(c[0]));                     // RED
  counters[2] = atomicExch(counters + 1, static_cast<int>(c[1]));  // ATOMG
  float local[64];
  for (int i = 0; i < 64; ++i) local[i] = f[i + 8];
  f[6] = local[n & 63];                                       // STL, LDL
  reinterpret_cast<float2*>(f)[8] = make_float2(c[2], c[3]);  // STG.64
  f[9] = static_cast<float>(fma(static_cast<double>(c[0]), static_cast<double>(c[1]), static_cast<double>(n)));  // DFMA
  out[threadIdx.x] = shared[static_cast<int>(threadIdx.x) + n];  // LDS.128, STG.128
}

}  // namespace elattn::cuda
