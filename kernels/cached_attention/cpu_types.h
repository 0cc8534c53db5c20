// Sizes and types that all instruction sets share.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

namespace dbf_attention {

constexpr int64_t kLanes = 16;
constexpr int64_t kBlock = 4 * kLanes;  // keys whose scores are computed together
constexpr int64_t kRowsAtOnce = 4;  // queries that read keys and values together
constexpr int64_t kQueries = 16;    // of a task: their scores stay in the second-level cache

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));

struct BFloat16 {
  uint16_t bits;
  static constexpr bool is_bfloat16 = true;
};
struct Float16 {
  uint16_t bits;
  static constexpr bool is_bfloat16 = false;
};

// The keys [begin, end) that a query reads.
struct Span {
  int64_t begin, end;
};

struct Problem {
  int64_t key_features, value_features;
  int64_t length;        // of the cache
  int64_t score_stride;  // from the scores of a query to those of the next
  float cap;             // of scores, which become cap * tanh(score / cap); 0 for none
};

}  // namespace dbf_attention
