// 16-bit numbers: every value there and back, and rounding.
#include "core/half.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>

namespace flashprefill::test {
namespace {

TEST(Half, EveryF16AndBf16SurvivesTheWayToFloatAndBack) {
  for (uint32_t x = 0; x < 65536; ++x) {
    const auto bits = static_cast<uint16_t>(x);
    if (std::isnan(FromF16(bits))) {
      EXPECT_TRUE(std::isnan(FromF16(ToF16(FromF16(bits))))) << x;
    } else {
      EXPECT_EQ(ToF16(FromF16(bits)), bits);
    }
    if (std::isnan(FromBf16(bits))) {
      EXPECT_TRUE(std::isnan(FromBf16(ToBf16(FromBf16(bits))))) << x;
    } else {
      EXPECT_EQ(ToBf16(FromBf16(bits)), bits);
    }
  }
}

// Between two neighbours a float goes to the nearer one, from the middle to the one with an even last bit.
TEST(Half, FloatsRoundToTheNearestAndTiesToEven) {
  for (uint16_t x = 0; x < 0x7bff; ++x) { // finite f16 values whose successor is finite
    const double low = FromF16(x), high = FromF16(static_cast<uint16_t>(x + 1)), middle = (low + high) / 2;
    const auto up = static_cast<uint16_t>(x + 1);
    EXPECT_EQ(ToF16(static_cast<float>(middle)), x % 2 ? up : x);
    EXPECT_EQ(ToF16(std::nextafter(static_cast<float>(middle), 0.0f)), x);
    EXPECT_EQ(ToF16(std::nextafter(static_cast<float>(middle), 1e30f)), up);
  }
  EXPECT_EQ(ToF16(65519.99f), 0x7bff);
  EXPECT_EQ(ToF16(65520.0f), 0x7c00);
  for (uint32_t x = 0; x < 0x7f7f; x += 3) {
    const auto down = static_cast<uint16_t>(x), up = static_cast<uint16_t>(x + 1);
    const float middle = std::bit_cast<float>((x << 16) | 0x8000u);
    EXPECT_EQ(ToBf16(middle), x % 2 ? up : down);
    EXPECT_EQ(ToBf16(std::bit_cast<float>((x << 16) | 0x7fffu)), down);
    EXPECT_EQ(ToBf16(std::bit_cast<float>((x << 16) | 0x8001u)), up);
  }
}

} // namespace
} // namespace flashprefill::test
