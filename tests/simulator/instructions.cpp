// What stops a program on a machine with AVX-512 and AMX stops it in the simulation of csrc_sim/x86, too.
#include <immintrin.h>

#include <cstdio>
#include <cstdlib>

namespace bnb {
namespace {

void configure_tiles(int rows, int row_bytes) {
  unsigned char configuration[64] = {1};
  for (int tile = 0; tile < 8; tile++) {
    configuration[16 + 2 * tile] = static_cast<unsigned char>(row_bytes);
    configuration[48 + tile] = static_cast<unsigned char>(rows);
  }
  _tile_loadconfig(configuration);
}

void run(int test) {
  alignas(64) static unsigned char memory[2048];
  switch (test) {
    case 0:  // nothing is wrong
      _mm512_store_si512(memory, _mm512_loadu_si512(memory + 1));
      configure_tiles(16, 64);
      _tile_loadd(0, memory, 64);
      _tile_stored(0, memory + 1024, 64);
      return _tile_release();
    case 1:
      return _mm512_storeu_si512(memory, _mm512_load_si512(memory + 32));
    case 2:
      return _mm512_store_si512(memory + 16, _mm512_setzero_si512());
    case 3:
      return _tile_loadd(0, memory, 64);
    case 4:
      configure_tiles(16, 64);
      _tile_release();
      return _tile_stored(7, memory, 64);
    case 5:
      return configure_tiles(17, 64);
    case 6:
      return configure_tiles(16, 66);
  }
}

}  // namespace
}  // namespace bnb

int main(int, char** arguments) {
  bnb::run(std::atoi(arguments[1]));
  std::puts("done");
}
