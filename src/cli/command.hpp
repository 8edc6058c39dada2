#pragma once

#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/error.hpp"
#include "base/json.hpp"

namespace bitwright {

/// An option of one command, declared once: parsing, checks and --help come from this row.
struct Option {
  enum class Type : uint8_t { flag, text, integer, number, size, names };
  std::string name;  ///< "--output"; "-o,--output" with a short form
  Type type;
  std::string value_name;  ///< "DIR"; empty for flags
  std::string help;
  double least = 0, most = 0;  ///< for numbers, where most > least
  std::vector<std::string> values{};
  bool required = false;
};

/// What the user typed, checked against the command's options.
class Arguments {
 public:
  std::string model;               ///< the positional MODEL, empty if the command takes none
  std::string chosen;              ///< the positional NAME, empty if none was given
  std::vector<std::string> words;  ///< all that was typed after the program's name
  OrderedJson config;              ///< --config, then --set and the options that are keys of it
  bool json = false;               ///< the result goes to stdout as one JSON document
  std::map<std::string, std::vector<std::string>, std::less<>> values;  ///< by "--name"

  bool flag(std::string_view name) const { return values.contains(name); }
  std::optional<std::string> text(std::string_view name) const;
  std::optional<int64_t> integer(std::string_view name) const;
  std::optional<double> number(std::string_view name) const;
  std::optional<uint64_t> size(std::string_view name) const;  ///< bytes
};

/// One subcommand: a row of commands.def, in a file of its own.
struct Command {
  std::string_view name, summary;
  bool takes_model = true;
  std::string_view takes_name{};  ///< what an optional NAME chooses, for --help; empty: the command takes none
  bool takes_config = false;      ///< --config, --set and every key of the configuration
  bool plans = false;             ///< with takes_config: also the options of keys that only `plan` reads
  std::vector<Option> options{};
  /// The result, as INTERFACES.md lists its fields. Text meant for stdout while running only if !arguments.json.
  OrderedJson (*run)(const Arguments& arguments, std::vector<Warning>& warnings);
  /// The result for people, on stdout.
  void (*print)(const OrderedJson& result);
  /// How a result ends the process; null: done. For results that are complete and say no all the same.
  ExitStatus (*status)(const OrderedJson& result) = nullptr;
};
std::span<const Command* const> all_commands();

/// The configuration of a command that takes one: --config, then --set, then the options that are keys of it.
OrderedJson read_config(const Command& command, const Arguments& arguments);

/// Parses, runs, prints; returns the exit status.
int run_command_line(int argc, const char* const* argv);

}  // namespace bitwright
