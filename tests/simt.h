// Enough of CUDA to run csrc/cuda.cu's kernels on a CPU, one thread after the other: the same
// source, its tiles, its shuffles and its order of merging, where no GPU is at hand. Blocks run in
// turn; each thread is a fiber that runs to its next barrier. A barrier or shuffle that only some
// threads of a warp or block reach ends in an error, not in luck.
#pragma once

#include <cuda_runtime_api.h>
#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <limits>
#include <stdexcept>
#include <utility>
#include <vector>

#undef __launch_bounds__
#define __launch_bounds__(...)
#define cudaGetLastError() cudaSuccess
#define cudaGetErrorString(error) "none"
#undef __shared__
#define __shared__ static  // one block at a time
#define __syncthreads() simt::wait(simt::kBlock, __LINE__)
#define __trap() simt::trap()
#define __threadfence()  // one thread at a time
#define atomicAdd(address, value) simt::add(address, value)
#define MCN_LAUNCH(kernel, blocks, threads, stream, ...) \
  simt::launch(blocks, threads, [&] { (kernel)(__VA_ARGS__); })

inline dim3 threadIdx, blockIdx, blockDim, gridDim;
using std::isnan;

namespace simt {

enum State { kReady, kBlock, kWarp, kDone };
struct Thread {
  ucontext_t context;  // its start; from then on jumps, which make no system call
  jmp_buf place;
  bool started;
  std::vector<char> stack = std::vector<char>(128 << 10);
  State state;
  int line;
  double value;  // what it offers in a shuffle; 8 bytes of anything
};
inline std::vector<Thread> threads;
inline ucontext_t scheduler_context;
inline jmp_buf scheduler;
inline std::function<void()> body;
inline int current;
inline bool trapped;

inline void wait(State state, int line) {
  Thread& me = threads[current];
  me.state = state, me.line = line;
  if (!_setjmp(me.place)) _longjmp(scheduler, 1);
}
inline void trap() {
  trapped = true;
  wait(kDone, 0);
}
inline void entry() {
  body();
  threads[current].state = kDone;
  _longjmp(scheduler, 1);
}
// Run the current thread until it waits or is done.
inline void resume() {
  if (_setjmp(scheduler)) return;
  Thread& me = threads[current];
  if (std::exchange(me.started, true)) _longjmp(me.place, 1);
  swapcontext(&scheduler_context, &me.context);
}

// All live threads of [begin, end) wait in `state` at one line: let them go. False if some wait
// elsewhere.
inline bool release(int begin, int end, State state) {
  int line = 0;
  for (int i = begin; i < end; ++i) {
    if (threads[i].state == kDone && state == kBlock) continue;
    if (threads[i].state != state || (line && threads[i].line != line)) return false;
    line = threads[i].line;
  }
  for (int i = begin; line && i < end; ++i)
    if (threads[i].state == state) threads[i].state = kReady;
  return line != 0;
}

inline void run_block(int n) {
  for (int i = 0; i < n; ++i) {
    Thread& thread = threads[i];
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.data();
    thread.context.uc_stack.ss_size = thread.stack.size();
    thread.context.uc_link = &scheduler_context;
    thread.state = kReady, thread.started = false;
    makecontext(&thread.context, entry, 0);
  }
  for (bool moved = true; moved;) {
    moved = false;
    // Other warps first each time: where a barrier is missing, some order shows it.
    static int pass = 0;
    const int warps = (n + 31) / 32, turn = warps & (warps - 1) ? 0 : (warps - 1 - pass++ % warps);
    for (int i = 0; i < warps; ++i) {
      const int warp = 32 * (i ^ turn);
      do {
        for (int i = warp; i < warp + 32 && i < n; ++i) {
          if (threads[i].state != kReady) continue;
          moved = true;
          current = i, threadIdx.x = i;
          resume();
          if (trapped) throw std::runtime_error("trap in a kernel");
        }
      } while (release(warp, std::min(warp + 32, n), kWarp));
    }
    moved = release(0, n, kBlock) || moved;
  }
  for (int i = 0; i < n; ++i)
    if (threads[i].state != kDone)
      throw std::runtime_error("line " + std::to_string(threads[i].line) +
                               ": not all threads reach this barrier");
}

inline void launch(dim3 blocks, unsigned n, std::function<void()> kernel) {
  if (blocks.x == 0 || blocks.y == 0 || blocks.y > 65535)
    throw std::runtime_error("invalid configuration argument");
  if (threads.size() < n) threads = std::vector<Thread>(n);
  body = std::move(kernel), trapped = false;
  gridDim = blocks, blockDim = dim3(n, 1, 1);
  for (blockIdx.y = 0; blockIdx.y < blocks.y; ++blockIdx.y)
    for (blockIdx.x = 0; blockIdx.x < blocks.x; ++blockIdx.x) run_block(static_cast<int>(n));
}

template <typename V>
V add(V* address, V value) {
  return std::exchange(*address, *address + value);
}

template <typename V>
V exchange(V value, int from, int line) {
  std::memcpy(&threads[current].value, &value, sizeof(V));
  wait(kWarp, line);
  std::memcpy(&value, &threads[from].value, sizeof(V));
  wait(kWarp, line);  // nobody offers anew before all have read
  return value;
}

}  // namespace simt

#define __shfl_xor_sync(mask, value, offset) \
  simt::exchange(value, simt::current / 32 * 32 + ((simt::current % 32) ^ (offset)), __LINE__)
inline bool simt_all(bool value) {
  for (int offset = 16; offset > 0; offset /= 2) value = __shfl_xor_sync(0, value, offset) && value;
  return value;
}
#define __all_sync(mask, value) simt_all(value)
