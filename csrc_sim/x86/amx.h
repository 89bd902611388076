// AMX's tiles: matrices of up to 16 rows of 64 bytes (Intel SDM, volume 1, chapter 18). Of each thread, and
// lost where it configures none: a tile that was not configured stops the program, as on a machine.
#pragma once

#include "avx512_bf16.h"

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbssd
#undef _tile_dpbf16ps

namespace bnb {
namespace {

class Tile {
 public:
  void configure(int rows, int row_bytes) {
    if (rows > kMostRows || row_bytes > kMostBytes || row_bytes % 4 != 0) __builtin_trap();
    rows_ = rows;
    row_bytes_ = row_bytes;
    zero();
  }
  void zero() { std::memset(bytes_, 0, sizeof bytes_); }
  void load(const char* p, int64_t stride) {
    zero();
    for (int row = 0; row < rows(); row++) std::memcpy(bytes_[row], p + row * stride, row_bytes_);
  }
  void store(char* p, int64_t stride) const {
    for (int row = 0; row < rows(); row++) std::memcpy(p + row * stride, bytes_[row], row_bytes_);
  }
  int rows() const {
    if (rows_ == 0) __builtin_trap();
    return rows_;
  }
  int words() const { return row_bytes_ / 4; }
  // Of a row, as numbers of another kind.
  template <class T>
  T* row(int i) {
    return reinterpret_cast<T*>(bytes_[i]);
  }

 private:
  static constexpr int kMostRows = 16, kMostBytes = 64;

  int rows_ = 0, row_bytes_ = 0;
  alignas(64) char bytes_[kMostRows][kMostBytes];
};

thread_local Tile tiles[8];

BNB_SIMULATED void _tile_loadconfig(const void* configuration) {
  const auto* bytes = static_cast<const uint8_t*>(configuration);
  for (int i = 0; i < 8; i++) tiles[i].configure(bytes[48 + i], bytes[16 + 2 * i] | bytes[17 + 2 * i] << 8);
}
BNB_SIMULATED void _tile_release() {
  for (Tile& tile : tiles) tile.configure(0, 0);
}
BNB_SIMULATED void _tile_zero(int tile) { tiles[tile].zero(); }
BNB_SIMULATED void _tile_loadd(int tile, const void* p, int64_t stride) {
  tiles[tile].load(static_cast<const char*>(p), stride);
}
BNB_SIMULATED void _tile_stored(int tile, void* p, int64_t stride) {
  tiles[tile].store(static_cast<char*>(p), stride);
}

// sums[m][n] += the products of row m of A, four bytes at a time, with the words of column n of B.
BNB_SIMULATED void _tile_dpbssd(int sums, int a, int b) {
  Tile &S = tiles[sums], &A = tiles[a], &B = tiles[b];
  for (int m = 0; m < S.rows(); m++) {
    for (int k = 0; k < A.words(); k++) {
      const int8_t* const x = A.row<int8_t>(m) + 4 * k;
      const int8_t* const y = B.row<int8_t>(k);
      for (int n = 0; n < S.words(); n++) {
        int sum = 0;
        for (int i = 0; i < 4; i++) sum += int{x[i]} * int{y[4 * n + i]};
        S.row<uint32_t>(m)[n] += static_cast<uint32_t>(sum);
      }
    }
  }
}

// The same with words of two bf16: those in front are added up apart from those behind.
BNB_SIMULATED void _tile_dpbf16ps(int sums, int a, int b) {
  Tile &S = tiles[sums], &A = tiles[a], &B = tiles[b];
  for (int m = 0; m < S.rows(); m++) {
    float front[16] = {}, behind[16] = {};
    for (int k = 0; k < A.words(); k++) {
      const uint16_t* const x = A.row<uint16_t>(m) + 2 * k;
      const uint16_t* const y = B.row<uint16_t>(k);
      for (int n = 0; n < S.words(); n++) {
        front[n] = add_product(front[n], x[0], y[2 * n]);
        behind[n] = add_product(behind[n], x[1], y[2 * n + 1]);
      }
    }
    for (int n = 0; n < S.words(); n++) {
      float& sum = S.row<float>(m)[n];
      sum = without_subnormal(without_subnormal(sum) + without_subnormal(front[n] + behind[n]));
    }
  }
}

}  // namespace
}  // namespace bnb
