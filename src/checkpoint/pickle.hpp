#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace bitwright {

/// A value that a pickle describes. Nothing is called: a call is a value too.
struct PickleValue {
  enum class Kind : uint8_t {
    other,       ///< none, a float, bytes, an integer beyond 64 bits
    boolean,     ///< in `integer`
    integer,     ///< in `integer`
    string,      ///< in `text`
    tuple,       ///< of `items`
    list,        ///< of `items`
    dict,        ///< `items`: key, value, key, value …; an OrderedDict too
    global,      ///< something the pickle names; its place in the list of those allowed in `integer`
    persistent,  ///< something kept outside the pickle; its id is items[0]
    call         ///< items[0], a global, called with items[1], a tuple
  };
  Kind kind = Kind::other;
  int64_t integer = 0;
  std::string_view text{};        ///< points into the pickle
  std::vector<uint32_t> items{};  ///< places in Pickle::values. Tuples and calls hold only earlier ones.
};

struct Pickle {
  std::deque<PickleValue> values;
  uint32_t root;  ///< what was pickled
  size_t bytes;   ///< up to its end
};

/// Reads the pickle that `bytes` begins with (protocol 2 to 5; Python's pickletools.py describes the opcodes), only the
/// opcodes that make plain values and those of `allowed` ("module.name"). Throws Error{"unsafe-pickle"} naming
/// any other opcode or global, Error{"bad-pickle"} where it is damaged. Memory is bounded by the pickle's size.
Pickle read_pickle(std::span<const std::byte> bytes, std::span<const std::string_view> allowed,
                   const std::string& where);

}  // namespace bitwright
