// Launches, and the OS threads that run their blocks.
#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "block.h"
#include "sanitizers.h"

namespace bnb::simulator {
namespace {

// A launch that is being run.
struct Job {
  const Launch& launch;
  uint64_t blocks;
  uint64_t workers;
  std::atomic<bool> failed{false};
};

// One OS thread. Its mutex is its own: a common one would order the blocks of different OS threads, and so
// hide their races from the thread sanitizer.
class Worker {
 public:
  explicit Worker(uint64_t index) : index_(index), thread_([this] { loop(); }) { thread_.detach(); }

  void start(Job& job) {
    const std::lock_guard<std::mutex> lock(mutex_);
    job_ = &job;
    changed_.notify_all();
  }

  // Returns what went wrong in its part of the job, empty for nothing. (Words, as an exception shared between
  // OS threads is counted by code that the thread sanitizer does not see.)
  std::string finish() {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [this] { return !job_; });
    return fault_;
  }

 private:
  void loop() {
    Block block;
    for (;;) {
      Job* job = nullptr;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        changed_.wait(lock, [this] { return job_; });
        job = job_;
      }
      enter_simulator();
      std::string fault = run_part(block, *job);
      leave_simulator();
      const std::lock_guard<std::mutex> lock(mutex_);
      fault_ = std::move(fault);
      job_ = nullptr;
      changed_.notify_all();
    }
  }

  std::string run_part(Block& block, Job& job) {
    std::string fault;
    try {
      block.prepare(job.launch);
      const Turns turns(~uint64_t{0});
      for (uint64_t i = index_; i < job.blocks && fault.empty(); i += job.workers) {
        if (job.failed.load(std::memory_order_relaxed)) break;
        fault = block.run(turns.pick(i, job.blocks));
      }
    } catch (const std::exception& error) {
      fault = std::string(job.launch.name) + ": " + error.what();
    }
    if (!fault.empty()) job.failed.store(true, std::memory_order_relaxed);
    return fault;
  }

  const uint64_t index_;
  std::mutex mutex_;
  std::condition_variable changed_;
  Job* job_ = nullptr;
  std::string fault_;
  std::thread thread_;
};

// For the life of the process, as their fibers are; a forked process starts with none.
std::vector<Worker*>* all_workers = nullptr;
std::mutex* launch_mutex = nullptr;

void forget_workers() {
  all_workers = new std::vector<Worker*>;
  launch_mutex = new std::mutex;
}

void start_workers(uint64_t count) {
  while (all_workers->size() < count) all_workers->push_back(new Worker(all_workers->size()));
}

void initialize() {
  static const bool done = [] {
    forget_workers();
    pthread_atfork(nullptr, nullptr, forget_workers);
    return true;
  }();
  static_cast<void>(done);
}

// What a device would say to this launch.
cudaError_t check_launch(const Launch& launch) {
  const dim3 &grid = launch.grid, &block = launch.block;
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > kMaxThreads || block.x > 1024 || block.y > 1024 || block.z > 64)
    return cudaErrorInvalidConfiguration;
  if (!grid.x || !grid.y || !grid.z || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535)
    return cudaErrorInvalidConfiguration;
  const size_t shared_limit =
      launch.maker == Maker::amd ? kSharedBytesOfAmd : dynamic_shared_limit(launch.kernel);
  return launch.shared_bytes > shared_limit ? cudaErrorInvalidValue : cudaSuccess;
}

}  // namespace

void run(const Launch& launch) {
  if (keep_error(check_launch(launch)) != cudaSuccess) return;
  initialize();
  const std::lock_guard<std::mutex> lock(*launch_mutex);
  const uint64_t blocks = uint64_t{launch.grid.x} * launch.grid.y * launch.grid.z;
  const uint64_t count = std::min(static_cast<uint64_t>(workers()), blocks);
  start_workers(count);
  Job job{launch, blocks, count};
  for (uint64_t i = 0; i < count; ++i) (*all_workers)[i]->start(job);
  std::string fault;
  for (uint64_t i = 0; i < count; ++i) {
    const std::string found = (*all_workers)[i]->finish();
    if (fault.empty()) fault = found;
  }
  if (!fault.empty()) throw std::runtime_error(fault);
}

}  // namespace bnb::simulator
