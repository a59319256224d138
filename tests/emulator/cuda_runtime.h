// CUDA kernels on a CPU, to prove what they compute where there is no GPU. This file stands in for <cuda_runtime.h>:
// with tests/emulator first in the include path, a .cu compiles as plain C++ (emulated.cpp) and its launches run here.
//
// Every thread of a block is a fiber with a stack of its own. A fiber runs until it waits for others: at a barrier of
// its warp, of its block or of the grid. Blocks run one after the other, up to a barrier of the grid. So the emulator
// proves results, the pairing of barriers (a wait that never ends, or lanes of a warp that meet in different
// operations, ends the process) and the bounds of dynamic shared memory, which starts as NaN. It proves nothing about
// speed and little about memory ordering; running the fibers in reverse order (`emulator_setup`) shows many missing
// barriers.
//
// Left out: warp operations by less than 32 lanes, static shared memory across barriers of the grid, streams.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __shared__ static
#define __launch_bounds__(...)
#define UNIF2ACE_DYNAMIC_SHARED(name) unsigned char* name = emulator::current->block->shared.data()

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;  // of the running fiber

namespace emulator {

inline int multiprocessors = 2, launches = 0;
inline bool reversed = false;
inline long events = 0;  // of any kind: when nothing happens any more, somebody waits in vain
constexpr size_t kStack = 128 << 10, kGuard = 64;

[[noreturn]] inline void fail(const char* message) {
  std::fprintf(stderr, "CUDA emulator: %s\n", message);
  std::abort();
}

struct Barrier {
  int size = 0, arrived = 0, tag = 0;
  long generation = 0;
};

struct Warp {
  Barrier barrier;
  uint64_t slots[32];
};

struct Block {
  dim3 index;
  Barrier barrier;
  std::vector<Warp> warps;
  std::vector<unsigned char> shared;
  int votes = 0;
};

struct Thread {
  ucontext_t context;
  dim3 index;
  Block* block;
  Warp* warp;
  bool done = false;
  std::unique_ptr<char[]> stack;
};

inline Thread* current;
inline ucontext_t scheduler;
inline Barrier grid_barrier;
inline const std::function<void()>* body;

// Until all have arrived. All have to come with the same tag: the operation they believe to be in.
inline void wait(Barrier& barrier, int tag) {
  if (barrier.arrived > 0 && barrier.tag != tag) fail("threads of one warp are in different operations");
  barrier.tag = tag;
  const long generation = barrier.generation;
  ++events;
  if (++barrier.arrived == barrier.size) {
    barrier.arrived = 0;
    ++barrier.generation;
  } else {
    while (barrier.generation == generation) swapcontext(&current->context, &scheduler);
  }
}

inline int lane() {
  return static_cast<int>(current->index.x % 32);
}

// Every lane gives a value and reads that of lane `source(slots)`, or whatever it makes of all of them.
template <class T, class Read>
auto exchange(unsigned mask, int tag, T value, Read read) {
  if (mask != 0xffffffffu) fail("warp operations are emulated for full warps only");
  Warp& warp = *current->warp;
  std::memcpy(&warp.slots[lane()], &value, sizeof value);
  wait(warp.barrier, tag);
  const auto result = read([&](int from) {
    T other;
    std::memcpy(&other, &warp.slots[from], sizeof other);
    return other;
  });
  wait(warp.barrier, tag);
  return result;
}

inline void run_thread() {
  (*body)();
  current->done = true;
  ++events;
  swapcontext(&current->context, &scheduler);
}

inline void run(dim3 grid, dim3 block_dim, size_t shared_bytes, const std::function<void()>& kernel) {
  if (block_dim.x % 32 != 0 || block_dim.y * block_dim.z * grid.y * grid.z != 1)
    fail("only whole warps in one dimension");
  gridDim = grid, blockDim = block_dim, body = &kernel;
  grid_barrier = {static_cast<int>(grid.x * block_dim.x)};
  std::vector<Block> blocks(grid.x);
  std::vector<std::vector<Thread>> threads(grid.x);
  const auto unfinished = [&](unsigned b) {
    return threads[b].empty() || std::any_of(threads[b].begin(), threads[b].end(), [](auto& t) { return !t.done; });
  };
  for (long before = -1; before != events;) {
    before = events;
    for (unsigned b = 0; b < grid.x; ++b) {
      if (!unfinished(b)) continue;
      if (threads[b].empty()) {
        Block& block = blocks[b];
        block.index = dim3(b);
        block.barrier.size = block_dim.x;
        block.warps.resize(block_dim.x / 32);
        for (Warp& warp : block.warps) warp.barrier.size = 32;
        block.shared.assign(shared_bytes + kGuard, 0xff);
        threads[b].resize(block_dim.x);
        for (unsigned t = 0; t < block_dim.x; ++t) {
          Thread& thread = threads[b][t];
          thread.index = dim3(t), thread.block = &block, thread.warp = &block.warps[t / 32];
          thread.stack = std::make_unique<char[]>(kStack);
          getcontext(&thread.context);
          thread.context.uc_stack.ss_sp = thread.stack.get();
          thread.context.uc_stack.ss_size = kStack;
          makecontext(&thread.context, run_thread, 0);
        }
      }
      for (long last = -1; last != events;) {
        last = events;
        for (unsigned i = 0; i < block_dim.x; ++i) {
          current = &threads[b][reversed ? block_dim.x - 1 - i : i];
          threadIdx = current->index, blockIdx = current->block->index;
          if (!current->done) swapcontext(&scheduler, &current->context);
        }
      }
      if (unfinished(b)) continue;
      for (Thread& thread : threads[b]) thread.stack.reset();
      const auto& shared = blocks[b].shared;
      if (std::any_of(shared.end() - kGuard, shared.end(), [](unsigned char x) { return x != 0xff; }))
        fail("a kernel wrote beyond its dynamic shared memory");
    }
  }
  for (unsigned b = 0; b < grid.x; ++b)
    if (unfinished(b)) fail("deadlock: some threads wait for others that never come");
}

}  // namespace emulator

