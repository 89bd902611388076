// A program of small kernels: each is run by its name, and checks its own result.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdio>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

// Memory of the device for `size` numbers.
template <class T>
class Memory {
 public:
  explicit Memory(size_t size) : size_(size) {
    if (cudaMalloc(reinterpret_cast<void**>(&data_), size * sizeof(T)) != cudaSuccess)
      throw std::runtime_error("cudaMalloc");
  }
  Memory(size_t size, T value) : Memory(size) {
    for (size_t i = 0; i < size; ++i) data_[i] = value;
  }
  ~Memory() { cudaFree(data_); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  T* data() const { return data_; }
  size_t size() const { return size_; }
  T& operator[](size_t i) const { return data_[i]; }

 private:
  T* data_ = nullptr;
  size_t size_;
};

inline int thread_of_block() { return static_cast<int>(threadIdx.x); }

inline void require(bool condition, const std::string& what) {
  if (!condition) throw std::logic_error(what);
}
#define REQUIRE(condition) require(condition, #condition)

#define LAUNCH(kernel, grid, block, shared_bytes, ...)                             \
  bnb::simulate(#kernel, kernel, grid, block, shared_bytes, nullptr, __VA_ARGS__); \
  if (const cudaError_t error = cudaGetLastError())                                \
  throw std::runtime_error(std::string(#kernel ": ") + cudaGetErrorString(error))

using Cases = std::map<std::string, void (*)()>;

#define CASE(name) {#name, name}

extern const Cases kRight, kAsynchronous, kHip;   // kernels that must pass
extern const Cases kFaults, kAsynchronousFaults;  // kernels with a fault each
