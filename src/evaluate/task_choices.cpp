#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <nlohmann/json.hpp>

#include "base/error.hpp"
#include "evaluate/task.hpp"
#include "evaluate/white_space.hpp"

namespace bitwright {
namespace {

[[noreturn]] void fail(const std::string& why) { throw Error({.why = why}); }

const std::string& text_of(const Json& line, const char* key) {
  const auto found = line.find(key);
  if (found == line.end() || !found->is_string()) fail(fmt::format("it has no string \"{}\"", key));
  return found->get_ref<const std::string&>();
}

std::vector<std::string> texts_of(const Json& line, const char* key) {
  const auto found = line.find(key);
  const auto is_text = [](const Json& item) { return item.is_string(); };
  if (found == line.end() || !found->is_array() || !std::ranges::all_of(*found, is_text))
    fail(fmt::format("it has no \"{}\", a list of strings", key));
  return found->get<std::vector<std::string>>();
}

/// A number, or a string with one.
int64_t number_of(const Json& line, const char* key) {
  const auto found = line.find(key);
  if (found != line.end() && found->is_number_integer() && found->get<int64_t>() >= 0) return found->get<int64_t>();
  int64_t number = -1;
  if (found != line.end() && found->is_string()) {
    const auto& text = found->get_ref<const std::string&>();
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
    if (error != std::errc() || end != text.data() + text.size()) number = -1;
  }
  if (number < 0) fail(fmt::format("it has no number \"{}\"", key));
  return number;
}

/// Each choice, after a space, follows the same context.
Example after(const std::string& context, const std::vector<std::string>& choices, int64_t answer) {
  Example example = {.requests = {}, .answer = answer};
  for (const std::string& choice : choices) {
    const auto continues = [](char c) { return (static_cast<unsigned char>(c) & 0xc0U) == 0x80; };
    const auto characters = choice.size() - static_cast<size_t>(std::ranges::count_if(choice, continues));
    example.requests.push_back({.context = context, .continuation = " " + choice, .characters = characters});
  }
  return example;
}

std::string question(const std::string& text) { return "Question: " + text + "\nAnswer:"; }

// The forms in which such questions are published, each as lm-evaluation-harness asks it.

/// {"context", "choices", "answer"}, the context as it is; or {"question", "choices", "answer"}
Example read_plain(const Json& line) {
  const std::string context = line.contains("context") ? text_of(line, "context") : question(text_of(line, "question"));
  return after(context, texts_of(line, "choices"), number_of(line, "answer"));
}

/// ARC, OpenBookQA: {"question" or "question_stem", "choices": {"text", "label"}, "answerKey"}
Example read_labelled(const Json& line) {
  const std::vector<std::string> labels = texts_of(line["choices"], "label");
  const auto right = std::ranges::find(labels, text_of(line, "answerKey"));
  if (right == labels.end()) fail("its \"answerKey\" is none of its labels");
  const std::string context =
      line.contains("question") ? question(text_of(line, "question")) : text_of(line, "question_stem");
  const std::vector<std::string> choices = texts_of(line["choices"], "text");
  if (choices.size() != labels.size()) fail("it has not as many labels as choices");
  return after(context, choices, right - labels.begin());
}

/// Without the marks that WikiHow's articles left in HellaSwag.
std::string cleaned(std::string_view raw) {
  std::string text(stripped(raw));
  const auto replace = [&](std::string_view old, std::string_view by) {
    for (size_t at = text.find(old); at != text.npos; at = text.find(old, at + by.size()))
      text.replace(at, old.size(), by);
  };
  replace(" [title]", ". ");
  for (size_t open = text.find('['); open != text.npos; open = text.find('[', open)) {
    const size_t close = text.find_first_of("]\n", open);  // a mark ends on its line
    if (close == text.npos || text[close] == '\n')
      ++open;
    else
      text.erase(open, close + 1 - open);
  }
  replace("  ", " ");
  return text;
}

/// HellaSwag: {"activity_label", "ctx_a" and "ctx_b" or "ctx", "endings", "label"}
Example read_hellaswag(const Json& line) {
  std::string context;
  if (line.contains("ctx_a") && line.contains("ctx_b")) {
    std::string second = text_of(line, "ctx_b");
    for (size_t i = 0; i < second.size(); ++i) {
      const char c = second[i];
      if (i == 0 && c >= 'a' && c <= 'z') second[i] = static_cast<char>(c - 'a' + 'A');
      if (i != 0 && c >= 'A' && c <= 'Z') second[i] = static_cast<char>(c - 'A' + 'a');
    }
    context = text_of(line, "ctx_a") + " " + second;
  } else {
    context = text_of(line, "ctx");
  }
  if (line.contains("activity_label")) context = text_of(line, "activity_label") + ": " + context;
  std::vector<std::string> endings;
  for (const std::string& ending : texts_of(line, "endings")) endings.push_back(cleaned(ending));
  return after(cleaned(context), endings, number_of(line, "label"));
}

/// PIQA: {"goal", "sol1", "sol2", "label"}
Example read_piqa(const Json& line) {
  return after(question(text_of(line, "goal")), {text_of(line, "sol1"), text_of(line, "sol2")},
               number_of(line, "label"));
}

/// Winogrande: {"sentence" with a "_", "option1", "option2", "answer": "1" or "2"}: the options stand in the context.
Example read_winogrande(const Json& line) {
  const std::string& sentence = text_of(line, "sentence");
  const size_t gap = sentence.find('_');
  if (gap == sentence.npos) fail("its \"sentence\" has no gap \"_\"");
  const std::string rest(stripped(std::string_view(sentence).substr(gap + 1)));
  Example example = {.requests = {}, .answer = number_of(line, "answer") - 1};
  for (const char* option : {"option1", "option2"})
    for (Request& request : after(sentence.substr(0, gap) + text_of(line, option), {rest}, 0).requests)
      example.requests.push_back(std::move(request));
  return example;
}

struct Form {
  bool (*fits)(const Json& line);
  Example (*read)(const Json& line);
};
constexpr auto kForms = std::to_array<Form>(
    {{[](const Json& line) { return line.contains("endings"); }, read_hellaswag},
     {[](const Json& line) { return line.contains("sol1"); }, read_piqa},
     {[](const Json& line) { return line.contains("option1"); }, read_winogrande},
     {[](const Json& line) { return line.contains("choices") && line["choices"].is_object(); }, read_labelled},
     {[](const Json& line) { return line.contains("choices"); }, read_plain}});

Example read(const Json& line) {
  const auto* const form = std::ranges::find_if(kForms, [&](const Form& f) { return f.fits(line); });
  if (form == kForms.end()) fail("it has no \"choices\"");
  Example example = form->read(line);
  const auto is_empty = [](const Request& r) { return r.characters == 0; };
  if (example.requests.size() < 2 || std::ranges::any_of(example.requests, is_empty)) fail("it has an empty choice");
  if (example.answer < 0 || example.answer >= std::ssize(example.requests))
    fail(fmt::format("answer {} is none of its {} choices", example.answer, example.requests.size()));
  return example;
}

/// The first of the best.
int64_t best(const Example& example, std::span<const Reply> replies, bool normalized) {
  const auto value = [&](size_t i) {
    return normalized ? replies[i].log_likelihood / static_cast<double>(example.requests[i].characters)
                      : replies[i].log_likelihood;
  };
  size_t found = 0;
  for (size_t i = 1; i < replies.size(); ++i)
    if (value(i) > value(found)) found = i;
  return static_cast<int64_t>(found);
}

int64_t pick(const Example& example, std::span<const Reply> replies) { return best(example, replies, false); }

double accuracy_normalized(std::span<const Example> examples, const std::vector<std::vector<Reply>>& replies) {
  double right = 0;
  for (size_t i = 0; i < examples.size(); ++i)
    right += best(examples[i], replies[i], true) == examples[i].answer ? 1 : 0;
  return right / static_cast<double>(examples.size());
}

}  // namespace

extern const Task choices_task;
const Task choices_task = {.name = "choices",
                           .source = "lm-evaluation-harness, multiple_choice; normalized by characters",
                           .read = read,
                           .pick = pick,
                           .second_name = "accuracy_normalized",
                           .second = accuracy_normalized};

}  // namespace bitwright
