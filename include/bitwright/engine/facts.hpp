#pragma once

#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>  // a table of facts is JSON values
#include <string>
#include <string_view>
#include <vector>

#include "bitwright/json.hpp"

namespace bitwright {

/// What is known of engines, hardware, checkpoints and presets: data/*/*.json, one file each, embedded in the program.
/// A user's directory of the same shape (engines/, hardware/, checkpoints/, presets/, backends/) adds files; a document
/// there takes the place of the embedded one of its name, whatever the files are called.
class Facts {
 public:
  /// The embedded files, then those of `directory` (may be empty: none). Throws Error{"bad-facts"} naming the file and
  /// everything that is wrong with it.
  explicit Facts(const std::filesystem::path& directory = {});
  /// The embedded files and those below $BITWRIGHT_DATA, read once.
  static const Facts& standard();

  /// The document of a kind ("engines", "hardware") whose name or alias this is: letter case, '-', '_' and blanks do
  /// not matter. Throws Error{"unknown-engine"} and the like (exit status 2) with the nearest name.
  const Json& get(std::string_view kind, std::string_view name) const;
  /// The same, or null.
  const Json* find(std::string_view kind, std::string_view name) const;
  /// All documents of a kind, in the order of their names.
  std::vector<const Json*> all(std::string_view kind) const;
  /// Adds one file ("engines/mine.json"), or replaces it and the documents of its documents' names. Throws like the
  /// constructor.
  void add(const std::string& file, std::string_view text);

 private:
  void forget(std::string_view kind, std::string_view name);

  std::map<std::string, Json, std::less<>> documents_;  ///< by "engines/vllm.json"; one file may hold several in a list
};

/// What is wrong with a document's form, each with where it stands; empty: nothing. The schema test runs it over every
/// file of data/, and loading over a user's.
std::vector<std::string> check_facts(std::string_view kind, const Json& document);

/// One of the files built into the program, by its path below data/.
struct EmbeddedFile {
  std::string_view name, text;
};
std::vector<EmbeddedFile> embedded_files();

/// How names are compared: "H100 SXM", "h100-sxm" and "h100_sxm" are one.
std::string plain_name(std::string_view name);

}  // namespace bitwright
