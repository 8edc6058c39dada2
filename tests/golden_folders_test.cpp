#include <gtest/gtest.h>

#include <algorithm>
#include <iostream>
#include <set>
#include <string>

#include "tests/support.hpp"

namespace bitwright {
namespace {

// A container is not done while a folder of its owner's files has no test: the table is that of the tests themselves.
TEST(Golden, every_folder_has_its_test) {
  const std::set<std::string> not_yet = {
#define NOT_YET(folder) #folder,
#include "tests/golden_not_yet.def"
  };
  std::set<std::string> tests;
  const testing::UnitTest& all = *testing::UnitTest::GetInstance();
  for (int s = 0; s < all.total_test_suite_count(); ++s)
    for (int t = 0; t < all.GetTestSuite(s)->total_test_count(); ++t)
      if (std::string_view(all.GetTestSuite(s)->name()) == "Golden")
        tests.insert(all.GetTestSuite(s)->GetTestInfo(t)->name());
  const auto golden = test::shared_dir() / "golden";
  if (!std::filesystem::is_directory(golden)) GTEST_SKIP() << "no golden cases here";
  size_t folders = 0;
  for (const auto& entry : std::filesystem::directory_iterator(golden)) {
    if (!entry.is_directory()) continue;
    const std::string name = entry.path().filename().string();
    ++folders;
    EXPECT_NE(tests.contains(name), not_yet.contains(name))
        << name << ": write TEST(Golden, " << name << "), and take it out of golden_not_yet.def";
  }
  std::cout << "not yet: " << not_yet.size() << "\ncases: " << folders << '\n';
}

}  // namespace
}  // namespace bitwright
