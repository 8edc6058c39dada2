#include "container/gguf_file_types.hpp"

#include <algorithm>
#include <array>
#include <string>

#include "container/gguf_types.hpp"

namespace bitwright {
namespace {

constexpr auto kFileTypes = std::to_array<GgufFileType>({
    {"q8_0", 7, "Q8_0"},      {"q4_0", 2, "Q4_0"},    {"q4_1", 3, "Q4_1"},    {"q5_0", 8, "Q5_0"},
    {"q5_1", 9, "Q5_1"},      {"q2_k", 10, "Q2_K"},   {"q2_k_s", 21, "Q2_K"}, {"q3_k_s", 11, "Q3_K"},
    {"q3_k_m", 12, "Q3_K"},   {"q3_k_l", 13, "Q3_K"}, {"q4_k_s", 14, "Q4_K"}, {"q4_k_m", 15, "Q4_K"},
    {"q5_k_s", 16, "Q5_K"},   {"q5_k_m", 17, "Q5_K"}, {"q6_k", 18, "Q6_K"},   {"iq4_nl", 25, "IQ4_NL"},
    {"iq4_xs", 30, "IQ4_XS"}, {"tq1_0", 36, "TQ1_0"}, {"tq2_0", 37, "TQ2_0"}, {"mxfp4", 38, "MXFP4"},
    {"nvfp4", 39, "NVFP4"},   {"f32", 0, "F32"},      {"f16", 1, "F16"},      {"bf16", 32, "BF16"},
});

// ---- which tensors get another type

enum class Part { attn_v, attn_k, attn_q, attn_output, ffn_down, other };

/// "blk.3.attn_v.weight"; q, k and v in one matrix count as v.
Part part_of(std::string_view name) {
  const auto is = [&](std::string_view part) { return name.find(part) != std::string_view::npos; };
  if (is(".attn_v.") || is(".attn_qkv.")) return Part::attn_v;
  if (is(".attn_k.")) return Part::attn_k;
  if (is(".attn_q.")) return Part::attn_q;
  if (is(".attn_output.")) return Part::attn_output;
  return is(".ffn_down") ? Part::ffn_down : Part::other;
}

int64_t layer_of(std::string_view name) {
  constexpr std::string_view kBlock = "blk.";
  int64_t layer = 0;
  if (name.starts_with(kBlock))
    for (const char c : name.substr(kBlock.size(), 6)) {
      if (c < '0' || c > '9') break;
      layer = 10 * layer + (c - '0');
    }
  return layer;
}

using When = bool (*)(int64_t layer, const TensorRole& role);
bool always(int64_t /*layer*/, const TensorRole& /*role*/) { return true; }
bool first_two(int64_t layer, const TensorRole& /*role*/) { return layer < 2; }
bool first_four(int64_t layer, const TensorRole& /*role*/) { return layer < 4; }
bool first_eighth(int64_t layer, const TensorRole& role) { return layer < role.layers / 8; }
bool first_sixteenth(int64_t layer, const TensorRole& role) { return layer < role.layers / 16; }
bool shared_keys(int64_t /*layer*/, const TensorRole& role) { return role.queries_a_key >= 4; }
/// The first and last eighth, and every third between them.
bool every_third(int64_t layer, const TensorRole& role) {
  const int64_t eighth = role.layers / 8;
  return layer < eighth || layer >= 7 * role.layers / 8 || (layer - eighth) % 3 == 2;
}

struct Rule {
  std::string_view file;
  Part part;
  When when;
  std::string_view type;
};
/// The first that applies.
constexpr auto kRules = std::to_array<Rule>({
    {"q2_k", Part::attn_v, shared_keys, "Q4_K"},
    {"q2_k", Part::attn_v, always, "Q3_K"},
    {"q2_k", Part::ffn_down, always, "Q3_K"},
    {"q2_k", Part::attn_output, always, "Q3_K"},
    {"q2_k_s", Part::attn_v, shared_keys, "Q4_K"},
    {"q2_k_s", Part::ffn_down, first_eighth, "Q4_K"},
    {"q3_k_m", Part::attn_v, first_two, "Q5_K"},
    {"q3_k_m", Part::attn_v, always, "Q4_K"},
    {"q3_k_m", Part::ffn_down, first_sixteenth, "Q5_K"},
    {"q3_k_m", Part::ffn_down, always, "Q4_K"},
    {"q3_k_m", Part::attn_output, always, "Q4_K"},
    {"q3_k_l", Part::attn_v, always, "Q5_K"},
    {"q3_k_l", Part::ffn_down, always, "Q5_K"},
    {"q3_k_l", Part::attn_output, always, "Q5_K"},
    {"q4_k_s", Part::attn_v, first_four, "Q5_K"},
    {"q4_k_s", Part::ffn_down, first_eighth, "Q5_K"},
    {"q4_k_m", Part::attn_v, every_third, "Q6_K"},
    {"q4_k_m", Part::ffn_down, every_third, "Q6_K"},
    {"q5_k_m", Part::attn_v, every_third, "Q6_K"},
    {"q5_k_m", Part::ffn_down, every_third, "Q6_K"},
    {"iq4_nl", Part::attn_v, shared_keys, "Q5_K"},
    {"iq4_xs", Part::attn_v, shared_keys, "Q5_K"},
    {"iq4_nl", Part::ffn_down, first_eighth, "Q5_K"},
    {"iq4_xs", Part::ffn_down, first_eighth, "Q5_K"},
});

bool is_output(const TensorRole& role) {
  return role.name == "output.weight" || (!role.has_output && role.name == "token_embd.weight");
}

/// Mixtral's eight experts share what attends.
constexpr int64_t kMixtral = 8;
constexpr int64_t kLayersOf70B = 80;
constexpr auto kFewBits =
    std::to_array<std::string_view>({"q2_k", "q3_k_s", "q3_k_m", "iq4_nl", "q4_k_s", "q4_k_m", "iq4_xs"});

std::string_view wanted(const GgufFileType& file, const TensorRole& role, const Shape& shape) {
  if (role.name == "position_embd.weight") return "F32";
  if (role.name.empty() || find_gguf_type(file.type)->dtype) return file.type;
  if (is_output(role)) {
    if (file.name == "mxfp4" || shape.back() % find_gguf_type(file.type)->block.elements != 0) return "Q8_0";
    return file.type == "Q8_0" ? file.type : "Q6_K";
  }
  if (file.name == "mxfp4") return shape.size() > 2 ? "MXFP4" : "Q8_0";
  if (role.name == "token_embd.weight") return file.name.starts_with("tq") ? "Q4_K" : file.type;
  const Part part = part_of(role.name);
  if (role.experts == kMixtral && (part == Part::attn_v || part == Part::attn_k)) return "Q8_0";
  if (role.experts == kMixtral && part == Part::attn_output)
    return std::ranges::find(kFewBits, file.name) != kFewBits.end() ? "Q5_K" : file.type;
  const int64_t layer = layer_of(role.name);
  const auto rule = std::ranges::find_if(
      kRules, [&](const Rule& r) { return r.file == file.name && r.part == part && r.when(layer, role); });
  const std::string_view type = rule == kRules.end() ? file.type : rule->type;
  // In models of 70 B eight heads share a value: the matrix is small.
  const bool small = part == Part::attn_v && role.layers == kLayersOf70B && role.queries_a_key > 1;
  return small && (type == "Q3_K" || type == "Q4_K") ? "Q5_K" : type;
}

struct Instead {
  std::string_view type, instead;
};
constexpr auto kInstead = std::to_array<Instead>({{"IQ4_XS", "IQ4_NL"},
                                                  {"Q2_K", "Q4_0"},
                                                  {"Q3_K", "Q4_0"},
                                                  {"TQ1_0", "Q4_0"},
                                                  {"TQ2_0", "Q4_0"},
                                                  {"Q4_K", "Q5_0"},
                                                  {"Q5_K", "Q5_1"},
                                                  {"Q6_K", "Q8_0"},
                                                  {"NVFP4", "Q4_0"}});

bool divides(std::string_view type, const Shape& shape) {
  return shape.back() % find_gguf_type(type)->block.elements == 0;
}

}  // namespace

std::span<const GgufFileType> all_gguf_file_types() { return kFileTypes; }

const GgufFileType* find_gguf_file_type(std::string_view name) {
  const auto found = std::ranges::find(kFileTypes, name, &GgufFileType::name);
  return found == kFileTypes.end() ? nullptr : &*found;
}

std::string_view gguf_type_wanted(const GgufFileType& file, const TensorRole& role, const Shape& shape) {
  return wanted(file, role, shape);
}

std::string_view gguf_type_for(const GgufFileType& file, const TensorRole& role, const Shape& shape) {
  const std::string_view type = wanted(file, role, shape);
  if (divides(type, shape)) return type;
  const auto found = std::ranges::find(kInstead, type, &Instead::type);
  return found != kInstead.end() && divides(found->instead, shape) ? found->instead : "F16";
}

}  // namespace bitwright
