// Threads that do the steps of one task together.
//
// Starting and ending a parallel region costs as much as a small product. So one region does several steps, and between them
// threads wait for each other. Items of a step go to whoever comes: one thread alone does them all, and one that comes late, or
// that the system lets wait, holds nobody up but for the items that it has begun.

#pragma once

#include <atomic>
#include <cstdint>
#include <thread>

namespace dbf {

class Team {
 public:
  // Calls body(item) for every item of a step, by this thread or another; returns when all of them are done. Every thread
  // takes the same steps in rising order.
  template <typename Body>
  void share(int step, int64_t items, const Body& body) {
    Step& own = steps_[step];
    int64_t done = 0;
    for (int64_t item; (item = own.next.fetch_add(1, std::memory_order_relaxed)) < items; ++done) body(item);
    if (done > 0) own.done.fetch_add(done, std::memory_order_release);
    for (int spins = 0; own.done.load(std::memory_order_acquire) < items; ++spins)
      spins < kSpins ? relax() : std::this_thread::yield();
  }

 private:
  static constexpr int kSteps = 4;
  static constexpr int kSpins = 1 << 12;  // some ten microseconds

  // Counters of several threads, each on a cache line of its own.
  struct Step {
    alignas(64) std::atomic<int64_t> next{0};
    alignas(64) std::atomic<int64_t> done{0};
  };

  static void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  Step steps_[kSteps];
};

}  // namespace dbf
