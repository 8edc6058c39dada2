#!/usr/bin/env bash
# Fails when an #include in SRC/<part>/, or in the public headers of a part (SRC/../include/bitwright/<part>/), points to
# the part's left or to a neighbour. The order is ARCHITECTURE's; torch are the headers of train, which its sources include.
set -euo pipefail
src=${1:-$(dirname "${BASH_SOURCE[0]}")/../src}

check() {
  cd "$1"
  find . -type f ! -name '*_test.cpp' -exec awk -v parts="$(find . -mindepth 1 -maxdepth 1 -type d -printf "%f\n")" '
    BEGIN {
      rows = split("cli http;tune train;torch;quantize;evaluate engine store;recipe;algorithm model tokenizer;checkpoint;" \
                   "container kernels;scheme;base", row, ";")
      for (i = 1; i <= rows; i++) for (n = split(row[i], name, " "); n > 0; n--) rank[name[n]] = i
      n = split(parts, name, "\n")
      for (; n > 0; n--) if (!(name[n] in rank)) { print name[n] " has no place in the order of layers"; bad = 1 }
    }
    match($0, /^[ \t]*#[ \t]*include[ \t]*"[^"]*\//) {
      split(FILENAME, path, "/")
      split($0, quoted, "\"")
      sub(/^bitwright\//, "", quoted[2])
      split(quoted[2], included, "/")
      part = path[2]; other = included[1]
      if (other == ".." || (other in rank && other != part && rank[other] <= rank[part])) {
        printf "%s:%d: %s may not include \"%s\"\n", substr(FILENAME, 3), FNR, part, quoted[2]
        bad = 1
      }
    }
    END { exit bad }' {} +
}
(check "$src")
(check "$src/../include/bitwright")
