#!/usr/bin/env bash
# clang-tidy over what we wrote. It spends most of its time on the standard library's headers, so sources are read
# several at once, those together that define no name twice; where clang-tidy has anything to say about such a batch,
# each of its sources is read alone, and that is what counts.
#   scripts/lint.sh          after cmake --preset release
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Tests are compiled with the same warnings; reading them by clang-tidy too would take as long again.
# Nor are the sources that include libtorch's headers, which clang 14 cannot read as C++20.
sources() {
  find src benchmarks -name '*.cpp' ! -name '*_test.cpp' ! -name precompiled.cpp ! -path 'src/train/*' \
    ! -path 'src/cli/train_main.cpp' ! -path 'benchmarks/train*' | sort
}

# Lines of sources. What Highway includes again for each instruction set is a line of its own.
batches() {
  sources | xargs awk '
    FNR == 1 { files[++n] = FILENAME }
    /foreach_target/ { lonely[n] = 1 }
    /^#include (<|.*[^l]\.hpp)/ && (FILENAME, $0) in included { print FILENAME ": twice: " $0 > "/dev/stderr"; exit 1 }
    { included[FILENAME, $0] }
    /^[A-Za-z]/ && !/^(using|namespace|template)/ {  # what is defined: the word before (, =, {, ; or :
      line = $0
      sub(/([({=;]| : ).*/, "", line)
      count = split(line, words, /[^A-Za-z0-9_:]+/)
      while (count > 0 && words[count] == "") --count
      if (count > 0) names[n, words[count]]
      count = /^(static |inline )?const/ ? split($0, words, /[^A-Za-z0-9_]+/) : 0
      for (; count > 0; --count) if (words[count] ~ /^k[A-Z]/) names[n, words[count]]
    }
    END {
      for (key in names) { split(key, part, SUBSEP); defined[part[1]] = defined[part[1]] " " part[2] }
      for (i = 1; i <= n; ++i) {
        count = split(defined[i], mine, " ")
        for (b = 1; b <= made; ++b) {
          if (full[b] || lonely[i] || size[b] == 16) continue
          clash = 0
          for (j = 1; j <= count && !clash; ++j) clash = (b, mine[j]) in taken
          if (!clash) break
        }
        if (b > made) full[made = b] = lonely[i]
        ++size[b]
        batch[b] = batch[b] " " files[i]
        for (j = 1; j <= count; ++j) taken[b, mine[j]]
      }
      for (b = 1; b <= made; ++b) print substr(batch[b], 2)
    }'
}

# -Wshadow is left to GCC: in a batch, a variable may shadow what is another source's own.
lint() {  # SOURCES…
  if (($# > 1)); then
    local all
    all=$(mktemp --suffix .cpp build/lint/XXXXXX)
    cat "$@" >"$all"
    if clang-tidy --quiet --checks=-readability-duplicate-include "$all" -- -std=c++20 -I. -Isrc -Iinclude -Iinclude/bitwright \
      -DBITWRIGHT_VERSION='""' -Wall -Wextra -Wconversion &>"$all.log"; then
      return
    fi
    echo "one by one: $*"
  fi
  local source
  for source in "$@"; do clang-tidy -p build/release --quiet "$source" 2>/dev/null; done
}

if (($#)); then
  lint "$@"
else
  rm -rf build/lint
  mkdir -p build/lint
  batches | tr ' ' '\a' >build/lint/batches
  tr '\a' ' ' <build/lint/batches | xargs -P "$(nproc)" -L 1 "$0"
fi
