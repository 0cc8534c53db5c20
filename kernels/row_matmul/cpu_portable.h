// Any processor: loops over lanes, which compilers turn into whatever the processor has.

#pragma once

#include <cstring>

#include "cpu_types.h"

#define DBF_TARGET

namespace dbf_rows {
namespace portable {

struct Lanes {
  int32_t lanes[kRows];
};
struct Floats {
  float lanes[kRows];
};
using Codes = Lanes;
constexpr int64_t kDigitBytes = kStep;

template <typename From, typename Function>
inline auto each(const From& a, Function function) {
  struct {
    decltype(function(a.lanes[0], 0)) lanes[kRows];
  } result;
  for (int r = 0; r < kRows; ++r) result.lanes[r] = function(a.lanes[r], r);
  return result;
}
template <typename To, typename From>
inline To bits_as(const From& from) {
  To to;
  static_assert(sizeof to == sizeof from);
  std::memcpy(&to, &from, sizeof to);
  return to;
}
inline Lanes load(const uint32_t* words) {
  Lanes a;
  std::memcpy(a.lanes, words, sizeof a);
  return a;
}
inline Lanes same(int32_t value) {
  Lanes a;
  for (int32_t& lane : a.lanes) lane = value;
  return a;
}
inline Lanes both(Lanes a, Lanes b) {
  return bits_as<Lanes>(each(a, [&](int32_t v, int r) { return v & b.lanes[r]; }));
}
inline Lanes either(Lanes a, Lanes b) {
  return bits_as<Lanes>(each(a, [&](int32_t v, int r) { return v | b.lanes[r]; }));
}
template <int bits>
inline Lanes down(Lanes a) {
  return bits_as<Lanes>(each(a, [](int32_t v, int) { return static_cast<uint32_t>(v) >> bits; }));
}
template <int bits>
inline Lanes up(Lanes a) {
  return bits_as<Lanes>(each(a, [](int32_t v, int) { return static_cast<uint32_t>(v) << bits; }));
}
template <int bits>
inline Codes codes_of(Lanes bytes) {
  return bytes;
}
inline Lanes add_products(Lanes sum, const Codes& codes, const int8_t* x) {
  for (int r = 0; r < kRows; ++r) {
    const auto word = static_cast<uint32_t>(codes.lanes[r]);
    for (int j = 0; j < kStep; ++j) sum.lanes[r] += static_cast<int32_t>(word >> (8 * j) & 0xFF) * x[j];
  }
  return sum;
}
inline Floats to_float(Lanes a) {
  return bits_as<Floats>(each(a, [](int32_t v, int) { return static_cast<float>(v); }));
}
inline Floats as_float(Lanes bits) { return bits_as<Floats>(bits); }
inline Floats times(Floats a, Floats b) {
  return bits_as<Floats>(each(a, [&](float v, int r) { return v * b.lanes[r]; }));
}
inline Floats times(Floats a, float b) {
  return bits_as<Floats>(each(a, [&](float v, int) { return v * b; }));
}
inline Floats plus(Floats a, Floats b) {
  return bits_as<Floats>(each(a, [&](float v, int r) { return v + b.lanes[r]; }));
}
inline void store(float* to, Floats a) { std::memcpy(to, a.lanes, sizeof a); }
inline void prefetch(const uint32_t*) {}

inline void pack(const int8_t (*digits)[kStep], int8_t* to) { std::memcpy(to, digits, kDigits * kStep); }

#include "cpu_block.h"

}  // namespace portable

inline const Kernel& portable_kernel() {
  static const Kernel kernel{"portable", kDigits * portable::kDigitBytes, portable::pack, portable::multiply};
  return kernel;
}

}  // namespace dbf_rows

#undef DBF_TARGET
