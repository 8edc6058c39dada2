#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "base/json.hpp"

namespace bitwright {

/// Typed and checked members of a config.json. A null counts as missing, as Hugging Face writes it.
/// What is malformed throws Error{"bad-config"} naming the file, the key and the value.
class ConfigReader {
 public:
  /// Throws if `config` is not an object. Keeps a reference to it.
  ConfigReader(const Json& config, std::string where);

  /// Nothing if the key is missing.
  const Json* find(const char* key) const;
  /// Is the key there, were it with null?
  bool has(const char* key) const;
  /// The object at `key`; nothing if the key is missing.
  std::optional<ConfigReader> object(const char* key) const;
  /// In [low, high]; without a `fallback` the key must be there.
  int64_t integer(const char* key, int64_t low, int64_t high, std::optional<int64_t> fallback = std::nullopt) const;
  /// In (0, high]; without a `fallback` the key must be there.
  double positive(const char* key, double high, std::optional<double> fallback = std::nullopt) const;
  bool boolean(const char* key, bool fallback) const;
  std::string text(const char* key, const std::string& fallback) const;
  /// `count` numbers in (0, high]; the key must be there.
  std::vector<double> positives(const char* key, size_t count, double high) const;
  /// Empty if the key is missing.
  std::vector<std::string> texts(const char* key) const;
  std::vector<int64_t> integers(const char* key, int64_t low, int64_t high) const;

  /// The key must be missing or hold `value`; else Error{"unsupported-config"}: a sound model that is not run yet.
  void only(const char* key, const Json& value) const;
  [[noreturn]] void fail(const char* key, const std::string& why) const;         ///< Error{"bad-config"}
  [[noreturn]] void unsupported(const char* key, const std::string& why) const;  ///< Error{"unsupported-config"}

 private:
  [[noreturn]] void raise(const char* code, const char* key, const std::string& why) const;
  const Json* config_;
  std::string where_;
};

}  // namespace bitwright
