#include "threads.h"

#include <dlfcn.h>
#include <time.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <stdexcept>
#include <string>

namespace bnb {
namespace {

struct OpenMP {
  void (*parallel)(void (*body)(void*), void* data, unsigned threads, unsigned flags);
  int (*max_threads)();
  int (*thread)();
  int (*threads)();
  int (*in_parallel)();
  std::string path;
};

OpenMP openmp{};

template <class Function>
void* find(void* library, const char* name, Function*& function) {
  void* symbol = dlsym(library, name);
  if (!symbol) {
    throw std::runtime_error(std::string("the OpenMP runtime of torch has no ") + name +
                             "; bnb_core needs a torch build with OpenMP");
  }
  function = reinterpret_cast<Function*>(symbol);
  return symbol;
}

using Clock = std::chrono::steady_clock;

// How long the calling thread has had a core.
std::chrono::nanoseconds thread_time() {
  timespec now{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return std::chrono::seconds(now.tv_sec) + std::chrono::nanoseconds(now.tv_nsec);
}

struct Job {
  int64_t n;
  RangeBody body;
  void* context;
  std::chrono::nanoseconds own_end;  // of the calling thread's part, as thread_time
};

void run_part(void* data) {
  Job& job = *static_cast<Job*>(data);
  const int64_t threads = openmp.threads();
  const int64_t thread = openmp.thread();
  const int64_t part = job.n / threads;
  const int64_t longer = job.n % threads;
  const int64_t begin = thread * part + std::min(thread, longer);
  const int64_t end = begin + part + (thread < longer);
  if (begin < end) job.body(job.context, begin, end);
  if (thread == 0) job.own_end = thread_time();
}

// Where other programs have the cores, or a quota is used up, a region ends when its last thread has had a
// core, some ten milliseconds later. The next calls then do without regions, for this many times as long as
// was waited.
constexpr int kRest = 20;
constexpr auto kLate = std::chrono::milliseconds(1);

std::atomic<Clock::rep> rests_until{0};

// Of a region from `start` on, in which the calling thread has worked for `own`.
void remember_waiting(Clock::time_point start, std::chrono::nanoseconds own) {
  const Clock::time_point end = Clock::now();
  const auto waited = end - start - own;
  if (waited < kLate || waited < own) return;
  rests_until.store((end + kRest * waited).time_since_epoch().count(), std::memory_order_relaxed);
}

}  // namespace

void set_openmp(const char* path) {
  void* library = dlopen(path, RTLD_NOLOAD | RTLD_LAZY);
  if (!library || !dlsym(library, "GOMP_parallel")) library = RTLD_DEFAULT;
  OpenMP found{};
  void* symbol = find(library, "GOMP_parallel", found.parallel);
  find(library, "omp_get_max_threads", found.max_threads);
  find(library, "omp_get_thread_num", found.thread);
  find(library, "omp_get_num_threads", found.threads);
  find(library, "omp_in_parallel", found.in_parallel);
  Dl_info info{};
  if (dladdr(symbol, &info) && info.dli_fname) found.path = info.dli_fname;
  openmp = found;
}

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
  const std::chrono::nanoseconds own_start = thread_time();
  Job job{n, body, context, own_start};
  openmp.parallel(run_part, &job, static_cast<unsigned>(threads), 0);
  remember_waiting(start, job.own_end - own_start);
}

}  // namespace bnb
