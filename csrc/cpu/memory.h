// Uninitialised memory of one call.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace fastsupcon::cpu {

// Aligned to a cache line. Throws std::bad_alloc.
template <class T>
class Array {
 public:
  explicit Array(std::int64_t size = 0) : data_(size ? static_cast<T*>(::operator new(std::size_t(size) * sizeof(T), kAlign)) : nullptr) {}
  T* data() const { return data_.get(); }
  T& operator[](std::int64_t index) const { return data_.get()[index]; }

 private:
  static constexpr std::align_val_t kAlign{64};
  struct Free {
    void operator()(T* p) const { ::operator delete(p, kAlign); }
  };
  std::unique_ptr<T, Free> data_;
};

}  // namespace fastsupcon::cpu
