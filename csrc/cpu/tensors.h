// What CPU kernels need of tensors beyond their arguments: memory for large outputs.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "common/arguments.h"

namespace unif2ace {

// An uninitialised contiguous tensor that may be large: where the kernel grants them, in pages of 2 MiB. With pages of
// 4 KiB the first write to fresh memory costs more in page faults than the write itself: mixing 16512 x 2048 floats
// takes 38.8 ms with small pages, 13.5 with large ones (two threads of a Zen 5).
template <size_t N>
inline Tensor empty_large(const std::array<int64_t, N>& sizes, int32_t aoti_dtype) {
  Tensor tensor = empty_cpu<N>(sizes, aoti_dtype);
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 2 << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  const uintptr_t end = begin + tensor.numel() * tensor.element_size();
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage, last = end / kPage * kPage;
  // Advice only: a kernel that refuses leaves things as they were.
  if (end - begin >= 4 * kPage) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
  return tensor;
}

}  // namespace unif2ace
