// What the kernels of cuda_kernels.cuh share: how a block is laid out, numbers of each type, wide
// loads, and sums over a warp and a block in one order.
#pragma once

#ifndef MCN_EMULATE
#include <cuda_runtime.h>
#endif
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>

namespace mcn::cuda {
namespace {

constexpr int kWarp = 32, kWarps = 8, kThreads = kWarp * kWarps;
// A block reads 64 x 128 logits of a tile: a warp 8 rows, a lane 4 columns of each, 32 values in
// registers.
constexpr int kRows = 8, kCols = 4, kBlockRows = kWarps * kRows, kBlockCols = kWarp * kCols;
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

// n neighbours in memory, read and written 16 bytes at a time where they have as many.
template <typename T, int n>
struct alignas(sizeof(T) * n < 16 ? sizeof(T) * n : 16) Pack {
  T value[n];
};
template <int n, typename T>
__device__ __forceinline__ Pack<T, n> load(const T* from) {
  return *reinterpret_cast<const Pack<T, n>*>(from);
}
template <int n, typename T>
__device__ __forceinline__ void store(T* to, const Pack<T, n>& pack) {
  *reinterpret_cast<Pack<T, n>*>(to) = pack;
}
// The same beside a branch that stores the numbers one by one: of both, the compiler would make the
// second. Said in assembler, it stays.
template <typename T>
__device__ __forceinline__ void store_at_once(T* to, const Pack<T, 4>& pack) {
#ifdef __CUDA_ARCH__
  unsigned word[sizeof(pack) / 4];
  memcpy(word, &pack, sizeof(pack));
  auto* at = reinterpret_cast<unsigned*>(to);
  if constexpr (sizeof(pack) == 8)
    asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(at), "r"(word[0]), "r"(word[1])
                 : "memory");
  else
#pragma unroll
    for (unsigned i = 0; i < sizeof(pack) / 4; i += 4)
      asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(at + i), "r"(word[i]),
                   "r"(word[i + 1]), "r"(word[i + 2]), "r"(word[i + 3])
                   : "memory");
#else
  store(to, pack);
#endif
}

// exp in one instruction: its error is that of the logit's own last digit, and below 2^-126 it is
// 0.
__device__ __forceinline__ float exp_shifted(float x) {
#ifdef __CUDA_ARCH__
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x * 1.44269504f));
  return result;
#else
  return exp2f(x * 1.44269504f);
#endif
}
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
template <typename F>
__device__ __forceinline__ double block_reduce(double value, double* shared, F combine) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2)
    value = combine(value, __shfl_xor_sync(kAll, value, offset));
  __syncthreads();  // the values of the call before have been read
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = value;
  __syncthreads();
  if (threadIdx.x == 0)
    for (int warp = 1; warp < static_cast<int>(blockDim.x) / kWarp; ++warp)
      value = combine(value, shared[warp]);
  return value;
}
// A term's sums over a block, for thread 0.
__device__ __forceinline__ Sums block_sums(const Sums& own, double* shared) {
  const auto add = [](double a, double b) { return a + b; };
  const auto larger = [](double a, double b) { return a > b ? a : b; };
  Sums all;
  all.loss = block_reduce(own.loss, shared, add);
  all.count = block_reduce(own.count, shared, add);
  all.excess = block_reduce(own.excess, shared, add);
  all.excess_z = block_reduce(own.excess_z, shared, add);
  all.bound = block_reduce(own.bound, shared, larger);
  all.broken = block_reduce(own.broken, shared, larger);
  return all;
}

// f(k) for a lane's share of a row of d elements, n at a time.
template <int n, typename F>
__device__ __forceinline__ void for_lane(int64_t d, F f) {
  for (int64_t k = threadIdx.x % kWarp * n; k < d; k += kWarp * n) f(k);
}

__device__ __forceinline__ int64_t warp_row() {
  return static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
}

}  // namespace
}  // namespace mcn::cuda
