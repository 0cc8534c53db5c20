// The rows of an ADMM update, without torch: against double precision. See check.h.

#include <algorithm>

#include "check.h"
#include "cpu_update.h"

namespace {

using check::Memory;
using check::Random;
using dbf_factor::Magnitude;

struct Row {
  explicit Row(Random& random)
      : count(check::random_size(random, 9)), point(count), columns(count), other(count), out(count), halves(count) {
    const check::Numbers numbers{static_cast<float>(random() % 3), 1.0f, true};
    numbers.fill(random, point.data(), count);
    numbers.fill(random, columns.data(), count);
    numbers.fill(random, other.data(), count);
    for (float& column : columns) column = std::fabs(column);
    if (random() % 3 == 0) point[random() % count] = random() % 2 == 0 ? 0.0f : -0.0f;
    row = std::uniform_real_distribution<float>(0.0f, 3.0f)(random);
  }

  double primal(int64_t i) const { return std::copysign(static_cast<double>(row) * columns[i], point[i]); }
  Magnitude size() const { return {row, columns.data()}; }

  int64_t count;
  float row;
  Memory<float> point, columns, other, out;
  Memory<uint16_t> halves;
};

// Whether a number is right that is the sum of terms of so much size.
bool right(float own, double truth, double terms) { return check::near(own, truth, 0x1p-21 * terms); }

bool anchor(const Row& row, float leak) {
  dbf_factor::anchor_row(row.point.data(), row.size(), row.count, leak, row.out.data());
  for (int64_t i = 0; i < row.count; ++i) {
    const double primal = row.primal(i), point = row.point[i];
    if (!right(row.out[i], primal - leak * (point - primal), std::fabs(primal) * 2 + std::fabs(point))) return false;
  }
  return true;
}

bool rest(const Row& row, float share) {
  dbf_factor::rest_row(row.point.data(), row.other.data(), share, row.count, row.out.data());
  for (int64_t i = 0; i < row.count; ++i) {
    const double part = static_cast<double>(share) * row.other[i];
    if (!right(row.out[i], row.point[i] - part, std::fabs(row.point[i]) + std::fabs(part))) return false;
  }
  return true;
}

bool average(const Row& row, float averaging) {
  std::copy(row.other.begin(), row.other.end(), row.out.data());
  dbf_factor::average_row(row.point.data(), row.size(), averaging, row.count, row.out.data());
  for (int64_t i = 0; i < row.count; ++i) {
    const double unit = row.row > 0 ? row.primal(i) / row.row : 0.0, basis = row.other[i];
    const double truth = averaging * basis + (1 - averaging) * unit;
    if (!right(row.out[i], truth, 2 * std::fabs(basis) + 2 * std::fabs(unit))) return false;
  }
  return true;
}

bool advance(const Row& row, dbf_factor::Advance by) {
  std::copy(row.point.begin(), row.point.end(), row.out.data());
  const float own = dbf_factor::advance_row(row.out.data(), row.size(), row.other.data(), by, row.count);
  double sum = 0.0, terms = 0.0;
  for (int64_t i = 0; i < row.count; ++i) {
    const double parts[] = {by.of_point * static_cast<double>(row.point[i]), by.of_primal * row.primal(i),
                            by.of_step * static_cast<double>(row.other[i])};
    const double size = std::fabs(parts[0]) + std::fabs(parts[1]) + std::fabs(parts[2]);
    if (!right(row.out[i], parts[0] + parts[1] + parts[2], size)) return false;
    sum += std::fabs(row.out[i]) * static_cast<double>(row.columns[i]);
    terms += size * row.columns[i];
  }
  return check::near(own, sum, row.count * 0x1p-22 * terms);
}

bool magnitude(const Row& row, float weight) {
  std::copy(row.other.begin(), row.other.end(), row.out.data());
  dbf_factor::add_magnitude(row.point.data(), weight, row.count, row.out.data());
  for (int64_t i = 0; i < row.count; ++i) {
    const double part = static_cast<double>(weight) * std::fabs(row.point[i]);
    if (!right(row.out[i], row.other[i] + part, std::fabs(row.other[i]) + part)) return false;
  }
  return true;
}

bool rounding(const Row& row) {
  dbf_factor::narrow(row.point.data(), row.count, row.halves.data());
  dbf_factor::widen(row.halves.data(), row.count, row.out.data());
  for (int64_t i = 0; i < row.count; ++i)
    if (!check::near(row.out[i], row.point[i], 0x1p-8 * std::fabs(row.point[i]))) return false;
  return true;
}

// A tile whose last row and column are the last of the memory.
bool turning(Random& random) {
  const int64_t height = 1 + check::random_up_to(random, dbf_factor::kBlock - 1);
  const int64_t width = 1 + check::random_up_to(random, dbf_factor::kTile - 1);
  Memory<float> tile((height - 1) * dbf_factor::kTile + width), out(width * height);
  Memory<uint16_t> halves(width * height);
  check::Numbers{1.0f, 1.0f, true}.fill(random, tile.data(), tile.size());
  dbf_factor::turn(tile.data(), height, width, height, out.data());
  dbf_factor::turn_narrow(tile.data(), height, width, height, halves.data());
  for (int64_t row = 0; row < height; ++row)
    for (int64_t column = 0; column < width; ++column) {
      const float value = tile[row * dbf_factor::kTile + column];
      const int64_t place = column * height + row;
      if (out[place] != value || halves[place] != dbf_factor::to_bfloat16(value)) return false;
    }
  return true;
}

void check_shape(Random& random, check::Counts& counts) {
  const Row row(random);
  std::uniform_real_distribution<float> number(-1.5f, 1.5f);
  const dbf_factor::Advance by{number(random), number(random), number(random)};
  const bool good = anchor(row, 0.93f) && rest(row, number(random)) && average(row, 0.4f) && advance(row, by) &&
                    magnitude(row, std::fabs(number(random))) && rounding(row) && turning(random);
  if (!good) std::printf("  wrong: a row of %lld\n", static_cast<long long>(row.count));
  counts["portable"].first += !good;
  ++counts["portable"].second;
}

}  // namespace

int main(int count, char** arguments) { return check::run(count, arguments, check_shape); }
