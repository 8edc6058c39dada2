#include "tokenizer/formats.hpp"

#include <fmt/format.h>

#include <array>
#include <nlohmann/json.hpp>

#include "base/mapped_file.hpp"
#include "tokenizer/json_part.hpp"

namespace bitwright {
namespace {

/// The token that bos_token or eos_token names: a string, or an object with its content.
std::optional<int32_t> named_token(const JsonPart& config, const char* key, const TokenizerPipeline& pipeline) {
  const std::optional<JsonPart> value = config.maybe(key);
  if (!value) return std::nullopt;
  const std::string& text = value->json.is_object() ? value->text("content") : config.text(key);
  for (const AddedToken& token : pipeline.added)
    if (token.text == text) return token.id;
  for (size_t id = 0; id < pipeline.tokens.size(); ++id)
    if (pipeline.tokens[id].known && pipeline.tokens[id].text == text) return static_cast<int32_t>(id);
  config.bad(fmt::format("{} {} is not in the vocabulary", key, shown_token(text)));
}

}  // namespace

std::span<const TokenizerFormat* const> tokenizer_formats() {
  static constexpr std::array kFormats = {
#define TOKENIZER_FORMAT(name) &name##_tokenizer,
#include "tokenizer/formats.def"
  };
  return kFormats;
}

std::optional<std::filesystem::path> file_in(const std::filesystem::path& directory, std::string_view name) {
  std::error_code unreadable;  // then it is as good as absent
  const std::filesystem::path path = directory / name;
  return std::filesystem::exists(path, unreadable) ? std::optional(path) : std::nullopt;
}

void apply_tokenizer_config(std::string_view config, const std::string& config_file, TokenizerPipeline& pipeline) {
  const Json json = parse_json(config, config_file);
  const JsonPart settings = {json, config_file, ""};
  if (const auto bos = named_token(settings, "bos_token", pipeline)) pipeline.bos = bos;
  if (const auto eos = named_token(settings, "eos_token", pipeline)) pipeline.eos = eos;
  pipeline.adds_bos = settings.flag("add_bos_token", pipeline.adds_bos);
  if (pipeline.adds_bos && !pipeline.bos) settings.bad("add_bos_token is true, but there is no bos_token");
}

void apply_tokenizer_config(const std::filesystem::path& file, TokenizerPipeline& pipeline) {
  const auto config = file_in(file.parent_path(), "tokenizer_config.json");
  if (config) apply_tokenizer_config(read_text_file(*config), config->string(), pipeline);
}

}  // namespace bitwright
