#include <fmt/format.h>
#include <fmt/ranges.h>
#include <malloc.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <array>
#include <cerrno>
#include <charconv>
#include <cstdio>
#include <cstring>
#include <exception>
#include <filesystem>
#include <new>
#include <system_error>

#include "base/mapped_file.hpp"
#include "base/nearest.hpp"
#include "base/progress.hpp"
#include "base/size.hpp"
#include "base/threads.hpp"
#include "base/utf8.hpp"
#include "cli/command.hpp"
#include "engine/facts.hpp"
#include "recipe/config.hpp"

namespace bitwright {

#define COMMAND(name) extern const Command name##_command;
#include "cli/commands.def"

namespace {

constexpr int64_t kMaxThreads = 1024;

[[noreturn]] void usage_error(const std::string& code, const std::string& why, const std::string& fix) {
  throw Error({.code = code, .what = "bad command line", .why = why, .fix = fix, .status = ExitStatus::usage});
}

std::string long_name(std::string_view name) {
  const size_t comma = name.find(',');
  return std::string(comma == std::string_view::npos ? name : name.substr(comma + 1));
}

template <class T>
std::optional<T> parse_number(const std::string& text) {
  T value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size()) return std::nullopt;
  return value;
}

void check_option(const Option& option, const std::string& value) {
  const std::string name = long_name(option.name);
  const auto fail = [&](const std::string& why) {
    usage_error("bad-value", fmt::format("{}: '{}' {}", name, printable(value), why), "");
  };
  if (option.type == Option::Type::integer && !parse_number<int64_t>(value)) fail("is no whole number");
  if (option.type == Option::Type::number && !parse_number<double>(value)) fail("is no number");
  if (option.type == Option::Type::size && parse_size(value).value_or(0) == 0)
    fail("is no size: bytes, or with a unit (500MB, 8GiB)");
  const bool is_number = option.type == Option::Type::integer || option.type == Option::Type::number;
  if (is_number && option.most > option.least) {
    const double number = *parse_number<double>(value);
    if (!(number >= option.least && number <= option.most))
      fail(fmt::format("is not between {} and {}", option.least, option.most));
  }
  if (!option.values.empty() && std::ranges::find(option.values, value) == option.values.end())
    fail(fmt::format("is not known; valid: {}", fmt::join(option.values, ", ")));
}

/// Everywhere: --json, -q, -v, --threads.
std::span<const Option> common_options() {
  static const std::vector<Option> options = {
      {.name = "--json", .type = Option::Type::flag, .value_name = "", .help = "print one JSON document on stdout"},
      {.name = "-q,--quiet", .type = Option::Type::flag, .value_name = "", .help = "no progress, no warnings"},
      {.name = "-v,--verbose", .type = Option::Type::flag, .value_name = "", .help = "say more on stderr"},
      {.name = "--threads",
       .type = Option::Type::integer,
       .value_name = "N",
       .help = "threads to use (default: all cores)",
       .least = 1,
       .most = kMaxThreads}};
  return options;
}

Option option_row(const ConfigKey& key) {
  std::string help(key.help);
  if (!key.values.empty()) help += fmt::format(": {}", fmt::join(key.values, ", "));
  if (key.most > key.least) help += fmt::format(", {} to {}", key.least, key.most);
  if (!key.fallback.empty()) help += fmt::format(" (default: {})", key.fallback);
  const bool names = key.type == ConfigKey::Type::names, assigns = key.type == ConfigKey::Type::arguments;
  return {.name = option_of(key),
          .type = names || assigns ? Option::Type::names : Option::Type::text,
          .value_name = names                                  ? "A,B"
                        : assigns                              ? "NAME=VALUE"
                        : key.type == ConfigKey::Type::integer ? "N"
                                                               : "X",
          .help = help};
}

/// Is it an option of this command?
bool offers(const Command& command, const ConfigKey& key) {
  return !option_of(key).empty() && (command.plans || !key.plan_only);
}

std::vector<Option> config_options(const Command& command) {
  std::vector<Option> options = {
      {.name = "-c,--config", .type = Option::Type::text, .value_name = "FILE", .help = "configuration, YAML or JSON"},
      {.name = "--set",
       .type = Option::Type::names,
       .value_name = "KEY=VALUE",
       .help = "any key of the configuration by its full path; may be repeated"}};
  for (const ConfigKey& key : config_keys())
    if (offers(command, key)) options.push_back(option_row(key));
  return options;
}

std::vector<Option> options_of(const Command& command) {
  std::vector<Option> options = command.options;
  if (command.takes_config) std::ranges::copy(config_options(command), std::back_inserter(options));
  std::ranges::copy(common_options(), std::back_inserter(options));
  return options;
}

/// NAME=VALUE, or NAME alone, which is set to true.
OrderedJson assignments(const std::string& option, const std::vector<std::string>& typed) {
  OrderedJson values = OrderedJson::object();
  for (const std::string& text : typed) {
    const size_t equals = text.find('=');
    if (equals == 0)
      usage_error("bad-value", fmt::format("{}: '{}' is not NAME or NAME=VALUE", option, printable(text)), "");
    const std::string value = equals == std::string::npos ? "true" : text.substr(equals + 1);
    const bool is_flag = value == "true" || value == "false";
    values[text.substr(0, equals)] = is_flag ? OrderedJson(value == "true") : OrderedJson(value);
  }
  return values;
}

/// The typed text of one configuration option as the value its key wants.
OrderedJson config_value(const ConfigKey& key, const std::vector<std::string>& typed) {
  for (const std::string& text : typed)
    if (!is_utf8(text)) usage_error("bad-value", fmt::format("{}: it is not UTF-8", option_of(key)), "");
  if (key.type == ConfigKey::Type::names) {
    OrderedJson names = OrderedJson::array();
    for (const std::string& text : typed)
      for (size_t begin = 0; begin <= text.size();) {
        const size_t comma = std::min(text.find(',', begin), text.size());
        if (comma > begin) names.push_back(text.substr(begin, comma - begin));
        begin = comma + 1;
      }
    return names;
  }
  if (key.type == ConfigKey::Type::arguments) return assignments(option_of(key), typed);
  if (key.type == ConfigKey::Type::text) return typed.back();
  return parse_config_value(typed.back(), option_of(key));
}

/// What is typed wins; of arguments those that are not named stay.
void set_typed(OrderedJson& config, const ConfigKey& key, OrderedJson value) {
  if (const OrderedJson* before = find_config(config, key.path);
      key.type == ConfigKey::Type::arguments && before != nullptr && before->is_object()) {
    OrderedJson both = *before;
    both.update(value);
    value = std::move(both);
  }
  set_config_value(config, key.path, value);
}

/// What a file says only of what the command line replaces: the other way to name presets, another engine's version.
void drop_overtaken(OrderedJson& config, const Arguments& arguments) {
  const auto drop = [&](const char* section, const char* name) {
    if (config.contains(section) && config[section].is_object()) config[section].erase(name);
  };
  if (arguments.text("--preset")) drop("quant_config", "presets");
  if (arguments.text("--presets")) drop("quant_config", "preset");
  const auto typed = arguments.text("--engine");
  const OrderedJson* named = find_config(config, "engine.name");
  if (typed && named != nullptr &&
      Facts::standard().find("engines", named->get<std::string>()) != Facts::standard().find("engines", *typed))
    drop("engine", "version");
}

}  // namespace

