// What the kernels of cuda_kernels.cuh share: how a block is laid out, numbers of each type, and
// sums over a warp and a block in one order.
#pragma once

#ifndef MCN_EMULATE
#include <cuda_runtime.h>
#endif
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace mcn::cuda {
namespace {

constexpr int kWarp = 32, kWarps = 8, kThreads = kWarp * kWarps;
// A block reads 64 x 128 logits of a tile: a warp 8 rows, a lane 4 columns of each, 32 values in
// registers.
constexpr int kRows = 8, kCols = 4, kBlockRows = kWarps * kRows, kBlockCols = kWarp * kCols;
constexpr int kOneBlock = 1024;  // threads of the kernels that end in one number
constexpr unsigned kAll = 0xffffffffu;

__device__ __forceinline__ float number(float x) { return x; }
__device__ __forceinline__ double number(double x) { return x; }
__device__ __forceinline__ float number(__half x) { return __half2float(x); }
__device__ __forceinline__ float number(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ __forceinline__ T rounded(float x);
template <>
__device__ __forceinline__ float rounded<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __half rounded<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 rounded<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <typename T>
__device__ __forceinline__ T rounded(double x) {
  return T(x);
}

// About one hardware exponential; its error is that of the logit's own last digit.
__device__ __forceinline__ float exp_shifted(float x) { return exp2f(x * 1.44269504f); }
__device__ __forceinline__ double exp_shifted(double x) { return exp(x); }

template <typename V>
__device__ __forceinline__ V warp_sum(V value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2)
    value += __shfl_xor_sync(kAll, value, offset);
  return value;
}
template <typename V>
__device__ __forceinline__ V warp_max(V value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const V other = __shfl_xor_sync(kAll, value, offset);
    value = other > value ? other : value;
  }
  return value;
}

// Sum or largest of a block's values, for thread 0; `shared` has one place per warp.
template <typename V, typename F>
__device__ __forceinline__ V block_reduce(V value, V* shared, F combine) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2)
    value = combine(value, __shfl_xor_sync(kAll, value, offset));
  __syncthreads();
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = value;
  __syncthreads();
  if (threadIdx.x == 0)
    for (int warp = 1; warp < static_cast<int>(blockDim.x) / kWarp; ++warp)
      value = combine(value, shared[warp]);
  return value;
}

// f(k) for a lane's share of a row of d elements.
template <typename F>
__device__ __forceinline__ void for_lane(int64_t d, F f) {
  for (int64_t k = threadIdx.x % kWarp; k < d; k += kWarp) f(k);
}

__device__ __forceinline__ int64_t warp_row() {
  return static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
}

}  // namespace
}  // namespace mcn::cuda
