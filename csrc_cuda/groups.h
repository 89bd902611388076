// The rows of a matrix that belong to each of several weights: only the device knows how many each has.
#pragma once

#include "device.h"

namespace bnb {

// Some rows of one group.
struct GroupTile {
  int64_t group;
  int64_t first, rows;  // rows is 0 where there is no such tile
};

// The tile of that number when each group's rows are cut into tiles of so many; every lane of the warp calls
// it. Rows outside the matrix of T rows, which wrong offsets name, are left out.
__device__ inline GroupTile group_tile(const Groups& groups, int64_t T, int64_t tile, int64_t tile_rows) {
  for (int64_t base = 0; base < groups.count; base += kWarp) {
    const int64_t e = base + lane();
    int64_t begin = 0, rows = 0;
    if (e < groups.count) {
      begin = min(max(static_cast<int64_t>(groups.offsets[e]), int64_t{0}), T);
      rows = max(min(static_cast<int64_t>(groups.offsets[e + 1]), T) - begin, int64_t{0});
    }
    const int64_t tiles = ceil_div(rows, tile_rows);
    int64_t until = tiles;  // of this lane's group and those before it
    for (int distance = 1; distance < kWarp; distance *= 2) {
      const int64_t before = shuffle(until, lane() >= distance ? lane() - distance : lane());
      if (lane() >= distance) until += before;
    }
    const bool is_here = tile >= until - tiles && tile < until;
    const int lane_of_tile = warp_max(is_here ? lane() : -1);
    if (lane_of_tile >= 0) {
      const int64_t skipped = (tile - shuffle(until - tiles, lane_of_tile)) * tile_rows;
      const int64_t left = shuffle(rows, lane_of_tile) - skipped;
      return {base + lane_of_tile, shuffle(begin, lane_of_tile) + skipped, min(left, tile_rows)};
    }
    tile -= shuffle(until, kWarp - 1);
  }
  return {0, 0, 0};
}

// How many tiles there are at most, whichever rows belong to which group.
inline int64_t most_group_tiles(const Groups& groups, int64_t T, int64_t tile_rows) {
  return T / tile_rows + (groups.count < T ? groups.count : T);
}

}  // namespace bnb