OrderedJson read_config(const Command& command, const Arguments& arguments) {
  OrderedJson config = OrderedJson::object();
  if (const auto file = arguments.text("--config")) {
    config = read_config_file(*file);
    check_config(config, *file);
    drop_overtaken(config, arguments);
  }
  if (const auto set = arguments.values.find("--set"); set != arguments.values.end())
    for (const std::string& assignment : set->second) {
      const size_t equals = assignment.find('=');
      if (equals == std::string::npos || equals == 0)
        usage_error("bad-value", fmt::format("--set: '{}' is not KEY=VALUE", printable(assignment)), "");
      set_config_value(config, assignment.substr(0, equals),
                       parse_config_value(assignment.substr(equals + 1), "--set"));
    }
  check_config(config, "command line");  // before the options: short forms become long ones
  for (const ConfigKey& key : config_keys())
    if (const auto typed = arguments.values.find(option_of(key));
        offers(command, key) && typed != arguments.values.end())
      set_typed(config, key, config_value(key, typed->second));
  check_config(config, "command line");
  return config;
}

namespace {

void unknown_argument(const Command& command, const std::vector<std::string>& extras) {
  if (extras.empty()) return;
  const std::string& extra = extras.front();
  if (!extra.starts_with("-"))
    usage_error("unexpected-argument", fmt::format("unexpected argument '{}'", printable(extra)),
                fmt::format("see `bitwright {} --help`", command.name));
  std::vector<std::string> known;
  for (const Option& option : options_of(command)) known.push_back(long_name(option.name));
  usage_error("unknown-option", fmt::format("unknown option '{}'", printable(extra.substr(0, extra.find('=')))),
              suggest(extra.substr(0, extra.find('=')), known));
}

/// A CLI11 application made from the tables; what was typed lands in `arguments`.
class Parser {
 public:
  Parser() : app_("Bitwright quantizes language models and measures what it did.", "bitwright") {
    app_.set_version_flag("--version", std::string("bitwright ") + BITWRIGHT_VERSION);
    app_.allow_extras();
    app_.require_subcommand(0, 1);
    add_options("", common_options(), app_);  // they may stand before the command too
    for (const Command* command : all_commands()) add(*command);
  }

