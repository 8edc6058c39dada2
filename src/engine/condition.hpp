#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "base/json.hpp"

namespace bitwright {

/// The small language of data/engines/*.json: conditions and templates over a tree of facts about one request.
///
/// A condition is an object; all its members must hold. A member is a path into the facts ("model.moe", "sm",
/// "arg.kv-cache-dtype"; a name may itself hold dots) with what it must be:
///   scalar            equal; 8 and "8" are equal, "$path" is another fact's value
///   null              absent
///   [a, b]            any of these
///   {">=": 89, ...}   all of: > >= < <= (numbers, or versions where the operand is text), "not": none of these,
///                     "present": true|false, "starts": "fp8", "has": "fp8" (within text, or an element of a list),
///                     "multiple_of": 32
/// or "any": [conditions], "all": [conditions], "not": condition. A list among the facts matches if one element does;
/// what is absent is neither equal, less nor greater.
bool holds(const Json& condition, const Json& facts);

/// The fact at `path`, or null if there is none.
const Json* look_up(const Json& facts, std::string_view path);

/// The member of an object, or null if it has none of that name or is no object; dots in the name mean nothing here.
const Json& member(const Json& object, std::string_view name);

/// `value` with every text "$path" replaced by that fact (null if absent), at any depth.
Json fill(const Json& value, const Json& facts);
/// `text` with every {path} replaced by that fact.
std::string fill_text(std::string_view text, const Json& facts);

/// Text as a flag's value shows it: "8" for 8, true for true, compact JSON for objects.
std::string value_text(const Json& value);
/// Equal as values of a flag: 8 and "8" are.
bool same_value(const Json& a, const Json& b);

/// Less than, equal to or greater than 0. "1.3.0rc7" < "1.3.0", "0.9" < "0.28.0", "b10573" > "b9000", "5.0.dev1" <
/// "5.0".
int compare_versions(std::string_view a, std::string_view b);

/// Appends what is wrong with a condition's form (an operator that does not exist, a list of no conditions ...).
void check_condition(const Json& condition, const std::string& where, std::vector<std::string>& problems);

}  // namespace bitwright
