#include "engine/container_tables.hpp"

#include <gtest/gtest.h>

#include "container/container.hpp"

namespace bitwright {
namespace {

/// The section of a container.
std::string section_of(std::string_view name) {
  static const std::string all = containers_sections(Facts::standard());
  const std::string title = "## " + std::string(name) + "\n";
  const size_t begin = all.find(title);
  if (begin == std::string::npos) return "";
  return all.substr(begin, all.find("\n## ", begin + 1) - begin);
}

TEST(ContainerTables, EveryContainerThatIsWrittenSaysHowItRounds) {
  for (const Container* c : all_containers()) {
    EXPECT_EQ(c->rounding.empty(), c->write_metadata == nullptr) << c->name;
    EXPECT_NE(section_of(c->name).find("Engines"), std::string::npos) << c->name;
    EXPECT_NE(section_of(c->name).find(c->rounding), std::string::npos) << c->name;
  }
}

TEST(ContainerTables, WhatIsRefusedIsSaidInTheContainersOwnWords) {
  const std::string awq = section_of("awq");
  EXPECT_NE(awq.find("- 1000 outputs: 1000 out-features are no multiple of 32\n"), std::string::npos) << awq;
  EXPECT_NE(awq.find("`--method nf4`"), std::string::npos) << awq;
  EXPECT_NE(section_of("gptq").find("a row\n"), std::string::npos);  // "…, not 48" is cut
  EXPECT_NE(section_of("mxfp4").find("kept in floats"), std::string::npos);
}

TEST(ContainerTables, TheFewestOptionsAreFound) {
  EXPECT_NE(section_of("bitsandbytes").find("| `--format` alone | nf4"), std::string::npos);
  EXPECT_NE(section_of("bitsandbytes").find("| `--method fp4` | fp4"), std::string::npos);
  EXPECT_NE(section_of("bitsandbytes").find("| `--method int8` | int8"), std::string::npos);
  EXPECT_NE(section_of("fp8").find("| `--granularity tensor` | float8_e4m3"), std::string::npos);
}

}  // namespace
}  // namespace bitwright
