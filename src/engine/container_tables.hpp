#pragma once

#include <string>

#include "engine/facts.hpp"

namespace bitwright {

/// A Markdown table of all containers: what is read, what `--format` alone writes, what is read and not written, which
/// engines load it.
std::string containers_table(const Facts& facts);

/// A section for each container, in Markdown: what is written for which options, what is refused and why, how it is
/// rounded, which engines load the result. Found by asking the containers themselves.
std::string containers_sections(const Facts& facts);

}  // namespace bitwright
