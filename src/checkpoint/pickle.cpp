#include "checkpoint/pickle.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <concepts>
#include <cstring>
#include <unordered_map>

#include "base/error.hpp"

namespace bitwright {
namespace {

using Kind = PickleValue::Kind;
using Ref = uint32_t;

constexpr size_t kMaxValues = size_t{1} << 22;  // a tensor takes about 15
constexpr std::string_view kOrderedDict = "collections.OrderedDict";
constexpr std::string_view kDamaged = "the download is incomplete or damaged, fetch it again";

class Machine {
 public:
  Machine(std::span<const std::byte> bytes, std::span<const std::string_view> allowed, const std::string& where)
      : bytes_(bytes), allowed_(allowed), where_(where) {}

  Pickle run() {
    while (step()) {
    }
    const Ref root = pop();
    return {.values = std::move(values_), .root = root, .bytes = at_};
  }

 private:
  [[noreturn]] void fail(const std::string& why, const char* code = "bad-pickle",
                         std::string_view fix = kDamaged) const {
    throw Error({.code = code, .what = "cannot read pickle", .where = where_, .why = why, .fix = std::string(fix)});
  }
  [[noreturn]] void refuse(const std::string& what) const {
    fail(fmt::format("it asks for {}, which is no tensor", what), "unsafe-pickle",
         "do not trust this file; safetensors, or a state dict alone, would be read");
  }

  std::string_view take(uint64_t count) {
    if (count > bytes_.size() - at_) fail(fmt::format("it ends early, at byte {}", bytes_.size()));
    const std::string_view taken(reinterpret_cast<const char*>(bytes_.data()) + at_, static_cast<size_t>(count));
    at_ += taken.size();
    return taken;
  }
  template <std::integral T>
  T number() {
    T value;
    std::memcpy(&value, take(sizeof value).data(), sizeof value);
    return value;
  }
  std::string_view line() {
    const std::string_view rest(reinterpret_cast<const char*>(bytes_.data()) + at_, bytes_.size() - at_);
    const size_t length = rest.find('\n');
    if (length == rest.npos) fail("a name in it does not end");
    at_ += length + 1;
    return rest.substr(0, length);
  }

  void push(PickleValue value) {
    if (values_.size() >= kMaxValues) fail(fmt::format("it has more than {} values", kMaxValues));
    values_.push_back(std::move(value));
    stack_.push_back(static_cast<Ref>(values_.size() - 1));
  }
  void push(Kind kind, int64_t integer = 0) { push({.kind = kind, .integer = integer}); }
  void push_text(std::string_view text) { push({.kind = Kind::string, .text = text}); }
  Ref top() const {
    if (stack_.size() <= (marks_.empty() ? 0 : marks_.back())) fail("it takes a value that is not there");
    return stack_.back();
  }
  Ref pop() {
    const Ref value = top();
    stack_.pop_back();
    return value;
  }
  PickleValue& pop(Kind kind) {
    PickleValue& value = values_[pop()];
    if (value.kind != kind) fail("a value in it is of the wrong kind");
    return value;
  }
  /// Those above the last mark, which goes too.
  std::vector<Ref> pop_to_mark() {
    if (marks_.empty()) fail("a mark in it is missing");
    const auto first = stack_.begin() + static_cast<std::ptrdiff_t>(marks_.back());
    std::vector<Ref> items(first, stack_.end());
    stack_.erase(first, stack_.end());
    marks_.pop_back();
    return items;
  }
  std::vector<Ref> pop_some(size_t count) {
    std::vector<Ref> items(count);
    for (size_t i = count; i > 0; --i) items[i - 1] = pop();
    return items;
  }
  void push_tuple(std::vector<Ref> items) { push({.kind = Kind::tuple, .items = std::move(items)}); }

  void append(const std::vector<Ref>& items, Kind kind) {
    PickleValue& target = values_[top()];
    if (target.kind != kind || (kind == Kind::dict && items.size() % 2 != 0)) fail("items in it belong to nothing");
    target.items.insert(target.items.end(), items.begin(), items.end());
  }

  void push_global(std::string_view module, std::string_view name) {
    const std::string full = fmt::format("{}.{}", module, name);
    const auto found = std::ranges::find(allowed_, full);
    if (found == allowed_.end() && full != kOrderedDict) refuse(fmt::format("'{}'", printable(full)));
    push(Kind::global, found - allowed_.begin());
  }

  void long_integer() {
    const std::string_view digits = take(number<uint8_t>());
    if (digits.size() > sizeof(int64_t)) return push(Kind::other);
    int64_t value = !digits.empty() && (digits.back() & 0x80) != 0 ? -1 : 0;
    std::memcpy(&value, digits.data(), digits.size());
    push(Kind::integer, value);
  }

  void get(Ref index) {
    const auto found = memo_.find(index);
    if (found == memo_.end()) fail(fmt::format("it takes value {} before it is there", index));
    stack_.push_back(found->second);
  }

