// Products by Hopper's warpgroups: 64 rows from registers times 128 columns from shared memory (PTX ISA,
// wgmma.mma_async).
//
// With g = lane / 4 and t = lane % 4, a lane of the warpgroup's warp w holds of A[64, 16] rows 16w + g and
// 16w + g + 8: in a[0] and a[1] their elements 2t and 2t + 1, in a[2] and a[3] elements 2t + 8 and 2t + 9;
// and of C[64, 128] in c[4j + 2i + h] row 16w + g + 8i, column 8j + 2t + h.
#pragma once

#include "device_limits.h"
#include "mma.h"

namespace bnb {

constexpr int kWarpgroup = 128;  // threads
constexpr int kWgmmaRows = 64;
constexpr int kWgmmaColumns = 128;
constexpr int kWgmmaDepth = 16;
constexpr int kWgmmaSums = kWgmmaRows * kWgmmaColumns / kWarpgroup;  // of a thread

// Whether the current device has these instructions and this build contains them; the simulator does what
// they do.
inline bool has_wgmma() {
#if defined(BNB_SIMULATED)
  return kBuiltForHopper;
#else
  return kBuiltForHopper && device_limits().compute_capability == 90;
#endif
}

// The second operand: rows of 128 bytes in shared memory, each a column of the product, from an address that
// is a multiple of 1024 on. Its pieces of 16 bytes are swizzled: place_of_piece() tells where each lies.
class SwizzledRows {
 public:
  static constexpr int kBytes = 128;  // of a row
  static constexpr int kPiece = 16;
  static constexpr int kPieces = kBytes / kPiece;
  static constexpr int kAlignment = 1024;

  __device__ static int place_of_piece(int row, int piece) {
    return row * kBytes + (piece ^ row % 8) * kPiece;
  }

  explicit __device__ SwizzledRows(const unsigned char* shared) : shared_(shared) {}

  // Further rows, and further elements of the same ones.
  __device__ SwizzledRows from(int row, int byte) const {
    return SwizzledRows(shared_ + row * kBytes + byte);
  }

#if defined(BNB_HOPPER)
  // The matrix descriptor: rows in groups of 8, 1024 bytes apart, along K, swizzled in 128 bytes.
  __device__ uint64_t descriptor() const {
    const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared_));
    constexpr uint64_t kGroupBytes = 8 * kBytes, kSwizzled128 = 1;
    return (address & 0x3ffff) >> 4 | uint64_t{1} << 16 | kGroupBytes >> 4 << 32 | kSwizzled128 << 62;
  }
#elif defined(BNB_SIMULATED)
  // Two neighbouring elements of a row, found as the device does: it flips bits of the address.
  __device__ uint32_t pair(int row, int byte) const {
    const auto* memory = dynamic_shared<unsigned char>();
    const auto place = static_cast<uint32_t>(shared_ - memory + row * kBytes + byte);
    uint32_t pair;
    memcpy(&pair, memory + (place ^ (place >> 7 & 7) << 4), sizeof(pair));
    return pair;
  }
#endif

 private:
  const unsigned char* shared_;
};

// What was written to shared memory before is what products read, after the barrier that follows.
__device__ inline void show_to_wgmma() {
#if defined(BNB_HOPPER)
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// Registers written before are what the products that follow read and add to. Those of their first operand
// are named, or the compiler might compute them only after the fence.
template <int products>
__device__ inline void wgmma_fence([[maybe_unused]] uint32_t (&a)[products][4]) {
#if defined(BNB_HOPPER)
#pragma unroll
  for (int i = 0; i < products; i++)
    asm volatile("" : "+r"(a[i][0]), "+r"(a[i][1]), "+r"(a[i][2]), "+r"(a[i][3])::"memory");
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

// Makes a group of the products that were started since the last one.
__device__ inline void wgmma_commit() {
#if defined(BNB_HOPPER)
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#elif defined(BNB_SIMULATED)
  simulator::commit(simulator::Unit::products);
#endif
}

// Waits until all groups but the last `pending` are done. Until then nobody writes what they read, and nobody
// touches their sums.
template <int pending>
__device__ inline void wgmma_wait() {
#if defined(BNB_HOPPER)
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
#elif defined(BNB_SIMULATED)
  simulator::wait(simulator::Unit::products, pending);
#endif
}

#if defined(BNB_SIMULATED)
template <class T>
void wgmma_by_shuffles(float (&c)[kWgmmaSums], const uint32_t (&a)[4], SwizzledRows b) {
  const int quad = lane() / kQuad * kQuad, column = lane() % kQuad * 2;
  for (int t = 0; t < kQuad; t++) {
    for (int i = 0; i < 4; i++) {
      const uint32_t of_row = shuffle(a[i], quad + t);
      const int byte = (2 * t + i / 2 * 8) * static_cast<int>(sizeof(T));
      for (int j = 0; j < kWgmmaColumns / 8; j++) {
        for (int h = 0; h < 2; h++)
          add_products<T>(c[4 * j + i % 2 * 2 + h], of_row, b.pair(8 * j + column + h, byte));
      }
    }
  }
}
#endif

#if defined(BNB_HOPPER)
#define BNB_EIGHT(i)                                                                          \
  "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3]), "+f"(c[i + 4]), "+f"(c[i + 5]), \
      "+f"(c[i + 6]), "+f"(c[i + 7])
#define BNB_WGMMA(type)                                                                                      \
  asm volatile(                                                                                              \
      "{.reg .pred add; setp.ne.b32 add, 1, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type   \
      " "                                                                                                    \
      "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,"  \
      "%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51," \
      "%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}, {%64,%65,%66,%67}, %68, add, 1, 1, 0;}"             \
      : BNB_EIGHT(0), BNB_EIGHT(8), BNB_EIGHT(16), BNB_EIGHT(24), BNB_EIGHT(32), BNB_EIGHT(40),              \
        BNB_EIGHT(48), BNB_EIGHT(56)                                                                         \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.descriptor()))
#endif

// Starts c += A B^T, B being 128 rows of 16 elements, for half and bfloat16.
template <class T>
__device__ inline void wgmma_64x128x16([[maybe_unused]] float (&c)[kWgmmaSums],
                                       [[maybe_unused]] const uint32_t (&a)[4],
                                       [[maybe_unused]] SwizzledRows b) {
#if defined(BNB_HOPPER)
  if constexpr (std::is_same_v<T, __half>)
    BNB_WGMMA("f16");
  else
    BNB_WGMMA("bf16");
#elif defined(BNB_SIMULATED)
  simulator::start(simulator::Unit::products, [&c, &a, b] { wgmma_by_shuffles<T>(c, a, b); });
#endif
}

#if defined(BNB_HOPPER)
#undef BNB_WGMMA
#undef BNB_EIGHT
#endif

}  // namespace bnb
