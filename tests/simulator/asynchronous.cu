// Copies and products that a thread starts and waits for later: kernels that do so rightly, and with one
// fault each.
#include "../../csrc_cuda/async_copy.h"
#include "../../csrc_cuda/wgmma.h"
#include "harness.h"

namespace {

using Piece = bnb::Pack<uint32_t, 4>;

// The first group is there while the second one may not be.
__global__ void copy_in_groups(const Piece* x, Piece* out) {
  auto* shared = bnb::dynamic_shared<Piece>();
  const unsigned thread = threadIdx.x, other = blockDim.x - 1 - thread;
  bnb::copy_async(&shared[thread], &x[thread], true);
  bnb::commit_copies();
  bnb::copy_async(&shared[blockDim.x + thread], &x[blockDim.x + thread], thread % 2 == 0);
  bnb::commit_copies();
  bnb::wait_for_copies<1>();
  __syncthreads();
  out[thread] = shared[other];
  bnb::wait_for_copies<0>();
  __syncthreads();
  out[blockDim.x + thread] = shared[blockDim.x + other];
}

void copies_that_are_waited_for_in_groups() {
  constexpr unsigned kCopying = 64;
  const Memory<Piece> x(2 * kCopying), out(2 * kCopying);
  for (unsigned i = 0; i < x.size(); ++i) x[i] = {i, i + 1, i + 2, i + 3};
  LAUNCH(copy_in_groups, 1, kCopying, 2 * kCopying * sizeof(Piece), x.data(), out.data());
  for (unsigned i = 0; i < kCopying; ++i) {
    const unsigned other = kCopying - 1 - i;
    REQUIRE(out[i][3] == other + 3);
    REQUIRE(out[kCopying + i][3] == (other % 2 == 0 ? kCopying + other + 3 : 0));
  }
}

constexpr int kRows = bnb::kWgmmaRows, kColumns = bnb::kWgmmaColumns, kDepth = 64;

// out[64, 128] = a[64, 64] b[128, 64]^T in four products.
__global__ void multiply_by_warpgroup(const __half* a, const __half* b, float* out) {
  const int thread = static_cast<int>(threadIdx.x), quarter = thread % 4;
  const int row = thread / 32 * 16 + thread % 32 / 4;
  auto* shared = bnb::dynamic_shared<unsigned char>();
  constexpr int kPieceElements = bnb::SwizzledRows::kPiece / sizeof(__half);
  for (int i = thread; i < kColumns * bnb::SwizzledRows::kPieces; i += bnb::kWarpgroup) {
    const int column = i / bnb::SwizzledRows::kPieces, piece = i % bnb::SwizzledRows::kPieces;
    bnb::copy_async(shared + bnb::SwizzledRows::place_of_piece(column, piece),
                    b + column * kDepth + piece * kPieceElements, true);
  }
  bnb::wait_for_copies();
  bnb::show_to_wgmma();
  __syncthreads();
  uint32_t operands[kDepth / bnb::kWgmmaDepth][4];
  float sums[bnb::kWgmmaSums] = {};
  for (int step = 0; step < kDepth / bnb::kWgmmaDepth; ++step) {
    for (int i = 0; i < 4; ++i) {
      const int k = step * bnb::kWgmmaDepth + i / 2 * 8 + quarter * 2;
      std::memcpy(&operands[step][i], a + (row + i % 2 * 8) * kDepth + k, sizeof(uint32_t));
    }
  }
  bnb::wgmma_fence(operands);
  for (int step = 0; step < kDepth / bnb::kWgmmaDepth; ++step) {
    bnb::wgmma_64x128x16<__half>(sums, operands[step], bnb::SwizzledRows(shared).from(0, step * 32));
    bnb::wgmma_commit();
  }
  bnb::wgmma_wait<0>();
  for (int i = 0; i < bnb::kWgmmaSums; ++i)
    out[(row + i / 2 % 2 * 8) * kColumns + i / 4 * 8 + quarter * 2 + i % 2] = sums[i];
}

void products_of_a_warpgroup() {
  if (warpSize != 32) return;  // they are NVIDIA's
  const Memory<__half> a(kRows * kDepth), b(kColumns * kDepth);
  const Memory<float> out(kRows * kColumns);
  for (size_t i = 0; i < a.size(); ++i) a[i] = static_cast<float>(i % 13) - 6;
  for (size_t i = 0; i < b.size(); ++i) b[i] = static_cast<float>(i % 11) - 5;
  LAUNCH(multiply_by_warpgroup, 1, bnb::kWarpgroup, kColumns * bnb::SwizzledRows::kBytes, a.data(), b.data(),
         out.data());
  for (int row = 0; row < kRows; ++row) {
    for (int column = 0; column < kColumns; ++column) {
      float sum = 0;
      for (int k = 0; k < kDepth; ++k) sum += float(a[row * kDepth + k]) * float(b[column * kDepth + k]);
      REQUIRE(out[row * kColumns + column] == sum);
    }
  }
}

constexpr int kThreads = 64;

constexpr int kCopies = 8;  // of 16 bytes, by each thread: in a shuffled order some happen late

__global__ void read_before_waiting(const Piece* x, Piece* out) {
  auto* shared = bnb::dynamic_shared<Piece>();
  for (int i = thread_of_block(); i < kCopies * kThreads; i += kThreads)
    bnb::copy_async(&shared[i], &x[i], true);
  bnb::commit_copies();
  for (int i = thread_of_block(); i < kCopies * kThreads; i += kThreads) out[i] = shared[i];
  bnb::wait_for_copies();
}

__global__ void read_after_starting(const Piece* x, Piece* out) {
  auto* shared = bnb::dynamic_shared<Piece>();
  for (int i = thread_of_block(); i < kCopies * kThreads; i += kThreads) shared[i] = x[i];
  for (int i = thread_of_block(); i < kCopies * kThreads; i += kThreads)
    bnb::copy_async(&shared[i], &x[i], false);
  for (int i = thread_of_block(); i < kCopies * kThreads; i += kThreads) out[i] = shared[i];
  bnb::wait_for_copies();
}

void require_copied(void (*kernel)(const Piece*, Piece*)) {
  const Memory<Piece> x(kCopies * kThreads, Piece{1, 2, 3, 4}), out(kCopies * kThreads);
  LAUNCH(kernel, 1, kThreads, kCopies * kThreads * sizeof(Piece), x.data(), out.data());
  for (size_t i = 0; i < out.size(); ++i) REQUIRE(out[i][3] == 4);
}

void copy_read_before_it_is_waited_for() { require_copied(read_before_waiting); }
void copy_over_what_is_still_read() { require_copied(read_after_starting); }

constexpr int kProducts = 8;
enum class Fault { none, sums_read_early, operand_overwritten, copied_over, no_wait };

// 64 rows times 128, all of ones: every sum is 16 for each product.
template <Fault fault>
__global__ void multiply_ones(float* out) {
  constexpr uint32_t kOnes = 0x3c003c00;  // two in half
  constexpr int kPieces = kColumns * bnb::SwizzledRows::kPieces;
  auto* shared = bnb::dynamic_shared<Piece>();
  for (int i = thread_of_block(); i < kPieces; i += bnb::kWarpgroup) shared[i] = {kOnes, kOnes, kOnes, kOnes};
  __syncthreads();
  float sums[bnb::kWgmmaSums] = {};
  uint32_t ones[4] = {kOnes, kOnes, kOnes, kOnes};
  const bnb::SwizzledRows rows(bnb::dynamic_shared<unsigned char>());
  for (int i = 0; i < kProducts; ++i) bnb::wgmma_64x128x16<__half>(sums, ones, rows.from(0, i % 4 * 32));
  bnb::wgmma_commit();
  if (fault == Fault::sums_read_early) out[threadIdx.x] = sums[threadIdx.x % bnb::kWgmmaSums];
  if (fault == Fault::operand_overwritten) ones[2] = 0;
  __syncthreads();
  for (int i = thread_of_block(); fault == Fault::copied_over && i < kPieces; i += bnb::kWarpgroup)
    bnb::copy_async(&shared[i], out, false);
  if (fault != Fault::no_wait) bnb::wgmma_wait<0>();
  bnb::wait_for_copies();
  if (fault != Fault::sums_read_early) out[threadIdx.x] = sums[threadIdx.x % bnb::kWgmmaSums];
}

template <Fault fault>
void require_products() {
  if (warpSize != 32) return;  // they are NVIDIA's
  const Memory<float> out(bnb::kWarpgroup);
  LAUNCH(multiply_ones<fault>, 1, bnb::kWarpgroup, kColumns * bnb::SwizzledRows::kBytes, out.data());
  for (size_t i = 0; i < out.size(); ++i) REQUIRE(out[i] == 16 * kProducts);
}

void products_that_are_waited_for() { require_products<Fault::none>(); }
void sums_read_before_their_product_is_done() { require_products<Fault::sums_read_early>(); }
void operand_overwritten_before_its_product_is_done() { require_products<Fault::operand_overwritten>(); }
void copy_over_what_a_product_reads() { require_products<Fault::copied_over>(); }
void return_before_products_are_done() { require_products<Fault::no_wait>(); }

}  // namespace

const Cases kAsynchronous{
    CASE(copies_that_are_waited_for_in_groups),
    CASE(products_of_a_warpgroup),
    CASE(products_that_are_waited_for),
};

const Cases kAsynchronousFaults{
    CASE(copy_read_before_it_is_waited_for),      CASE(copy_over_what_is_still_read),
    CASE(sums_read_before_their_product_is_done), CASE(operand_overwritten_before_its_product_is_done),
    CASE(copy_over_what_a_product_reads),         CASE(return_before_products_are_done),
};
