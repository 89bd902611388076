// How many thresholds of a short codebook lie below a value, by a table of cells of equal width.
//
// The functions have internal linkage: sources compiled for different instruction sets must not share one.
#pragma once

#include <cstdint>

#include "formats.h"

namespace bnb {

constexpr int kUniformTable = 32;

// By the last bits of a cell's number: the threshold in it (infinite: none), and how many lie below it.
struct UniformCellTable {
  float thresholds[kUniformTable];
  int32_t below[kUniformTable];
};

namespace {

constexpr int kUniformCells = 31;
constexpr float kUniformScale = kUniformCells / 2;
// 1.5 * 2^23: the sum with it ends in the integer nearest to a value times the scale, which is the cell's
// number.
constexpr float kUniformShift = 12582912.0f;

inline int uniform_cell_of(float x) {
  return static_cast<int>(x * kUniformScale + kUniformShift - kUniformShift);
}

// Whether at most one threshold lies in each cell.
constexpr bool fits_uniform_cells(const float* ascending, int entries) {
  for (int k = 0; k + 2 < entries; k++) {
    if (midpoint(ascending, k + 1) - midpoint(ascending, k) <= 1 / kUniformScale) return false;
  }
  return true;
}

// The 4-bit encoders have no other table.
constexpr bool formats_fit_uniform_cells() {
  for (const Format4bit& format : kFormats) {
    switch (format.encoder) {
      case Encoder::nearest:
        if (!fits_uniform_cells(format.codebook, 16)) return false;
        break;
      case Encoder::sign_magnitude:
        if (!fits_uniform_cells(ascending_magnitudes(format).values, 8)) return false;
        break;
    }
  }
  return true;
}
static_assert(formats_fit_uniform_cells(), "a format's thresholds are no more than a cell apart");

// For the ascending entries of a codebook whose thresholds fit.
inline UniformCellTable uniform_cell_table(const float* ascending, int entries) {
  UniformCellTable table = {};
  int k = 0;
  for (int cell = -kUniformCells / 2; cell <= kUniformCells / 2; cell++) {
    const bool inside = k < entries - 1 && uniform_cell_of(midpoint(ascending, k)) == cell;
    table.thresholds[cell & (kUniformTable - 1)] = inside ? midpoint(ascending, k) : __builtin_inff();
    table.below[cell & (kUniformTable - 1)] = k;
    k += inside;
  }
  return table;
}

}  // namespace
}  // namespace bnb
