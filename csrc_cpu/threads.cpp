#include "threads.h"

#include <time.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <string>

#include "openmp.h"

namespace bnb {
namespace {

OpenMP openmp{};

using Clock = std::chrono::steady_clock;

// For how long the calling thread has had a core. Windows knows that to 15 ms only; there it has had one
// always.
std::chrono::nanoseconds thread_time() {
#if defined(_WIN32)
  return Clock::now().time_since_epoch();
#else
  timespec now{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return std::chrono::seconds(now.tv_sec) + std::chrono::nanoseconds(now.tv_nsec);
#endif
}

struct Job {
  int64_t n;
  RangeBody body;
  void* context;
  Clock::time_point start;
  std::atomic<Clock::rep> waited{0};  // the longest that a thread had no core
};

// Where other programs have the cores, or a quota is used up, a region ends when its last thread has had a
// core, some ten milliseconds later. The next calls then do without regions, for as long as was waited, and
// for twice as long each time that it happens again soon.
constexpr int kMostRests = 16;
constexpr auto kLate = std::chrono::milliseconds(1);
constexpr auto kSoon = std::chrono::seconds(1);

std::atomic<Clock::rep> rests_until{0}, last_late{0};
std::atomic<int> rests{1};

Clock::rep ticks(Clock::duration duration) { return duration.count(); }

void remember_waiting(Clock::time_point start, Clock::duration waited) {
  constexpr auto order = std::memory_order_relaxed;
  const Clock::time_point end = Clock::now();
  const bool again = ticks(start.time_since_epoch()) - last_late.load(order) < ticks(kSoon);
  rests.store(again ? std::min(2 * rests.load(order), kMostRests) : 1, order);
  last_late.store(ticks(end.time_since_epoch()), order);
  rests_until.store(ticks((end + rests.load(order) * waited).time_since_epoch()), order);
}

void run_part(void* data) {
  Job& job = *static_cast<Job*>(data);
  const int64_t threads = openmp.threads();
  const int64_t thread = openmp.thread();
  const int64_t part = job.n / threads;
  const int64_t longer = job.n % threads;
  const int64_t begin = thread * part + std::min(thread, longer);
  const int64_t end = begin + part + (thread < longer);
  if (begin == end) return;
  if (thread == 0) return job.body(job.context, begin, end);
  const auto own_start = thread_time();
  job.body(job.context, begin, end);
  const auto own = thread_time() - own_start;
  const Clock::duration waited = Clock::now() - job.start - own;
  if (waited < kLate || waited < own) return;
  Clock::rep longest = job.waited.load();
  while (ticks(waited) > longest && !job.waited.compare_exchange_weak(longest, ticks(waited))) {
  }
}

}  // namespace

void set_openmp(const std::string& path) { openmp = find_openmp(path); }

const char* openmp_path() { return openmp.parallel ? openmp.path.c_str() : nullptr; }

void parallel_range(int64_t n, int64_t grain, RangeBody body, void* context) {
  if (n <= 0) return;
  const int64_t parts = (n - 1) / std::max<int64_t>(grain, 1) + 1;
  const bool serial = parts == 1 || !openmp.parallel || openmp.in_parallel();
  const int64_t threads = serial ? 1 : std::min<int64_t>(openmp.max_threads(), parts);
  if (threads <= 1) return body(context, 0, n);
  const Clock::time_point start = Clock::now();
  if (start.time_since_epoch().count() < rests_until.load(std::memory_order_relaxed))
    return body(context, 0, n);
  Job job{n, body, context, start};
  openmp.parallel(run_part, &job, static_cast<int>(threads));
  const Clock::duration waited(job.waited.load());
  if (waited.count() > 0) remember_waiting(start, waited);
}

}  // namespace bnb
