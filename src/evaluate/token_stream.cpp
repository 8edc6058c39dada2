#include <fmt/format.h>

#include <nlohmann/json.hpp>

#include "base/error.hpp"
#include "evaluate/evaluate.hpp"
#include "evaluate/white_space.hpp"

extern "C" const char bitwright_bundled_text[], bitwright_bundled_text_end[];  // bundled_text.S

namespace bitwright {
namespace {

/// Calls `each` with the parts of `text` between separators; with all of it where the separator is empty.
template <class Each>
void for_each_part(std::string_view text, std::string_view separator, const Each& each) {
  const auto next = [&] { return separator.empty() ? text.npos : text.find(separator); };
  for (size_t end = next(); end != text.npos; end = next()) {
    each(text.substr(0, end));
    text.remove_prefix(end + separator.size());
  }
  each(text);
}

/// The member "text" of a JSON object that fills a line, or nothing.
std::optional<std::string> text_of(std::string_view line) {
  if (!line.starts_with('{')) return std::nullopt;
  try {
    Json object = parse_json(line, "");
    if (const auto it = object.find("text"); it != object.end() && it->is_string()) return it->get<std::string>();
  } catch (const Error&) {
  }
  return std::nullopt;
}

/// The documents of JSON Lines; none where the first line that is not empty says that `text` is something else.
std::vector<std::string> json_lines(std::string_view text) {
  const std::string_view begin = stripped(text);
  if (!text_of(stripped(begin.substr(0, begin.find('\n'))))) return {};
  std::vector<std::string> documents;
  size_t number = 0;
  for_each_part(text, "\n", [&](std::string_view line) {
    ++number;
    line = stripped(line);
    if (line.empty()) return;
    std::optional<std::string> document = text_of(line);
    if (!document)
      throw Error({.code = "bad-text",
                   .what = "cannot read JSON Lines",
                   .where = fmt::format("line {}", number),
                   .why = "it is no JSON object with a string \"text\", as the first line is",
                   .fix = "give a document a line, or plain text"});
    documents.push_back(std::move(*document));
  });
  return documents;
}

}  // namespace

std::vector<int32_t> token_stream(const Tokenizer& tokenizer, std::string_view text, const Protocol& protocol) {
  const bool with_bos = protocol.bos == Protocol::Bos::document;
  if (with_bos && !tokenizer.bos_id())
    throw Error({.code = "no-bos",
                 .what = "cannot encode text",
                 .why = "the tokenizer names no BOS token to begin documents with",
                 .fix = "give another --bos"});
  std::vector<int32_t> stream;
  const auto add = [&](std::string_view document) {
    if (document.empty()) return;
    if (with_bos) stream.push_back(*tokenizer.bos_id());
    const std::vector<int32_t> ids = tokenizer.encode(document);
    stream.insert(stream.end(), ids.begin(), ids.end());
  };
  const auto add_stripped = [&](std::string_view document) { add(stripped(document)); };
  const std::vector<std::string> lines = json_lines(text);
  if (lines.empty() && protocol.split.empty()) add(text);  // nothing was cut apart: there are no ends to clean up
  if (lines.empty() && !protocol.split.empty()) for_each_part(text, protocol.split, add_stripped);
  for (const std::string& line : lines) for_each_part(line, protocol.split, add_stripped);
  return stream;
}

std::string_view bundled_text() {
  return {bitwright_bundled_text, static_cast<size_t>(bitwright_bundled_text_end - bitwright_bundled_text)};
}

}  // namespace bitwright