  /// Of an OrderedDict the dict, of anything else a note of the call.
  void reduce() {
    const Ref arguments = pop(), callable = pop();
    const PickleValue &function = values_[callable], &tuple = values_[arguments];
    if (function.kind != Kind::global || tuple.kind != Kind::tuple) fail("a call in it is damaged");
    if (static_cast<size_t>(function.integer) < allowed_.size())
      return push({.kind = Kind::call, .items = {callable, arguments}});
    if (!tuple.items.empty()) fail("it makes an OrderedDict of something else");
    push(Kind::dict);
  }

  /// The attributes of an OrderedDict (_metadata) say nothing of tensors.
  void build() {
    pop();
    if (values_[top()].kind != Kind::dict) refuse("an object with attributes");
  }

  bool step();

  std::span<const std::byte> bytes_;
  std::span<const std::string_view> allowed_;
  const std::string& where_;
  size_t at_ = 0;
  std::deque<PickleValue> values_;
  std::vector<Ref> stack_;
  std::vector<size_t> marks_;
  std::unordered_map<Ref, Ref> memo_;
};

/// One opcode; false at the end. The names are those of pickletools.py.
bool Machine::step() {
  const auto opcode = number<uint8_t>();
  switch (opcode) {
    case 0x80:  // PROTO
      if (const auto protocol = number<uint8_t>(); protocol < 2 || protocol > 5)
        fail(fmt::format("it is of protocol {}, known are 2 to 5", protocol));
      break;
    case 0x95:  // FRAME
      if (number<uint64_t>() > bytes_.size() - at_) fail("a frame in it ends outside");
      break;
    case '.':  // STOP
      return false;
    case '(':  // MARK
      marks_.push_back(stack_.size());
      break;
    case 'N':  // NONE
      push(Kind::other);
      break;
    case 0x88:  // NEWTRUE
    case 0x89:  // NEWFALSE
      push(Kind::boolean, opcode == 0x88 ? 1 : 0);
      break;
    case 'J':  // BININT
      push(Kind::integer, number<int32_t>());
      break;
    case 'K':  // BININT1
      push(Kind::integer, number<uint8_t>());
      break;
    case 'M':  // BININT2
      push(Kind::integer, number<uint16_t>());
      break;
    case 0x8a:  // LONG1
      long_integer();
      break;
    case 'G':  // BINFLOAT
      take(sizeof(double));
      push(Kind::other);
      break;
    case 'X':  // BINUNICODE
    case 'T':  // BINSTRING
      push_text(take(number<uint32_t>()));
      break;
    case 0x8c:  // SHORT_BINUNICODE
    case 'U':   // SHORT_BINSTRING
      push_text(take(number<uint8_t>()));
      break;
    case 'B':  // BINBYTES
      take(number<uint32_t>());
      push(Kind::other);
      break;
    case 'C':  // SHORT_BINBYTES
      take(number<uint8_t>());
      push(Kind::other);
      break;
    case ')':  // EMPTY_TUPLE
      push_tuple({});
      break;
    case 0x85:  // TUPLE1
    case 0x86:  // TUPLE2
    case 0x87:  // TUPLE3
      push_tuple(pop_some(opcode - 0x84U));
      break;
    case 't':  // TUPLE
      push_tuple(pop_to_mark());
      break;
    case ']':  // EMPTY_LIST
      push(Kind::list);
      break;
    case 'a':  // APPEND
      append(pop_some(1), Kind::list);
      break;
    case 'e':  // APPENDS
      append(pop_to_mark(), Kind::list);
      break;
    case '}':  // EMPTY_DICT
      push(Kind::dict);
      break;
    case 's':  // SETITEM
      append(pop_some(2), Kind::dict);
      break;
    case 'u':  // SETITEMS
      append(pop_to_mark(), Kind::dict);
      break;
    case 'q':  // BINPUT
      memo_[number<uint8_t>()] = top();
      break;
    case 'r':  // LONG_BINPUT
      memo_[number<uint32_t>()] = top();
      break;
    case 0x94: {  // MEMOIZE
      const auto index = static_cast<Ref>(memo_.size());
      memo_[index] = top();
      break;
    }
    case 'h':  // BINGET
      get(number<uint8_t>());
      break;
    case 'j':  // LONG_BINGET
      get(number<uint32_t>());
      break;
    case 'c': {  // GLOBAL
      const std::string_view module = line();
      push_global(module, line());
      break;
    }
    case 0x93: {  // STACK_GLOBAL
      const std::string_view name = pop(Kind::string).text;
      push_global(pop(Kind::string).text, name);
      break;
    }
    case 'Q':  // BINPERSID
      push({.kind = Kind::persistent, .items = pop_some(1)});
      break;
    case 'R':  // REDUCE
      reduce();
      break;
    case 'b':  // BUILD
      build();
      break;
    default:
      refuse(fmt::format("opcode 0x{:02x}", opcode));
  }
  return true;
}

}  // namespace

Pickle read_pickle(std::span<const std::byte> bytes, std::span<const std::string_view> allowed,
                   const std::string& where) {
  return Machine(bytes, allowed, where).run();
}

}  // namespace bitwright
