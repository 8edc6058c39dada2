#include "tokenizer/pre_tokenizers.hpp"

#include "tokenizer/byte_level.hpp"
#include "tokenizer/unicode.hpp"

namespace bitwright {
namespace {

/// Joins parts as `behavior` says and leaves out what it drops.
void add_parts(std::string_view text, std::vector<SplitPart> parts, SplitBehavior behavior, Pieces& out) {
  const auto piece = [&](const SplitPart& part) { return text.substr(part.begin, part.end - part.begin); };
  if (behavior == SplitBehavior::isolated || behavior == SplitBehavior::removed) {
    for (const SplitPart& part : parts)
      if (behavior == SplitBehavior::isolated || !part.matches) out.add(piece(part));
    return;
  }
  std::vector<SplitPart> joined;
  if (behavior == SplitBehavior::merged_with_next) {
    // A match goes to the part after it, if that is none: from the back, as the other way round from the front.
    for (size_t i = 0; i < parts.size(); ++i) {
      const bool takes_match = !parts[i].matches && !joined.empty() && joined.back().matches;
      if (takes_match) {
        joined.back().end = parts[i].end;
        joined.back().matches = false;
      } else {
        joined.push_back(parts[i]);
      }
    }
  } else {
    bool before_matches = false;
    for (const SplitPart& part : parts) {
      const bool with_previous =
          behavior == SplitBehavior::contiguous ? part.matches == before_matches : part.matches && !before_matches;
      if (with_previous && !joined.empty()) {
        joined.back().end = part.end;
      } else {
        joined.push_back(part);
      }
      before_matches = part.matches;
    }
  }
  for (const SplitPart& part : joined) out.add(piece(part));
}

}  // namespace

PreTokenizer split_by_pattern(Pattern pattern, SplitBehavior behavior, bool invert) {
  const auto shared = std::make_shared<const Pattern>(std::move(pattern));
  return [=](std::string_view text, bool, Pieces& out) {
    const std::vector<Pattern::Match> matches = shared->matches(text);
    if (behavior == SplitBehavior::isolated) {  // the usual case, without the list of parts
      size_t at = 0;
      for (const Pattern::Match& match : matches) {
        out.add(text.substr(at, match.begin - at));
        out.add(text.substr(match.begin, match.end - match.begin));
        at = match.end;
      }
      out.add(text.substr(at));
      return;
    }
    std::vector<SplitPart> parts;
    size_t at = 0;
    for (const Pattern::Match& match : matches) {
      if (match.begin > at) parts.push_back({at, match.begin, invert});
      parts.push_back({match.begin, match.end, !invert});
      at = match.end;
    }
    if (at < text.size()) parts.push_back({at, text.size(), invert});
    add_parts(text, std::move(parts), behavior, out);
  };
}

PreTokenizer split_by_character(std::function<bool(char32_t)> matches, SplitBehavior behavior) {
  return [matches = std::move(matches), behavior](std::string_view text, bool, Pieces& out) {
    std::vector<SplitPart> parts;
    for (size_t at = 0; at < text.size();) {
      const Character c = first_character(text.substr(at));
      const bool match = matches(c.code_point);
      if (!match && !parts.empty() && !parts.back().matches) {
        parts.back().end += c.length;
      } else {
        parts.push_back({at, at + c.length, match});
      }
      at += c.length;
    }
    add_parts(text, std::move(parts), behavior, out);
  };
}

PreTokenizer prepend_piece(std::string prefix, bool only_first) {
  return [prefix = std::move(prefix), only_first](std::string_view text, bool begins_text, Pieces& out) {
    const bool prepends = (begins_text || !only_first) && !text.starts_with(prefix);
    out.add(prepends ? out.keep(prefix + std::string(text)) : text);
  };
}

PreTokenizer replace_in_piece(std::string from, std::string to) {
  return [from = std::move(from), to = std::move(to)](std::string_view text, bool, Pieces& out) {
    if (text.find(from) == text.npos) return out.add(text);
    std::string changed;
    for (size_t at = 0;;) {
      const size_t next = text.find(from, at);
      changed.append(text, at, next == text.npos ? text.npos : next - at);
      if (next == text.npos) break;
      changed += to;
      at = next + from.size();
    }
    out.add(out.keep(std::move(changed)));
  };
}

PreTokenizer to_byte_alphabet() {
  return
      [](std::string_view text, bool, Pieces& out) { out.add(out.keep(in_byte_alphabet(unescape_stray_bytes(text)))); };
}

}  // namespace bitwright
