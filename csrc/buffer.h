// Memory of a CPU kernel: uninitialized pages, which are returned to the system at once. A heap would keep them.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <utility>

#include "native.h"

namespace patchlight {

class Buffer {
 public:
  explicit Buffer(int64_t count) : bytes_(size_t(std::max<int64_t>(count, 1)) * sizeof(float)) {
    void* pages = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    STD_TORCH_CHECK(pages != MAP_FAILED, "patchlight: no memory for ", bytes_, " bytes; use smaller batches.");
    data_ = static_cast<float*>(pages);
  }
  Buffer(Buffer&& other) noexcept : bytes_(other.bytes_), data_(std::exchange(other.data_, nullptr)) {}
  ~Buffer() {
    if (data_) munmap(data_, bytes_);
  }
  float* at(int64_t offset) const { return data_ + offset; }

 private:
  size_t bytes_;
  float* data_;
};

}  // namespace patchlight
