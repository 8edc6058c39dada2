#include "engine/matrix.hpp"

#include <gtest/gtest.h>

#include <map>

#include "tests/support.hpp"

namespace bitwright {
namespace {

/// What the documents hold between the marks of a kind ("table", "file"), by the name in the mark.
std::map<std::string, std::string, std::less<>> marked(const std::string& kind) {
  const std::string begin = "<!-- " + kind + " ", end = "<!-- /" + kind + " -->", close = " -->\n";
  std::map<std::string, std::string, std::less<>> held;
  for (const char* path : {"docs/precision-fields.md", "docs/precision-guide.md", "docs/containers.md"}) {
    const std::string document = test::read_file(path);
    for (size_t at = 0; (at = document.find(begin, at)) != std::string::npos;) {
      const size_t name = at + begin.size(), text = document.find(close, name), last = document.find(end, name);
      if (text == std::string::npos || last == std::string::npos || last < text + close.size()) {
        ADD_FAILURE() << path << ": a mark of kind " << kind << " is not closed";
        return {};
      }
      held[document.substr(name, text - name)] = document.substr(text + close.size(), last - text - close.size());
      at = last;
    }
  }
  return held;
}

TEST(FactsTables, DocumentationHoldsWhatTheFactsSay) {
  auto held = marked("table");
  for (const FactsTable& table : facts_tables()) {
    const auto found = held.find(table.name);
    ASSERT_NE(found, held.end()) << table.name;
    EXPECT_EQ(found->second, table.markdown(Facts::standard())) << "scripts/docs_tables.sh writes it";
    held.erase(found);
  }
  EXPECT_TRUE(held.empty()) << "no table is called " << held.begin()->first;
}

TEST(FactsTables, DocumentationShowsTheExamplesAsTheyAre) {
  const auto held = marked("file");
  EXPECT_GE(held.size(), 4U);  // a preset, a custom configuration, an override, several presets
  for (const auto& [path, text] : held)
    EXPECT_EQ(text, "```yaml\n" + test::read_file(path) + "```\n") << "scripts/docs_tables.sh writes it";
}

TEST(PrecisionMatrix, EveryValueOfEveryFieldHasARow) {
  const std::string table = precision_matrix("t4");
  for (const std::string& field : field_names())
    for (const std::string& value : field_values(field)) {
      if (value == "auto") continue;
      EXPECT_NE(table.find("| " + field + " | " + value + " |"), std::string::npos) << field << " " << value;
    }
  EXPECT_NE(table.find("**HW_UNSUPPORTED**"), std::string::npos);  // a T4 has no bfloat16
}

}  // namespace
}  // namespace bitwright
