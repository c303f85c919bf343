// 16- and 8-bit numbers: every value there and back, and rounding.
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

TEST(Half, E4M3) {
  EXPECT_EQ(FromE4M3(0x01), 0x1p-9f); // the least subnormal
  EXPECT_EQ(FromE4M3(0x07), 7 * 0x1p-9f);
  EXPECT_EQ(FromE4M3(0x08), 0x1p-6f);
  EXPECT_EQ(FromE4M3(0x38), 1.0f);
  EXPECT_EQ(FromE4M3(0xbc), -1.5f);
  EXPECT_EQ(FromE4M3(0x7e), 448.0f);
  EXPECT_TRUE(std::isnan(FromE4M3(0x7f)) && std::isnan(FromE4M3(0xff)));
  EXPECT_TRUE(std::isnan(FromE4M3(ToE4M3(std::nanf("")))));
  EXPECT_EQ(ToE4M3(1e30f), 0x7e);
  EXPECT_EQ(ToE4M3(-500.0f), 0xfe);
  for (uint32_t x = 0; x < 256; ++x) {
    const auto bits = static_cast<uint8_t>(x);
    if ((x & 0x7f) != 0x7f) {
      EXPECT_EQ(ToE4M3(FromE4M3(bits)), bits);
    }
  }
  for (uint32_t x = 0; x < 0x7e; ++x) { // to the nearer neighbour, from the middle to the even one
    const auto down = static_cast<uint8_t>(x), up = static_cast<uint8_t>(x + 1);
    const float middle = (FromE4M3(down) + FromE4M3(up)) / 2;
    EXPECT_EQ(ToE4M3(middle), x % 2 ? up : down);
    EXPECT_EQ(ToE4M3(std::nextafter(middle, 0.0f)), down);
    EXPECT_EQ(ToE4M3(std::nextafter(middle, 1e30f)), up);
  }
}

} // namespace
} // namespace flashprefill::test
