#include "engine/facts.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>

#include "base/error.hpp"
#include "base/json.hpp"
#include "base/nearest.hpp"

// Written by CMake from data/: name, NUL, text, NUL for each file.
extern "C" const char bitwright_facts[], bitwright_facts_end[];

namespace bitwright {
namespace {

/// Does this document answer to `name`, as its own or another, given as plain_name makes it?
bool is_called(const Json& document, const std::string& name) {
  if (plain_name(document["name"].get_ref<const std::string&>()) == name) return true;
  const auto aliases = document.find("aliases");
  return aliases != document.end() && std::ranges::any_of(*aliases, [&](const Json& alias) {
           return plain_name(alias.get_ref<const std::string&>()) == name;
         });
}

std::string_view kind_of(std::string_view file) { return file.substr(0, file.find('/')); }

template <class Visit>
void visit(const Json& file, Visit each) {
  if (!file.is_array()) return each(file);
  for (const Json& document : file) each(document);
}

}  // namespace

std::string plain_name(std::string_view name) {
  std::string plain;
  for (const char c : name) {
    if (c == '-' || c == '_' || c == ' ') continue;
    plain += c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c;
  }
  return plain;
}

std::vector<EmbeddedFile> embedded_files() {
  std::vector<EmbeddedFile> files;
  for (const char* at = bitwright_facts; at < bitwright_facts_end;) {
    const std::string_view name = at, text = at + name.size() + 1;
    files.push_back({name, text});
    at = text.data() + text.size() + 1;
  }
  return files;
}

Facts::Facts(const std::filesystem::path& directory) {
  for (const EmbeddedFile& file : embedded_files()) add(std::string(file.name), file.text);
  if (directory.empty()) return;
  if (!std::filesystem::is_directory(directory))
    throw Error({.code = "bad-facts",
                 .what = "cannot read the facts about engines and hardware",
                 .where = directory.string(),
                 .why = "there is no such directory",
                 .fix = "set or unset BITWRIGHT_DATA"});
  std::vector<std::filesystem::path> files;
  for (const auto& entry : std::filesystem::recursive_directory_iterator(directory))
    if (entry.is_regular_file() && entry.path().extension() == ".json") files.push_back(entry.path());
  std::ranges::sort(files);  // so that of two documents of one name the same is taken on every file system
  for (const std::filesystem::path& path : files) {
    std::ifstream file(path, std::ios::binary);
    const std::string text{std::istreambuf_iterator<char>(file), {}};
    add(std::filesystem::relative(path, directory).generic_string(), text);
  }
}

const Facts& Facts::standard() {
  static const Facts facts([] {
    const char* directory = std::getenv("BITWRIGHT_DATA");
    return std::filesystem::path(directory != nullptr ? directory : "");
  }());
  return facts;
}

void Facts::add(const std::string& file, std::string_view text) {
  Json parsed = parse_json(text, file);
  std::vector<std::string> problems;
  visit(parsed, [&](const Json& document) {
    std::ranges::move(check_facts(kind_of(file), document), std::back_inserter(problems));
  });
  if (!problems.empty())
    throw Error({.code = "bad-facts",
                 .what = "cannot use the facts",
                 .where = file,
                 .why = fmt::format("{}", fmt::join(problems, "; "))});
  visit(parsed, [&](const Json& document) { forget(kind_of(file), document["name"].get<std::string>()); });
  documents_.insert_or_assign(file, std::move(parsed));
}

void Facts::forget(std::string_view kind, std::string_view name) {
  const auto is_it = [plain = plain_name(name)](const Json& document) {
    return plain_name(document["name"].get_ref<const std::string&>()) == plain;
  };
  for (auto file = documents_.begin(); file != documents_.end();) {
    Json& documents = file->second;
    const bool other = kind_of(file->first) != kind;
    if (!other && documents.is_array()) std::erase_if(documents.get_ref<Json::array_t&>(), is_it);
    const bool gone = !other && (documents.is_array() ? documents.empty() : is_it(documents));
    file = gone ? documents_.erase(file) : std::next(file);
  }
}

const Json* Facts::find(std::string_view kind, std::string_view name) const {
  const std::string plain = plain_name(name);
  const std::vector<const Json*> documents = all(kind);
  for (const Json* document : documents)
    if (plain_name((*document)["name"].get_ref<const std::string&>()) == plain) return document;
  for (const Json* document : documents)
    if (is_called(*document, plain)) return document;
  return nullptr;
}

const Json& Facts::get(std::string_view kind, std::string_view name) const {
  if (const Json* document = find(kind, name)) return *document;
  std::vector<std::string> known;
  for (const Json* document : all(kind)) known.push_back((*document)["name"].get<std::string>());
  const std::string_view one = kind == "engines" ? "engine" : kind == "presets" ? "preset" : kind;
  throw Error({.code = fmt::format("unknown-{}", one),
               .what = fmt::format("unknown {}", one),
               .where = printable(name),
               .why = fmt::format("{} such names are known", known.size()),
               .fix = suggest(name, known),
               .status = ExitStatus::usage});
}

std::vector<const Json*> Facts::all(std::string_view kind) const {
  std::vector<const Json*> found;
  for (const auto& [file, document] : documents_) {
    if (kind_of(file) != kind) continue;
    visit(document, [&](const Json& one) { found.push_back(&one); });
  }
  return found;
}

}  // namespace bitwright
