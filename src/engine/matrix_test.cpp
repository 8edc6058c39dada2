#include "engine/matrix.hpp"

#include <gtest/gtest.h>

#include <map>

#include "tests/support.hpp"

namespace bitwright {
namespace {

/// What a document holds between the marks of a table, by the table's name.
std::map<std::string, std::string, std::less<>> tables_in(const std::string& document) {
  constexpr std::string_view kBegin = "<!-- table ", kEnd = "<!-- /table -->";
  std::map<std::string, std::string, std::less<>> tables;
  for (size_t at = 0; (at = document.find(kBegin, at)) != std::string::npos;) {
    const size_t name = at + kBegin.size(), text = document.find(" -->\n", name), end = document.find(kEnd, at);
    if (text == std::string::npos || end == std::string::npos || end < text) return {};
    const size_t first = text + std::string_view(" -->\n").size();
    tables[document.substr(name, text - name)] = document.substr(first, end - first);
    at = end;
  }
  return tables;
}

TEST(FactsTables, DocumentationHoldsWhatTheFactsSay) {
  auto held = tables_in(test::read_file("docs/precision-fields.md"));
  held.merge(tables_in(test::read_file("docs/precision-guide.md")));
  for (const FactsTable& table : facts_tables()) {
    const auto found = held.find(table.name);
    ASSERT_NE(found, held.end()) << table.name;
    EXPECT_EQ(found->second, table.markdown(Facts::standard())) << "scripts/docs_tables.sh writes it";
    held.erase(found);
  }
  EXPECT_TRUE(held.empty()) << "no table is called " << held.begin()->first;
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
