// GoogleTest's main with one flag more: --small runs every test on a part of its cases, for sanitizers and emulators.
#include <gtest/gtest.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "cases.h"
#include "engine.h"

int main(int argc, char** argv) {
  using namespace flashprefill::test;
  testing::InitGoogleTest(&argc, argv);
  for (int i = 1; i < argc; ++i) {
    if (std::strcmp(argv[i], "--small") == 0) {
      SetSmall(true);
    } else {
      std::fprintf(stderr, "unknown argument %s; it must be --small or one of GoogleTest's\n", argv[i]);
      return 2;
    }
  }
  // Thousands of small parallel regions, under ctest in several processes at once: threads that spin between them would
  // take the cores from each other (six times the time on a busy machine). OpenMP reads this when it is first used.
  setenv("OMP_WAIT_POLICY", "passive", 0);
  if (!testing::GTEST_FLAG(list_tests)) {
    std::printf("backends:");
    for (const Engine& engine : AllEngines()) std::printf(" %s", engine.Name().c_str());
    std::printf("\n");
  }
  return RUN_ALL_TESTS();
}
