// How a CPU kernel gets its threads: the caller hands it a Runner, and the kernel hands the Runner independent tasks.
// Threads pull tasks from a counter, since cores differ in effective speed. A task's result must not depend on the
// thread that runs it; sums over tasks are done afterwards, in task order, so results repeat bit for bit.
#pragma once
#include <cstdint>

namespace convdit {

struct Runner {
  using Body = void (*)(const void* closure, int64_t task);
  void (*run)(int64_t tasks, Body body, const void* closure);
  int64_t threads;  // how many tasks can run at once

  template <class F>
  void operator()(int64_t tasks, const F& f) const {
    if (tasks == 1 || threads == 1) {
      for (int64_t task = 0; task < tasks; ++task) f(task);
    } else if (tasks > 0) {
      run(tasks, [](const void* closure, int64_t task) { (*static_cast<const F*>(closure))(task); }, &f);
    }
  }
};

}  // namespace convdit
