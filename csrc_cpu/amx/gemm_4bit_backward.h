// dA = dY @ dequantized(W) for bf16 on tiles (docs/SPEC.md section 3). The sums run along N: a tile of W is
// 16 pairs of rows by 16 columns, decoded once, and dY is used in the order it has in memory.
#pragma once

#include "../avx512_bf16/decode_pairs.h"
#include "gemm_4bit.h"

namespace bnb::BNB_TARGET {
namespace {

constexpr int64_t kGroupColumns = kGroupSpans * kSpanColumns;
constexpr int64_t kStepRows = BFloat16Dot::kStep;  // of W
constexpr int64_t kDepthSteps = 8;                 // so many of two tiles of W and two of dY stay in L1
constexpr int64_t kTileBytes = kTileSide * kTileRowBytes;
constexpr int64_t kSpanStepBytes = kSpanTiles * kTileBytes;
constexpr int64_t kSumsBytes = 4 * kTileBytes;

// dY in the order of the tiles: for every 16 rows, for every step, 16 rows of 64 bytes; zeros fill them up.
class TiledRows {
 public:
  TiledRows(const BFloat16* x, int64_t rows, int64_t columns)
      : steps_(ceil_div(columns, kStepRows)),
        panels_(ceil_div(rows, kPanelRows)),
        data_(panels_ * 2 * steps_ * kTileBytes) {
    parallel_for(panels_ * 2, grain(columns * kTileSide), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin * kTileSide; row < end * kTileSide; row++) {
        uint8_t* out =
            data_.data() + (row / kTileSide * steps_ * kTileSide + row % kTileSide) * kTileRowBytes;
        for (int64_t step = 0; step < steps_; step++, out += kTileBytes) {
          const int64_t given = row < rows ? min(columns - step * kStepRows, kStepRows) : 0;
          const __mmask32 mask = static_cast<__mmask32>((uint64_t{1} << given) - 1);
          _mm512_store_si512(out, _mm512_maskz_loadu_epi16(mask, x + row * columns + step * kStepRows));
        }
      }
    });
  }

  int64_t steps() const { return steps_; }
  int64_t panels() const { return panels_; }
  const uint8_t* tile(int64_t index, int64_t step) const {
    return data_.data() + (index * steps_ + step) * kTileBytes;
  }

 private:
  int64_t steps_, panels_;
  Buffer<uint8_t> data_;
};

// Adds the products of 32 rows of dY with two tiles' columns of W to the sums of four tiles in memory.
template <bool first>
void add_steps(const TiledRows& dy, int64_t panel, int64_t first_step, int64_t steps, const uint8_t* w,
               uint8_t* sums) {
  if (first) {
    zero_sums<2>();
  } else {
    _tile_loadd(0, sums, kTileRowBytes);
    _tile_loadd(1, sums + kTileBytes, kTileRowBytes);
    _tile_loadd(2, sums + 2 * kTileBytes, kTileRowBytes);
    _tile_loadd(3, sums + 3 * kTileBytes, kTileRowBytes);
  }
  const uint8_t* low = dy.tile(2 * panel, first_step);
  const uint8_t* high = dy.tile(2 * panel + 1, first_step);
  for (int64_t step = 0; step < steps; step++, low += kTileBytes, high += kTileBytes, w += kSpanStepBytes) {
    _tile_loadd(4, low, kTileRowBytes);
    _tile_loadd(6, w, kTileRowBytes);
    BFloat16Dot::low_left();
    _tile_loadd(5, high, kTileRowBytes);
    BFloat16Dot::high_left();
    _tile_loadd(7, w + kTileBytes, kTileRowBytes);
    BFloat16Dot::low_right();
    BFloat16Dot::high_right();
  }
  _tile_stored(0, sums, kTileRowBytes);
  _tile_stored(1, sums + kTileBytes, kTileRowBytes);
  _tile_stored(2, sums + 2 * kTileBytes, kTileRowBytes);
  _tile_stored(3, sums + 3 * kTileBytes, kTileRowBytes);
}

// One group of W's columns: decoded a few steps at a time, multiplied with all of dY, and summed in memory
// that stays in L2.
class ColumnGroup {
 public:
  ColumnGroup(const TiledRows& dy, const Weight4bit& w, const float* scales)
      : dy_(dy),
        decoder_(w, scales),
        decoded_(kGroupSpans * kDepthSteps * kSpanStepBytes),
        sums_(2 * kGroupSpans * dy.panels() * kSumsBytes) {}

  void multiply(int64_t column, int64_t spans) {
    for (int64_t first_step = 0; first_step < dy_.steps(); first_step += kDepthSteps) {
      const int64_t steps = min(kDepthSteps, dy_.steps() - first_step);
      decode(column, spans, first_step, steps);
      for (int64_t pair = 0; pair < 2 * spans; pair++) {
        for (int64_t panel = 0; panel < dy_.panels(); panel++) {
          const auto add = first_step == 0 ? add_steps<true> : add_steps<false>;
          add(dy_, panel, first_step, steps, decoded(pair), sums(pair, panel));
        }
      }
    }
  }

  void finish(int64_t row, int64_t span, BFloat16* out) const {
    F32 values[kSpanTiles];
    for (int s = 0; s < kSpanTiles; s++) {
      const int64_t tile = s % 2 * 2 + row % kPanelRows / kTileSide;
      const uint8_t* p = sums(2 * span + s / 2, row / kPanelRows) + tile * kTileBytes;
      values[s] = load(reinterpret_cast<const float*>(p + row % kTileSide * kTileRowBytes));
    }
    finish_span(values, out);
  }

 private:
  void decode(int64_t column, int64_t spans, int64_t first_step, int64_t steps) {
    for (int64_t step = 0; step < steps; step++) {
      for (int64_t pair = 0; pair < kTileSide; pair++) {
        const int64_t n = (first_step + step) * kStepRows + 2 * pair;
        for (int64_t span = 0; span < spans; span++) {
          uint8_t* out = decoded(2 * span) + step * kSpanStepBytes + pair * kTileRowBytes;
          decoder_.decode(n, column + span * kSpanColumns, kTileBytes, out);
        }
      }
    }
  }

  // Two tiles of W, and the sums of their products with 32 rows of dY.
  uint8_t* decoded(int64_t pair) const {
    return decoded_.data() + pair / 2 * kDepthSteps * kSpanStepBytes + pair % 2 * 2 * kTileBytes;
  }
  uint8_t* sums(int64_t pair, int64_t panel) const {
    return sums_.data() + (pair * dy_.panels() + panel) * kSumsBytes;
  }

  const TiledRows& dy_;
  const PairDecoder decoder_;
  const Buffer<uint8_t> decoded_, sums_;
};

struct TileBackward4bit : PairsBackward4bit<TileBackward4bit> {
  static void multiply(const BFloat16* dY, int64_t M, const Weight4bit& w, const float* scales,
                       BFloat16* dA) {
    const TiledRows dy(dY, M, w.N);
    parallel_for(ceil_div(w.K, kGroupColumns), 1, [&](int64_t begin, int64_t end) {
      const TileSession session;
      ColumnGroup group(dy, w, scales);
      for (int64_t column = begin * kGroupColumns; column < min(end * kGroupColumns, w.K);
           column += kGroupColumns) {
        const int64_t spans = min(w.K - column, kGroupColumns) / kSpanColumns;
        group.multiply(column, spans);
        finish(group, M, spans, w.K, dA + column);
      }
    });
  }
};

}  // namespace
}  // namespace bnb::BNB_TARGET
