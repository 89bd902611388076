#include "settings.h"

#include <algorithm>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <thread>

#include "device/language.h"
#include "sanitizers.h"

int warpSize = 32;

namespace bnb::simulator {
namespace {

constexpr uint64_t kGolden = 0x9e3779b97f4a7c15;
// The thread sanitizer knows 8,128 threads and fibers, and a worker may need 1,024.
constexpr int kMostWorkers = kThreadSanitizer ? 6 : 64;

Turns::Kind kind = Turns::Kind::forward;
uint64_t seed = 0;
int worker_count = 0;
bool is_capturing_graph = false;

int default_workers() {
  const auto cores = static_cast<int>(std::thread::hardware_concurrency());
  return std::clamp(cores, kThreadSanitizer ? 2 : 1, std::min(kMostWorkers, 8));
}

uint64_t mixed(uint64_t value) {
  value = (value ^ value >> 30) * 0xbf58476d1ce4e5b9;
  value = (value ^ value >> 27) * 0x94d049bb133111eb;
  return value ^ value >> 31;
}

}  // namespace

void set_warp_size(int lanes) {
  if (lanes != 32 && lanes != 64)
    throw std::invalid_argument("a warp has 32 or 64 lanes, not " + std::to_string(lanes));
  warpSize = lanes;
}
int warp_size() { return warpSize; }

void set_order(const std::string& order) {
  const std::string prefix = "shuffled:";
  if (order == "forward" || order == "reverse") {
    kind = order == "forward" ? Turns::Kind::forward : Turns::Kind::reverse;
    return;
  }
  const std::string number = order.substr(std::min(order.size(), prefix.size()));
  const bool digits =
      !number.empty() && number.size() <= 18 && number.find_first_not_of("0123456789") == std::string::npos;
  if (order.compare(0, prefix.size(), prefix) != 0 || !digits)
    throw std::invalid_argument("the order is forward, reverse or shuffled:SEED, not '" + order + "'");
  kind = Turns::Kind::shuffled;
  seed = std::stoull(number);
}
std::string order() {
  if (kind == Turns::Kind::shuffled) return "shuffled:" + std::to_string(seed);
  return kind == Turns::Kind::forward ? "forward" : "reverse";
}

bool happens_late(Unit unit, uint64_t i) {
  const bool is_product = unit == Unit::products;
  if (kind == Turns::Kind::shuffled) return mixed(seed * kGolden + 2 * i + is_product) & 1;
  return is_product == (kind == Turns::Kind::forward);
}

void set_workers(int workers) {
  if (workers < 1 || workers > kMostWorkers)
    throw std::invalid_argument("workers must be 1 to " + std::to_string(kMostWorkers) + ", not " +
                                std::to_string(workers));
  worker_count = workers;
}
int workers() { return worker_count ? worker_count : default_workers(); }

void set_capturing(bool is_capturing) { is_capturing_graph = is_capturing; }
bool capturing() { return is_capturing_graph; }

Turns::Turns(uint64_t stream) : kind_(kind), state_(mixed(seed * kGolden + stream)) {}

uint64_t Turns::random() { return mixed(state_ += kGolden); }

// Shuffled: i -> (a * i + b) mod n, a permutation as a has no factor in common with n.
uint64_t Turns::pick(uint64_t i, uint64_t n) const {
  if (kind_ == Kind::forward) return i;
  if (kind_ == Kind::reverse) return n - 1 - i;
  uint64_t factor = state_ % n | 1;
  while (std::gcd(factor, n) != 1) factor += 2;
  const auto wide = static_cast<unsigned __int128>(factor) * i + mixed(state_) % n;
  return static_cast<uint64_t>(wide % n);
}

}  // namespace bnb::simulator
