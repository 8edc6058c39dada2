#include "engine/matrix.hpp"

#include <gtest/gtest.h>

#include "tests/support.hpp"

namespace bitwright {
namespace {

TEST(PrecisionMatrix, DocumentationHoldsWhatTheTablesSay) {
  const std::string document = test::read_file("docs/precision-fields.md");
  EXPECT_NE(document.find(precision_matrix()), std::string::npos) << "bitwright engines --matrix prints the table";
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
