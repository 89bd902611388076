// Matrix products on AMX tiles (Intel SDM volume 1, chapter 18): Y^T = W X^T, so that rows of W are used as
// they lie in memory and only X is rearranged.
//
// A tile is 16 rows of 64 bytes. One instruction multiplies a tile of W (16 rows, a step of 64 bytes along K)
// with one of X (16 words of K by 16 rows of X) and adds to a 16 x 16 tile of 32-bit sums. Words hold two
// bf16 or four i8.
#pragma once

#include "../avx512_vnni/rearranged.h"

namespace bnb::BNB_TARGET {
namespace {

// Tiles 0 to 3 hold sums, 4 and 5 the low and the high rows of W, 6 and 7 the left and the right rows of X.
// The intrinsics take nothing but literals.
struct BFloat16Dot {
  static constexpr int kStep = 32;  // elements in 64 bytes
  static void low_left() { _tile_dpbf16ps(0, 4, 6); }
  static void high_left() { _tile_dpbf16ps(1, 5, 6); }
  static void low_right() { _tile_dpbf16ps(2, 4, 7); }
  static void high_right() { _tile_dpbf16ps(3, 5, 7); }
};

struct Int8Dot {
  static constexpr int kStep = 64;
  static void low_left() { _tile_dpbssd(0, 4, 6); }
  static void high_left() { _tile_dpbssd(1, 5, 6); }
  static void low_right() { _tile_dpbssd(2, 4, 7); }
  static void high_right() { _tile_dpbssd(3, 5, 7); }
};

// Tiles configured for the time of one thread's work: eight of 16 rows by 64 bytes.
class TileSession {
 public:
  TileSession() {
    alignas(64) uint8_t configuration[64] = {};
    configuration[0] = 1;  // palette
    for (int tile = 0; tile < 8; tile++) {
      configuration[16 + 2 * tile] = kTileRowBytes;
      configuration[48 + tile] = kTileSide;
    }
    // GCC 12's _tile_loadconfig does not tell that it reads 64 bytes, and the stores above would get lost.
    __asm__ volatile("" : : "m"(configuration));
    _tile_loadconfig(configuration);
  }
  ~TileSession() { _tile_release(); }
  TileSession(const TileSession&) = delete;
  TileSession& operator=(const TileSession&) = delete;
};

// Two tiles of W's rows with `columns` tiles of X's, one or two.
template <int columns>
BNB_INLINE void zero_sums() {
  _tile_zero(0);
  _tile_zero(1);
  if (columns == 2) {
    _tile_zero(2);
    _tile_zero(3);
  }
}

// Adds `steps` steps along K: the rows of W start there, those of X at `first_step`.
template <class Dot, int columns>
BNB_INLINE void add_products(const uint8_t* w, int64_t w_row_bytes, const RearrangedX& x, int64_t x_tile,
                             int64_t first_step, int64_t steps) {
  const uint8_t* low = w;
  const uint8_t* high = w + kTileSide * w_row_bytes;
  const uint32_t* left = x.tile(x_tile) + first_step * kTileWords;
  const uint32_t* right = x.tile(x_tile + columns - 1) + first_step * kTileWords;
  for (int64_t step = 0; step < steps; step++) {
    _tile_loadd(4, low + step * kTileRowBytes, w_row_bytes);
    _tile_loadd(6, left + step * kTileWords, kTileRowBytes);
    Dot::low_left();
    _tile_loadd(5, high + step * kTileRowBytes, w_row_bytes);
    Dot::high_left();
    if (columns == 2) {
      _tile_loadd(7, right + step * kTileWords, kTileRowBytes);
      Dot::low_right();
      Dot::high_right();
    }
  }
}

// sums[x row][w row] of 32-bit words, kPanelRows in a row.
template <int columns>
void store_sums(uint32_t* sums) {
  alignas(64) uint32_t tile[4][kTileWords];
  _tile_stored(0, tile[0], kTileRowBytes);
  _tile_stored(1, tile[1], kTileRowBytes);
  if (columns == 2) {
    _tile_stored(2, tile[2], kTileRowBytes);
    _tile_stored(3, tile[3], kTileRowBytes);
  }
  for (int t = 0; t < 2 * columns; t++) {
    uint32_t* target = sums + t / 2 * kTileSide * kPanelRows + t % 2 * kTileSide;
    transpose_words(tile[t], kTileSide, kTileSide, target, kPanelRows);
  }
}

// `rows` rows of X from `row` on, kPanelRows at most, with kPanelRows rows of W.
template <class Dot>
void multiply_panel(const uint8_t* w, int64_t w_row_bytes, const RearrangedX& x, int64_t row, int64_t rows,
                    uint32_t* sums) {
  const auto multiply = [&](auto tiles) {
    constexpr int columns = decltype(tiles)::value;
    zero_sums<columns>();
    add_products<Dot, columns>(w, w_row_bytes, x, row / kTileSide, 0, x.steps());
    store_sums<columns>(sums);
  };
  if (rows > kTileSide) return multiply(Constant<2>{});
  multiply(Constant<1>{});
}

// Rows of W that are multiplied with a block of X before the next one: as many as the L2 cache holds, where X
// is too large to stay in it.
int64_t rows_in_cache(const RearrangedX& x, int64_t row_bytes) {
  constexpr int64_t kCacheBytes = 5 << 18, kMostRows = 4 * kPanelRows;
  if (x.bytes() <= kCacheBytes) return kPanelRows;
  return max(kPanelRows, min(kMostRows, kCacheBytes / row_bytes / kPanelRows * kPanelRows));
}

// The M x N products of X with W, whose rows lie row_bytes apart.
// prepare(n, count, buffer) returns rows [n, n + count) of W, padded with zeros to whole panels; it may use
// the buffer. finish(part, sums) takes a part of the results, kPanelRows words in a row.
template <class Dot, class Prepare, class Finish>
void multiply_tiles(const RearrangedX& x, int64_t M, int64_t N, int64_t row_bytes, const Prepare& prepare,
                    const Finish& finish) {
  const int64_t group = rows_in_cache(x, row_bytes);
  parallel_for(ceil_div(N, group), 1, [&](int64_t begin, int64_t end) {
    const TileSession session;
    const Buffer<uint8_t> buffer(group * row_bytes);
    alignas(64) uint32_t sums[kPanelRows * kPanelRows];
    for (int64_t first = begin * group; first < min(end * group, N); first += group) {
      const int64_t count = min(N - first, group);
      const uint8_t* w = prepare(first, count, buffer.data());
      for (int64_t row = 0; row < M; row += kPanelRows) {
        const int64_t rows = min(M - row, kPanelRows);
        for (int64_t n = 0; n < count; n += kPanelRows) {
          multiply_panel<Dot>(w + n * row_bytes, row_bytes, x, row, rows, sums);
          finish(Rectangle{row, rows, first + n, min(count - n, kPanelRows)}, sums);
        }
      }
    }
  });
}

}  // namespace
}  // namespace bnb::BNB_TARGET
