// program CASE WARP ORDER THREADS: runs one faulty case, or all right ones for the case "right".
//
// Exit status 0: right. 2: bad arguments. 3: a wrong result. 4: the launch threw. 5: the simulator was not
// usable after that.
#include <cstdlib>

#include "harness.h"
#include "settings.h"

namespace {

int run(const std::string& name, void (*body)()) {
  try {
    body();
    return 0;
  } catch (const std::logic_error& wrong) {
    std::printf("%s: wrong: %s\n", name.c_str(), wrong.what());
    return 3;
  } catch (const std::exception& thrown) {
    std::printf("%s: thrown: %s\n", name.c_str(), thrown.what());
    return 4;
  }
}

int run_right() {
  for (const Cases* cases : {&kRight, &kAsynchronous, &kHip})
    for (const auto& [name, body] : *cases)
      if (const int status = run(name, body)) return status;
  return 0;
}

}  // namespace

int main(int, char** arguments) {
  const std::string name = arguments[1];
  try {
    bnb::simulator::set_warp_size(std::atoi(arguments[2]));
    bnb::simulator::set_order(arguments[3]);
    bnb::simulator::set_workers(std::atoi(arguments[4]));
  } catch (const std::invalid_argument& error) {
    std::printf("%s\n", error.what());
    return 2;
  }
  if (name == "right") return run_right();
  const Cases& faults = kFaults.count(name) ? kFaults : kAsynchronousFaults;
  const int status = run(name, faults.at(name));
  return status == 4 && run_right() != 0 ? 5 : status;
}
