#pragma once

#include <optional>

#include "container/container.hpp"

namespace bitwright::qlinear {

// What GPTQ's and AWQ's models have in common: LAYER.qweight, LAYER.qzeros, LAYER.scales, and a configuration in
// config.json's quantization_config, or in a file of its own (older models).

inline constexpr std::string_view kWeight = ".weight", kCodes = ".qweight", kZeros = ".qzeros", kScales = ".scales",
                                  kGroups = ".g_idx";

/// "LAYER" of "LAYER.qweight", and the reverse. A model of one layer has names without a dot.
std::string layer_of(std::string_view name, std::string_view suffix);
std::string array_of(const std::string& layer, std::string_view suffix);

/// quantization_config, or the first of `documents` that is there, or an empty object.
const Json& config_of(const CheckpointView& checkpoint, std::span<const std::string_view> documents);
/// The first of `keys` that is a text, in lower case; empty where none is.
std::string text_of(const Json& config, std::initializer_list<const char*> keys);
/// The first of `keys` that is there. Throws bad_setting where it is no integer.
std::optional<int64_t> number_of(const CheckpointView& checkpoint, const Json& config,
                                 std::initializer_list<const char*> keys);
/// Throws Error{"bad-container"}: of the configuration.
[[noreturn]] void bad_setting(const CheckpointView& checkpoint, const std::string& why);

/// visit(layer, qweight) for each layer that has one.
void for_each_layer(const CheckpointView& checkpoint,
                    const std::function<void(const std::string& layer, const ArraySpec& codes)>& visit);
/// Is there a layer, and is this the configuration's method? Where none is named: is each qweight as wide as its
/// scales, as GPTQ's are and AWQ's are not?
bool is_method(const CheckpointView& checkpoint, const Json& config, std::string_view method, bool as_wide_as_scales);
/// Throws bad_container unless these are matrices, none of them empty.
void check_matrices(const CheckpointView& checkpoint, const std::string& name,
                    std::initializer_list<const ArraySpec*> arrays);

}  // namespace bitwright::qlinear
