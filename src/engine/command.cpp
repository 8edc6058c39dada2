#include <fmt/format.h>

#include <algorithm>

#include "engine/condition.hpp"
#include "engine/parameters.hpp"
#include "engine/plan.hpp"

namespace bitwright {
namespace {

/// A JSON value as Python writes it.
std::string python_text(const Json& value) {
  if (value.is_null()) return "None";
  if (value.is_boolean()) return value.get<bool>() ? "True" : "False";
  if (!value.is_structured()) return value.dump(-1, ' ', true, Json::error_handler_t::replace);
  std::string text;
  for (const auto& [key, element] : value.items())
    text += (text.empty() ? "" : ", ") + (value.is_object() ? python_text(key) + ": " : "") + python_text(element);
  return value.is_object() ? "{" + text + "}" : "[" + text + "]";
}

std::string python_name(std::string_view flag) {
  std::string name(without_dashes(flag));
  for (char& c : name) c = c == '-' ? '_' : c;
  return name;
}

/// name=value; what Python would not take for a name, and a user may have typed, goes through a dictionary.
std::string keyword(const std::string& name, const std::string& value) {
  constexpr std::string_view kLetters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ_0123456789";
  const bool is_name = !name.empty() && name.find_first_not_of(kLetters) == std::string::npos &&
                       kLetters.substr(0, kLetters.size() - 10).find(name[0]) != std::string_view::npos;
  return is_name ? name + "=" + value : fmt::format("**{{{}: {}}}", python_text(name), value);
}

/// "load_in_4bit=True, bnb_4bit_quant_type='nf4'" of a configuration object, without what names its class.
std::string members_text(const Json& object) {
  std::string text;
  for (const auto& [name, value] : object.items())
    if (name != "quant_method") text += (text.empty() ? "" : ", ") + keyword(name, python_text(value));
  return text;
}

/// Numbers are kept as text, as a command line has them; to Python they are numbers.
Json python_value(const Json& value) {
  if (!value.is_string()) return value;
  Json number = Json::parse(value.get_ref<const std::string&>(), nullptr, false);
  return number.is_number() ? number : value;
}

/// The keyword arguments of a Python call by their name; "a.b" is member b of a.
Json keywords(const EnginePlan& plan) {
  Json all = Json::object();
  for (const auto* arguments : {&plan.settings, &plan.args})
    for (const Argument& argument : *arguments) {
      if (argument.place == "env") continue;
      std::string name = python_name(argument.flag);
      Json* at = &all;
      for (size_t dot; (dot = name.find('.')) != std::string::npos; name.erase(0, dot + 1)) {
        Json& inner = (*at)[name.substr(0, dot)];
        if (!inner.is_object()) inner = Json::object();
        at = &inner;
      }
      (*at)[name] = python_value(argument.value);
    }
  return all;
}

/// CLASS.from_pretrained("M", dtype="bfloat16"); what is an argument of a later call stands in that call.
std::string python_command(const EnginePlan& plan, const Json& engine, std::string_view pattern,
                           std::string_view model) {
  std::string load, later, call;
  const Json arguments = keywords(plan);
  for (const auto& [name, value] : arguments.items()) {
    const Json* row = find_flag(engine, name, plan.entry);
    const bool is_object =
        row != nullptr && row->contains("classes") && value.is_object() && plan.api.contains("class");
    const std::string text =
        ", " + keyword(name, is_object ? plan.api["class"].get<std::string>() + "(" + members_text(value) + ")"
                                       : python_text(value));
    if (row != nullptr && row->contains("call")) {
      call = (*row)["call"].get<std::string>();
      later += text;
    } else {
      load += text;
    }
  }
  constexpr std::string_view kModel = "{model}";
  const size_t at = pattern.find(kModel);
  std::string text(pattern.substr(0, at));
  text += python_text(std::string(model)) + load + std::string(pattern.substr(at + kModel.size()));
  if (later.empty()) return text;
  return fmt::format("model = {}; model.{}(**inputs{})", text, call, later);
}

}  // namespace

std::string shell_word(const std::string& text) {
  constexpr std::string_view kPlain = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_=.,:/@%+";
  if (!text.empty() && text.find_first_not_of(kPlain) == std::string::npos) return text;
  std::string shell = "'";
  for (const char c : text) shell += c == '\'' ? std::string("'\\''") : std::string(1, c);
  return shell + "'";
}

std::vector<std::string> argument_words(const Argument& argument, const Json& engine) {
  if (argument.value == true) return {argument.flag};
  if (argument.value != false) return {argument.flag, value_text(argument.value)};
  const std::string negation = engine.value("negation", "");
  if (negation.empty() || !argument.given || !argument.flag.starts_with("--")) return {};
  return {negation + argument.flag.substr(2)};
}

std::string engine_command(const EnginePlan& plan, std::string_view model, const Facts& facts) {
  const Json& engine = facts.get("engines", plan.engine);
  const std::string pattern = engine["entries"].value(plan.entry, plan.entry + " {model}");
  if (pattern.find("({model}") != std::string::npos) return python_command(plan, engine, pattern, model);
  std::string command;
  for (const auto& [name, value] : plan.environment.items())
    command += fmt::format("{}={} ", name, shell_word(value_text(value)));
  command += fill_text(pattern, Json{{"model", shell_word(std::string(model))}});
  for (const Argument& argument : plan.args)
    for (const std::string& word : argument_words(argument, engine)) command += " " + shell_word(word);
  const std::string file = engine.value("config_file", "");
  const std::string option = file.substr(0, file.find(' '));
  const bool own_file = std::ranges::find(plan.args, option, &Argument::flag) != plan.args.end();
  if (!plan.config_file.empty() && !file.empty() && !own_file) command += " " + file;
  return command;
}

}  // namespace bitwright
