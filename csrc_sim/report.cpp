// The words for what a kernel did wrong.
#include <map>
#include <string>
#include <tuple>

#include "block.h"

namespace bnb::simulator {
namespace {

std::string in_words(const uint3& index) {
  return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " + std::to_string(index.z) +
         ")";
}

// "3, 5-31" of ascending ranks.
std::string ranges(const std::vector<int>& ranks) {
  std::string words;
  for (size_t i = 0; i < ranks.size();) {
    size_t end = i + 1;
    while (end < ranks.size() && ranks[end] == ranks[end - 1] + 1) ++end;
    words += (i ? ", " : "") + std::to_string(ranks[i]);
    if (end - i > 1) words += "-" + std::to_string(ranks[end - 1]);
    i = end;
  }
  return words;
}

}  // namespace

std::string Block::place_of(const Thread& thread) const {
  if (thread.state == Thread::State::returned) return "returned";
  return std::string("at ") + thread.operation + " (" + thread.site.file + ":" +
         std::to_string(thread.site.line) + ")";
}

// One line for each place where some of these threads are.
std::string Block::waiting_threads(const std::vector<const Thread*>& threads) const {
  std::map<std::string, std::vector<int>> places;
  for (const Thread* thread : threads) places[place_of(*thread)].push_back(thread->rank);
  std::string words;
  for (const auto& [place, ranks] : places)
    words +=
        std::string("\n  ") + (ranks.size() == 1 ? "thread " : "threads ") + ranges(ranks) + ": " + place;
  return words;
}

// Keeps the first fault of the block.
void Block::find_fault(const std::string& message, const Thread* thread) {
  if (!fault_.empty()) return;
  fault_ = std::string(launch_.name) + ": block " + in_words(block_index_);
  if (thread) fault_ += ", thread " + in_words(thread->index);
  fault_ += ": " + message;
}

void Block::find_missing_threads() {
  if (!fault_.empty()) return;
  std::vector<const Thread*> all;
  for (const Thread& thread : threads_) all.push_back(&thread);
  find_fault("threads wait for others that never come" + waiting_threads(all), nullptr);
}

}  // namespace bnb::simulator
