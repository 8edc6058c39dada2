#!/usr/bin/env bash
# Runs a .test file:  run.sh PROGRAM_DIRECTORY FILE.test
#
# A test is one or more lines for bash, a line "----", and what they print on stdout and stderr together; an empty line
# ends it. "---- exit 2" expects that exit status instead of 0. In what is expected, {{*}} stands for any part of a line
# and a line "..." for any number of lines; empty lines that a program prints are not compared. "#" starts a comment
# between tests. All tests of a file run in one fresh directory that has a copy of examples/; MODEL is the model there.
set -euo pipefail

program_dir=$(cd "$1" && pwd)
file=$(realpath "$2")
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
TMP=$(mktemp -d)
trap 'rm -rf "$TMP"' EXIT
cp -r "$repository/examples" "$TMP"
cd "$TMP"
export PATH="$program_dir:$PATH" TMP MODEL=examples/tinystories-4m LC_ALL=C.UTF-8

# Does $1, a line that was printed, match $2, a line that is expected?
line_matches() {
  local pattern=${2//\\/\\\\}
  pattern=${pattern//\*/\\*} pattern=${pattern//\?/\\?} pattern=${pattern//\[/\\[}
  pattern=${pattern//'{{\*}}'/*}
  # shellcheck disable=SC2053  # a pattern, on purpose
  [[ $1 == $pattern ]]
}

# Do the lines in `printed` match those in `expected`? On a mismatch the last "..." takes one line more.
output_matches() {
  local p=0 e=0 resume_p=-1 resume_e=0
  while ((p < ${#printed[@]})); do
    if ((e < ${#expected[@]})) && [ "${expected[e]}" = ... ]; then
      resume_p=$p resume_e=$((++e))
    elif ((e < ${#expected[@]})) && line_matches "${printed[p]}" "${expected[e]}"; then
      p=$((p + 1)) e=$((e + 1))
    elif ((resume_p >= 0)); then
      p=$((++resume_p)) e=$resume_e
    else
      return 1
    fi
  done
  while ((e < ${#expected[@]})) && [ "${expected[e]}" = ... ]; do e=$((e + 1)); done
  ((e == ${#expected[@]}))
}

tests=0 failed=0
run_test() {
  local status=0 output
  tests=$((tests + 1))
  output=$(bash -eu -c "$command" 2>&1 </dev/null) || status=$?
  mapfile -t printed < <(grep -v '^$' <<<"$output")
  if [ "$status" != "$expected_status" ] || ! output_matches; then
    failed=$((failed + 1))
    printf '%s:%d: FAILED\n%s\n' "$file" "$start" "$command"
    printf 'exit status %s, expected %s\n' "$status" "$expected_status"
    diff -u --label expected --label printed \
      <(((${#expected[@]})) && printf '%s\n' "${expected[@]}") <(((${#printed[@]})) && printf '%s\n' "${printed[@]}") || true
  fi
}

part=between number=0
while IFS= read -r line || [ -n "$line" ]; do
  number=$((number + 1))
  case $part:$line in
    between: | between:'#'*) ;;
    between:*) part=command command=$line start=$number expected=() ;;
    command:----*)
      part=output expected_status=${line#----} expected_status=${expected_status#" exit "}
      expected_status=${expected_status:-0}
      ;;
    command:*) command+=$'\n'$line ;;
    output:) part=between; run_test ;;
    output:*) expected+=("$line") ;;
  esac
done < <(cat "$file"; echo)
[ "$part" = between ] || { echo "$file:$start: no ---- after the command" >&2; exit 1; }
echo "cases: $tests, failed: $failed"
((tests > 0 && failed == 0))
