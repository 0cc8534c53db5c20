// The element-wise steps of an ADMM update, row by row; reference.py has their formulas.
//
// Every step reads and writes each element once. Loops are plain: the compiler makes vectors of them, for several instruction
// sets, of which the loader chooses. Sums go through 16 lanes in fixed order, and over blocks of rows of fixed size: results
// depend neither on threads nor on the instruction set.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__x86_64__) && defined(__ELF__)
#define DBF_VECTORS __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define DBF_VECTORS
#endif

namespace dbf_factor {

constexpr int64_t kLanes = 16;
constexpr int64_t kBlock = 32;  // rows whose part of a sum over rows is kept apart
constexpr int64_t kTile = 64;   // columns that are transposed at once, with the rows of a block
constexpr float kTiny = 1e-12f;

struct Magnitude {
  float row;             // of one row
  const float* columns;  // of all columns
};

// NaN stays NaN but for payloads that no arithmetic makes.
inline uint16_t to_bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);  // to nearest, ties to even
}

inline float from_bfloat16(uint16_t value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}

DBF_VECTORS void narrow(const float* from, int64_t count, uint16_t* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = to_bfloat16(from[i]);
}

DBF_VECTORS void widen(const uint16_t* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = from_bfloat16(from[i]);
}

DBF_VECTORS void anchor_row(const float* point, Magnitude size, int64_t count, float leak, float* out) {
  for (int64_t i = 0; i < count; ++i)
    out[i] = (1 + leak) * __builtin_copysignf(size.row * size.columns[i], point[i]) - leak * point[i];
}

// Writes a tile [height, kTile], of which `width` columns count, transposed to rows that are `stride` apart.
DBF_VECTORS void turn(const float* tile, int64_t height, int64_t width, int64_t stride, float* out) {
  for (int64_t column = 0; column < width; ++column)
    for (int64_t row = 0; row < height; ++row) out[column * stride + row] = tile[row * kTile + column];
}

DBF_VECTORS void turn_narrow(const float* tile, int64_t height, int64_t width, int64_t stride, uint16_t* out) {
  for (int64_t column = 0; column < width; ++column)
    for (int64_t row = 0; row < height; ++row) out[column * stride + row] = to_bfloat16(tile[row * kTile + column]);
}

DBF_VECTORS void rest_row(const float* target, const float* product, float share, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = target[i] - share * product[i];
}

struct Advance {
  float of_primal, of_point, of_step;
};

// Moves a row of a point, and returns the sum of |point| * columns.
DBF_VECTORS float advance_row(float* point, Magnitude size, const float* step, Advance by, int64_t count) {
  float lanes[kLanes] = {};
  const int64_t even = count - count % kLanes;
  for (int64_t i = 0; i < even; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const float before = point[i + lane], column = size.columns[i + lane];
      const float primal = __builtin_copysignf(size.row * column, before);
      const float after = by.of_point * before + by.of_primal * primal + by.of_step * step[i + lane];
      point[i + lane] = after;
      lanes[lane] += __builtin_fabsf(after) * column;
    }
  }
  for (int64_t i = even; i < count; ++i) {
    const float before = point[i], column = size.columns[i];
    const float primal = __builtin_copysignf(size.row * column, before);
    const float after = by.of_point * before + by.of_primal * primal + by.of_step * step[i];
    point[i] = after;
    lanes[i - even] += __builtin_fabsf(after) * column;
  }
  float sum = 0;
  for (const float lane : lanes) sum += lane;
  return sum;
}

DBF_VECTORS void add_magnitude(const float* point, float weight, int64_t count, float* sums) {
  for (int64_t i = 0; i < count; ++i) sums[i] += weight * __builtin_fabsf(point[i]);
}

DBF_VECTORS void average_row(const float* point, Magnitude size, float averaging, int64_t count, float* basis) {
  const float row = size.row / (size.row + kTiny);
  for (int64_t i = 0; i < count; ++i)
    basis[i] = averaging * basis[i] + (1 - averaging) * __builtin_copysignf(row * size.columns[i], point[i]);
}

inline float norm(const float* values, int64_t count) {
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += static_cast<double>(values[i]) * values[i];
  return static_cast<float>(std::sqrt(sum));
}

}  // namespace dbf_factor
