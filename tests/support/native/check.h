// What the programs that check CPU kernels without torch share: memory with a guard, threads, random sizes, the command line.
//
//   check                   a hundred shapes of seed 0
//   check <seed> <seconds>  random shapes for so long, in time of the processor: others may hold it
//
// They print a line for each instruction set and exit with 1 where one is wrong. Built for other processors and with sanitizers.

#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <map>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace check {

using Random = std::mt19937;

// Memory that ends right before a page which nobody may touch. What stands before it is guarded by the sanitizer alone.
// It is filled with bytes that are NaN in every format: whatever is not written shows.
template <typename T>
class Memory {
 public:
  explicit Memory(int64_t count) : count_(count) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE)), bytes = count * sizeof(T);
    size_ = (bytes + page - 1) / page * page + page;
    void* pages = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pages == MAP_FAILED || mprotect(static_cast<char*>(pages) + size_ - page, page, PROT_NONE) != 0) std::abort();
    pages_ = static_cast<char*>(pages);
    data_ = reinterpret_cast<T*>(pages_ + size_ - page - bytes);
    std::memset(static_cast<void*>(data_), 0xFF, bytes);
#if defined(__SANITIZE_ADDRESS__)
    ASAN_POISON_MEMORY_REGION(pages_, reinterpret_cast<char*>(data_) - pages_);
#endif
  }
  Memory(Memory&& other) noexcept : count_(other.count_), size_(other.size_), pages_(other.pages_), data_(other.data_) {
    other.pages_ = nullptr;
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() {
    if (pages_ == nullptr) return;
#if defined(__SANITIZE_ADDRESS__)
    ASAN_UNPOISON_MEMORY_REGION(pages_, size_);
#endif
    munmap(pages_, size_);
  }

  T* data() const { return data_; }
  int64_t size() const { return count_; }
  T& operator[](int64_t i) const { return data_[i]; }
  T* begin() const { return data_; }
  T* end() const { return data_ + count_; }
  bool operator==(const Memory& other) const {
    return count_ == other.count_ && std::memcmp(data_, other.data_, count_ * sizeof(T)) == 0;
  }

 private:
  int64_t count_;
  size_t size_ = 0;
  char* pages_ = nullptr;
  T* data_ = nullptr;
};

// Runs body(begin, end) over [0, count) in parts, each on a thread of its own: their memory is new, and as large as they ask.
struct Threads {
  int64_t most;

  template <typename Body>
  void operator()(int64_t count, int64_t, const Body& body) const {
    const int64_t parts = std::min(most, count);
    std::vector<std::thread> threads;
    for (int64_t i = 0; i < parts; ++i) threads.emplace_back([=, &body] { body(count * i / parts, count * (i + 1) / parts); });
    for (std::thread& thread : threads) thread.join();
  }
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// From 1 to 2^bits; small sizes are as likely as large ones.
inline int64_t random_size(Random& random, double bits) {
  return static_cast<int64_t>(std::exp2(std::uniform_real_distribution<double>(0.0, bits)(random)));
}
inline int64_t random_up_to(Random& random, int64_t most) { return static_cast<int64_t>(random() % (most + 1)); }

// Normal numbers that lie `decades` apart and are `unit` in size; now and then one is infinite or none.
struct Numbers {
  float decades, unit;
  bool finite;

  static Numbers of(Random& random) {
    const float units[] = {1.0f, 1.0f, 1.0f, 0x1p90f, 0x1p-90f, 0x1p-140f};
    return {static_cast<float>(random() % 3) * 2.0f, units[random() % 6], random() % 8 != 0};
  }
  void fill(Random& random, float* values, int64_t count) const {
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < count; ++i) values[i] = normal(random) * std::pow(10.0f, decades * normal(random)) * unit;
    const float special[] = {INFINITY, -INFINITY, NAN};
    if (!finite && count > 0)
      for (int i = 0; i < 2; ++i) values[random() % count] = special[random() % 3];
  }
};

// Whether a result is right: within a tolerance, or infinite or no number where the truth is.
inline bool near(float result, double truth, double tolerance) {
  constexpr double most = 3.4028234663852886e38, least = 0x1p-149;
  if (std::isnan(truth)) return std::isnan(result);
  if (std::isinf(result)) return (result > 0.0f ? truth : -truth) + tolerance >= most;
  return std::fabs(result - truth) <= tolerance + 0x1p-23 * std::fabs(truth) + least;
}

// Numbers of wrong and of all shapes, by the name of an instruction set.
using Counts = std::map<std::string, std::pair<int64_t, int64_t>>;

// Checks one random shape after the other: shape(random, counts).
template <typename Shape>
int run(int count, char** arguments, const Shape& shape) {
  Random random(count == 3 ? std::strtoul(arguments[1], nullptr, 10) : 0);
  const double seconds = count == 3 ? std::strtod(arguments[2], nullptr) : 0.0;
  Counts counts;
  for (int i = 0; count == 3 ? static_cast<double>(std::clock()) / CLOCKS_PER_SEC < seconds : i < 100; ++i)
    shape(random, counts);
  int64_t all_wrong = 0;
  for (const auto& [name, wrong_and_all] : counts) {
    std::printf("%s: %lld of %lld shapes wrong\n", name.c_str(), static_cast<long long>(wrong_and_all.first),
                static_cast<long long>(wrong_and_all.second));
    all_wrong += wrong_and_all.first;
  }
  return all_wrong == 0 ? 0 : 1;
}

}  // namespace check