  /// Null if all was said by printing (--help, --version).
  const Command* parse(int argc, const char* const* argv, Arguments& arguments) {
    try {
      app_.parse(argc, argv);
    } catch (const CLI::Success& done) {
      app_.exit(done);
      return nullptr;
    } catch (const CLI::ParseError& error) {
      usage_error("bad-usage", error.what(), "see `bitwright --help`");
    }
    for (const auto& [command, sub] : subcommands_)
      if (sub->parsed()) {
        unknown_argument(*command, app_.remaining());
        unknown_argument(*command, sub->remaining());
        collect("", common_options(), app_, arguments);
        collect(command->name, options_of(*command), *sub, arguments);
        finish(*command, arguments);
        return command;
      }
    no_command(app_.remaining());
  }

 private:
  void add(const Command& command) {
    CLI::App* sub = app_.add_subcommand(std::string(command.name), std::string(command.summary));
    sub->allow_extras();
    // A missing MODEL may come from the configuration; whoever needs it says so.
    if (command.takes_model)
      sub->add_option("MODEL", model_, "directory, or a file of weights (.safetensors, .gguf, .pt, .npz)")
          ->type_name("");
    if (!command.takes_name.empty()) sub->add_option("NAME", name_, std::string(command.takes_name))->type_name("");
    add_options(command.name, options_of(command), *sub);
    subcommands_.emplace_back(&command, sub);
  }

  void add_options(std::string_view command, std::span<const Option> options, CLI::App& app) {
    for (const Option& option : options) {
      std::vector<std::string>& typed = typed_[std::string(command) + long_name(option.name)];
      if (option.type == Option::Type::flag) {
        app.add_flag(option.name, option.help);
      } else {
        CLI::Option* added = app.add_option(option.name, typed, option.help)->type_name(option.value_name);
        added->expected(1)->allow_extra_args(false);  // else "[a, b]" would be taken apart
        if (option.type == Option::Type::names)
          added->multi_option_policy(CLI::MultiOptionPolicy::TakeAll);
        else
          added->multi_option_policy(CLI::MultiOptionPolicy::TakeLast);
      }
    }
  }

  void collect(std::string_view command, std::span<const Option> options, const CLI::App& app, Arguments& arguments) {
    for (const Option& option : options) {
      const std::string name = long_name(option.name);
      if (app.get_option(name)->count() > 0) {
        arguments.values[name] = typed_[std::string(command) + name];
        for (const std::string& value : arguments.values[name]) check_option(option, value);
      } else if (option.required) {
        usage_error("missing-option", fmt::format("{} is required", name),
                    fmt::format("see `bitwright {} --help`", command));
      }
    }
  }

  void finish(const Command& command, Arguments& arguments) const {
    arguments.json = arguments.flag("--json");
    arguments.model = model_;
    arguments.chosen = name_;
    if (command.takes_config) arguments.config = read_config(command, arguments);
    if (const OrderedJson* model = find_config(arguments.config, "model"); model != nullptr && arguments.model.empty())
      arguments.model = model->get<std::string>();
    if (command.takes_model && arguments.model.empty())
      usage_error("missing-model", "no MODEL is given", fmt::format("see `bitwright {} --help`", command.name));
  }

  [[noreturn]] static void no_command(const std::vector<std::string>& extras) {
    if (extras.empty()) usage_error("no-command", "no command is given", "see `bitwright --help`");
    std::vector<std::string> known;
    for (const Command* command : all_commands()) known.emplace_back(command->name);
    usage_error("unknown-command", fmt::format("unknown command '{}'", printable(extras.front())),
                suggest(extras.front(), known));
  }

