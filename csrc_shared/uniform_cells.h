// How many thresholds of a short codebook lie below a value, by a table of cells of equal width.
//
// At most one threshold lies in each cell if they are more than 1/15 apart. The functions have internal
// linkage: sources compiled for different instruction sets must not share one.
#pragma once

#include <cstdint>

#include "codebooks.h"

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

// For the ascending entries of a codebook.
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