inline void __syncthreads() {
  emulator::wait(emulator::current->block->barrier, 0);
}
inline int __syncthreads_count(int predicate) {
  emulator::Block& block = *emulator::current->block;
  block.votes += predicate != 0;
  emulator::wait(block.barrier, 7);
  const int votes = block.votes;
  emulator::wait(block.barrier, 7);
  block.votes = 0;
  emulator::wait(block.barrier, 7);
  return votes;
}
inline void __syncwarp(unsigned = 0xffffffff) {
  emulator::wait(emulator::current->warp->barrier, 1);
}
inline int __popc(unsigned x) {
  return __builtin_popcount(x);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int from, int width = 32) {
  const int source = (emulator::lane() & ~(width - 1)) + (from & (width - 1));
  return emulator::exchange(mask, 2, value, [&](auto read) { return read(source); });
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
  return emulator::exchange(mask, 3, value, [&](auto read) { return read(emulator::lane() ^ bits); });
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, int by) {
  const int source = emulator::lane() - by;
  return emulator::exchange(mask, 4, value, [&](auto read) { return source < 0 ? value : read(source); });
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, int by) {
  const int source = emulator::lane() + by;
  return emulator::exchange(mask, 5, value, [&](auto read) { return source > 31 ? value : read(source); });
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return emulator::exchange(mask, 6, predicate, [](auto read) {
    unsigned bits = 0;
    for (int from = 0; from < 32; ++from) bits |= read(from) != 0 ? 1u << from : 0u;
    return bits;
  });
}

template <class T>
T atomicAdd(T* at, T value) {
  return std::exchange(*at, *at + value);
}
template <class T>
T atomicOr(T* at, T value) {
  return std::exchange(*at, *at | value);
}
template <class T>
T atomicMin(T* at, T value) {
  return std::exchange(*at, std::min(*at, value));
}

// ------------------------------------------------------------------------------------------------ the runtime library

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
enum cudaMemcpyKind { cudaMemcpyDeviceToHost };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrL2CacheSize };
enum cudaLaunchAttributeID { cudaLaunchAttributeCooperative };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int cooperative;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

inline const char* cudaGetErrorString(cudaError_t) {
  return "no error";
}
inline cudaError_t cudaGetLastError() {
  return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) {
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  return *value = which == cudaDevAttrL2CacheSize ? 1 << 17 : emulator::multiprocessors, cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  return std::memset(to, value, bytes), cudaSuccess;
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) {
  return *blocks = 1, cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  return std::memcpy(to, from, bytes), cudaSuccess;
}
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), const Arguments&... a) {
  ++emulator::launches;
  emulator::run(config->gridDim, config->blockDim, config->dynamicSmemBytes, [&] { kernel(a...); });
  return cudaSuccess;
}
