// GoogleTest's main with one flag more: --small runs every test on a part of its cases, for sanitizers and emulators.
#include <gtest/gtest.h>

#include <cstring>

#include "op_case.h"

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  for (int i = 1; i < argc; ++i) {
    if (std::strcmp(argv[i], "--small") == 0) {
      flashprefill::test::SetSmall(true);
    } else {
      std::fprintf(stderr, "unknown argument %s; it must be --small or one of GoogleTest's\n", argv[i]);
      return 2;
    }
  }
  return RUN_ALL_TESTS();
}