  CLI::App app_;
  std::string model_, name_;
  std::map<std::string, std::vector<std::string>> typed_;  ///< by command and option
  std::vector<std::pair<const Command*, CLI::App*>> subcommands_;
};

void apply_common(const Arguments& arguments) {
  if (const auto threads = arguments.integer("--threads")) set_thread_count(static_cast<size_t>(*threads));
  if (arguments.flag("--quiet")) set_verbosity(Verbosity::quiet);
  if (arguments.flag("--verbose")) set_verbosity(Verbosity::verbose);
}

/// fmt::print would throw where the reader has gone or the disk is full; whoever prints checks with flush_output.
void print_json(const OrderedJson& document) {
  const std::string text = document.dump(2, ' ', false, OrderedJson::error_handler_t::replace) + "\n";
  std::fwrite(text.data(), 1, text.size(), stdout);
}

void flush_output() {
  if (std::fflush(stdout) != 0 || std::ferror(stdout) != 0)
    throw Error({.code = "cannot-write", .what = "cannot write to standard output", .why = std::strerror(errno)});
}

void print_warnings(const std::vector<Warning>& warnings) {
  if (verbosity() == Verbosity::quiet) return;
  for (const Warning& warning : warnings)
    fmt::print(stderr, "warning[{}]: {}\n", warning.code, printable(warning.message, 2000));
}

ExitStatus run_command(const Command& command, const Arguments& arguments) {
  std::vector<Warning> warnings;
  OrderedJson result;
  try {
    result = command.run(arguments, warnings);
  } catch (...) {
    print_warnings(warnings);
    throw;
  }
  print_warnings(warnings);
  if (arguments.json) {
    OrderedJson& list = result["warnings"] = OrderedJson::array();
    for (const Warning& warning : warnings) list.push_back({{"code", warning.code}, {"message", warning.message}});
    print_json(result);
  } else {
    command.print(result);
  }
  flush_output();
  return command.status != nullptr ? command.status(result) : ExitStatus::done;
}

int report(const Error& error, bool json) {
  fmt::print(stderr, "error: {}\n", error.what());
  if (json) {
    print_json({{"error", {{"code", error.code()}, {"message", error.what()}}}});
    std::fflush(stdout);
  }
  return static_cast<int>(error.status());
}

}  // namespace

std::span<const Command* const> all_commands() {
#define COMMAND(name) &name##_command,
  static const std::array all = {
#include "cli/commands.def"
  };
  return all;
}

std::optional<std::string> Arguments::text(std::string_view name) const {
  const auto found = values.find(name);
  return found == values.end() || found->second.empty() ? std::nullopt : std::optional(found->second.back());
}

std::optional<int64_t> Arguments::integer(std::string_view name) const {
  const auto found = text(name);
  return found ? parse_number<int64_t>(*found) : std::nullopt;
}

std::optional<double> Arguments::number(std::string_view name) const {
  const auto found = text(name);
  return found ? parse_number<double>(*found) : std::nullopt;
}

std::optional<uint64_t> Arguments::size(std::string_view name) const {
  const auto found = text(name);
  return found ? parse_size(*found) : std::nullopt;
}

namespace {

/// Work goes in pieces of a few megabytes: given back to the system after each and taken anew, every page would be
/// cleared and mapped again each time, which costs more than the work.
void keep_freed_memory() {
  constexpr int kLargest = 16 << 20;  // larger blocks are rare, and are given back
  ::mallopt(M_MMAP_THRESHOLD, kLargest);
  ::mallopt(M_TRIM_THRESHOLD, 2 * kLargest);
}

}  // namespace

int run_command_line(int argc, const char* const* argv) {
  install_interrupt_handler();
  install_bus_error_handler();
  keep_freed_memory();
  // Known before parsing, so that an error in parsing is reported the way that was asked for.
  const bool json = std::any_of(argv, argv + argc, [](std::string_view word) { return word == "--json"; });
  try {
    Parser parser;
    Arguments arguments;
    arguments.words.assign(argv + 1, argv + argc);
    const Command* command = parser.parse(argc, argv, arguments);
    if (command == nullptr) return static_cast<int>(ExitStatus::done);
    apply_common(arguments);
    return static_cast<int>(run_command(*command, arguments));
  } catch (const Error& error) {
    return report(error, json);
  } catch (const std::filesystem::filesystem_error& error) {
    return report(Error({.code = "file-system",
                         .what = "cannot use file",
                         .where = error.path1().string(),
                         .why = error.code().message()}),
                  json);
  } catch (const std::bad_alloc&) {
    return report(
        Error(
            {.code = "out-of-memory", .what = "out of memory", .fix = "close other programs or use a larger machine"}),
        json);
  } catch (const std::system_error& error) {
    return report(Error({.code = "system", .what = "the system refused", .why = error.what()}), json);
  } catch (const std::exception& error) {
    return report(Error({.code = "internal", .what = "internal error", .why = error.what(), .fix = "please report it"}),
                  json);
  }
}

}  // namespace bitwright
