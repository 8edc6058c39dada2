#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <tuple>
#include <unordered_map>

#include "base/error.hpp"
#include "base/utf8.hpp"
#include "checkpoint/pickle.hpp"
#include "checkpoint/weight_file.hpp"
#include "checkpoint/zip.hpp"

namespace bitwright {
namespace {

using Kind = PickleValue::Kind;
using Ref = uint32_t;

constexpr size_t kMaxRank = 8;
constexpr int kMaxDepth = 16;          // of dicts in dicts
constexpr size_t kLongestName = 1024;  // of a tensor: a dict's key may be long and stand before thousands of others
constexpr std::string_view kDamaged = "the download is incomplete or damaged, fetch it again";

/// What a pickle of tensors may ask for.
struct Global {
  enum class Kind : uint8_t { tensor, typed_tensor, parameter, storage, untyped_storage, dtype, value };
  std::string_view name;
  Kind kind;
  DType dtype = DType::u8;
};
constexpr std::array kGlobals = {
    Global{"torch._utils._rebuild_tensor_v2", Global::Kind::tensor},
    Global{"torch._utils._rebuild_tensor", Global::Kind::tensor},
    Global{"torch._utils._rebuild_tensor_v3", Global::Kind::typed_tensor},
    Global{"torch._utils._rebuild_parameter", Global::Kind::parameter},
    Global{"torch._utils._rebuild_parameter_with_state", Global::Kind::parameter},
    Global{"torch.DoubleStorage", Global::Kind::storage, DType::f64},
    Global{"torch.FloatStorage", Global::Kind::storage, DType::f32},
    Global{"torch.HalfStorage", Global::Kind::storage, DType::f16},
    Global{"torch.BFloat16Storage", Global::Kind::storage, DType::bf16},
    Global{"torch.LongStorage", Global::Kind::storage, DType::i64},
    Global{"torch.IntStorage", Global::Kind::storage, DType::i32},
    Global{"torch.ShortStorage", Global::Kind::storage, DType::i16},
    Global{"torch.CharStorage", Global::Kind::storage, DType::i8},
    Global{"torch.ByteStorage", Global::Kind::storage, DType::u8},
    Global{"torch.BoolStorage", Global::Kind::storage, DType::boolean},
    Global{"torch.UntypedStorage", Global::Kind::untyped_storage},
    Global{"torch.storage.UntypedStorage", Global::Kind::untyped_storage},
    Global{"torch.float64", Global::Kind::dtype, DType::f64},
    Global{"torch.float32", Global::Kind::dtype, DType::f32},
    Global{"torch.float16", Global::Kind::dtype, DType::f16},
    Global{"torch.bfloat16", Global::Kind::dtype, DType::bf16},
    Global{"torch.float8_e4m3fn", Global::Kind::dtype, DType::f8_e4m3},
    Global{"torch.float8_e5m2", Global::Kind::dtype, DType::f8_e5m2},
    Global{"torch.float8_e8m0fnu", Global::Kind::dtype, DType::f8_e8m0},
    Global{"torch.int64", Global::Kind::dtype, DType::i64},
    Global{"torch.int32", Global::Kind::dtype, DType::i32},
    Global{"torch.int16", Global::Kind::dtype, DType::i16},
    Global{"torch.int8", Global::Kind::dtype, DType::i8},
    Global{"torch.uint64", Global::Kind::dtype, DType::u64},
    Global{"torch.uint32", Global::Kind::dtype, DType::u32},
    Global{"torch.uint16", Global::Kind::dtype, DType::u16},
    Global{"torch.uint8", Global::Kind::dtype, DType::u8},
    Global{"torch.bool", Global::Kind::dtype, DType::boolean},
    Global{"torch.Size", Global::Kind::value},
    Global{"torch.device", Global::Kind::value},
};
constexpr auto kAllowed = [] {
  std::array<std::string_view, kGlobals.size()> names;
  std::ranges::transform(kGlobals, names.begin(), &Global::name);
  return names;
}();

[[noreturn]] void fail(const std::string& where, const std::string& why, std::string_view fix = kDamaged) {
  throw Error(
      {.code = "bad-torch-file", .what = "cannot read model", .where = where, .why = why, .fix = std::string(fix)});
}

/// A run of elements that tensors are views of, as the pickle names it.
struct StorageName {
  std::string_view key;
  DType dtype;
  uint64_t count, bytes;
};
using Storages = std::map<std::string_view, std::span<const std::byte>>;

/// A state dict as a pickle tells it, without the bytes of its storages.
class StateDict {
 public:
  StateDict(std::span<const std::byte> pickle, const std::string& where)
      : pickle_(read_pickle(pickle, kAllowed, where)), where_(where) {}

  size_t pickle_bytes() const { return pickle_.bytes; }

  /// In the order in which the pickle names them.
  std::vector<StorageName> storages() const {
    std::vector<StorageName> out;
    for (const PickleValue& value : pickle_.values)
      if (value.kind == Kind::persistent) out.push_back(storage_name(value));
    return out;
  }

  WeightContents read(const Storages& storages, size_t most_gathered);

 private:
  struct View;

  const PickleValue& at(Ref ref) const { return pickle_.values[ref]; }
  const Global* global(const PickleValue& value) const {
    return value.kind == Kind::global && static_cast<size_t>(value.integer) < kGlobals.size()
               ? &kGlobals[static_cast<size_t>(value.integer)]
               : nullptr;
  }
  /// What a call calls; null: it is no call, or of an OrderedDict's kind.
  const Global* called(Ref ref) const { return at(ref).kind == Kind::call ? global(at(at(ref).items[0])) : nullptr; }
  bool is_tensor(Ref ref) const {
    const Global* function = called(ref);
    return function != nullptr &&
           (function->kind == Global::Kind::tensor || function->kind == Global::Kind::typed_tensor ||
            function->kind == Global::Kind::parameter);
  }

  StorageName storage_name(const PickleValue& persistent) const;
  std::vector<int64_t> integers(Ref ref, const std::string& name, const char* what) const;
  View view(Ref ref, const std::string& name, const Storages& storages) const;
  std::span<const std::byte> gathered(const View& view, const std::string& name);

  void check_depth(int depth) const;
  bool has_tensors(Ref ref, int depth = 0);
  Ref innermost();
  void collect(Ref dict, const std::string& prefix, const Storages& storages, int depth = 0);
  void add(const std::string& name, Ref tensor, const Storages& storages);
  void add_value(const std::string& name, Ref value);
  Json plain_value(Ref ref) const;

  Pickle pickle_;
  const std::string& where_;
  std::unordered_map<Ref, bool> has_tensors_{};  ///< of dicts that were looked through
  std::set<Ref> collected_{};
  std::set<std::string> names_{};
  using Gathered = std::tuple<const std::byte*, Shape, std::vector<int64_t>, DType>;
  std::map<Gathered, std::span<const std::byte>> gathered_{};  ///< so that tied tensors are copied once
  size_t room_ = 0;                                            ///< bytes that may still be gathered
  Json values_ = Json::object();
  WeightContents contents_{};
};

/// A tensor: elements of a storage, at `strides` elements from each other.
struct StateDict::View {
  DType dtype;
  Shape shape;
  std::vector<int64_t> strides;
  std::span<const std::byte> data;  ///< from its first element to the end of its last one

  /// Do its elements lie as an array's?
  bool is_contiguous() const {
    int64_t expected = 1;
    for (size_t i = shape.size(); i > 0; --i) {
      if (shape[i - 1] != 1 && strides[i - 1] != expected) return false;
      expected *= shape[i - 1];
    }
    return true;
  }
};

/// ('storage', class, key, place, count) and, in old files, a part of another storage that it is.
StorageName StateDict::storage_name(const PickleValue& persistent) const {
  const PickleValue& id = at(persistent.items[0]);
  const auto item = [&](size_t i) -> const PickleValue& { return at(id.items[i]); };
  if (id.kind != Kind::tuple || id.items.size() < 5 || id.items.size() > 6 || item(0).text != "storage" ||
      item(2).kind != Kind::string || item(4).kind != Kind::integer || item(4).integer < 0)
    fail(where_, "a storage in it is not described as torch.save does");
  if (id.items.size() == 6 && item(5).kind != Kind::other)
    fail(where_, "a storage in it is part of another one", "save it again with a newer PyTorch");
  const Global* type = global(item(1));
  if (type == nullptr || (type->kind != Global::Kind::storage && type->kind != Global::Kind::untyped_storage))
    fail(where_, fmt::format("storage '{}' is of no known kind", printable(item(2).text)));
  const auto count = static_cast<uint64_t>(item(4).integer);
  uint64_t bytes = 0;
  if (__builtin_mul_overflow(count, size_bytes(type->dtype), &bytes))
    fail(where_, fmt::format("storage '{}' has {} elements", printable(item(2).text), count));
  return {.key = item(2).text, .dtype = type->dtype, .count = count, .bytes = bytes};
}

std::vector<int64_t> StateDict::integers(Ref ref, const std::string& name, const char* what) const {
  const PickleValue& tuple = at(ref);
  const auto is_size = [&](Ref item) { return at(item).kind == Kind::integer && at(item).integer >= 0; };
  if (tuple.kind != Kind::tuple || tuple.items.size() > kMaxRank || !std::ranges::all_of(tuple.items, is_size))
    fail(where_, fmt::format("tensor '{}' has a {} that is no short list of numbers", printable(name), what));
  std::vector<int64_t> out;
  for (const Ref item : tuple.items) out.push_back(at(item).integer);
  return out;
}

/// `ref`, a call that rebuilds a tensor: (storage, offset, size, stride, …); a parameter's first argument is a tensor.
StateDict::View StateDict::view(Ref ref, const std::string& name, const Storages& storages) const {
  const auto damaged = [&](const std::string& why) {
    fail(where_, fmt::format("tensor '{}' {}", printable(name), why));
  };
  const auto arguments = [&](Ref call) -> const std::vector<Ref>& { return at(at(call).items[1]).items; };
  if (called(ref)->kind == Global::Kind::parameter) {
    if (arguments(ref).empty()) damaged("is a parameter without a value");
    ref = arguments(ref)[0];
    if (!is_tensor(ref) || called(ref)->kind == Global::Kind::parameter) damaged("is a parameter of no tensor");
  }
  const std::vector<Ref>& a = arguments(ref);
  const bool typed = called(ref)->kind == Global::Kind::typed_tensor;
  if (a.size() < (typed ? 7 : 4) || at(a[0]).kind != Kind::persistent || at(a[1]).kind != Kind::integer)
    damaged("is not described as torch.save does");
  const StorageName storage = storage_name(at(a[0]));
  View out = {.dtype = storage.dtype,
              .shape = integers(a[2], name, "size"),
              .strides = integers(a[3], name, "stride"),
              .data = {}};
  if (typed) {
    const Global* dtype = global(at(a[6]));
    if (dtype == nullptr || dtype->kind != Global::Kind::dtype) damaged("is of no known number type");
    out.dtype = dtype->dtype;
  }
  const auto found = storages.find(storage.key);
  if (found == storages.end()) damaged(fmt::format("lies in storage '{}', which is missing", printable(storage.key)));
  if (found->second.size() != storage.bytes)
    damaged(fmt::format("lies in storage '{}' of {} bytes, of which {} are there", printable(storage.key),
                        storage.bytes, found->second.size()));

  if (out.shape.size() != out.strides.size()) damaged("has a size and a stride of different length");
  const auto count = checked_element_count(out.shape);
  if (!count) damaged(fmt::format("has size {} that overflows", to_string(out.shape)));
  if (*count == 0) return out;
  const uint64_t elements = storage.bytes / size_bytes(out.dtype);
  auto last = static_cast<uint64_t>(at(a[1]).integer);  // a negative one becomes too large
  bool outside = last >= elements;
  for (size_t i = 0; i < out.shape.size(); ++i) {
    uint64_t step = 0;
    outside = outside || __builtin_mul_overflow(out.shape[i] - 1, out.strides[i], &step) || step >= elements - last;
    if (!outside) last += step;
  }
  if (outside)
    damaged(fmt::format("of size {}, stride {} and offset {} passes the end of its storage of {} elements",
                        to_string(out.shape), to_string(out.strides), at(a[1]).integer, elements));
  const size_t first = static_cast<size_t>(at(a[1]).integer) * size_bytes(out.dtype);
  out.data = found->second.subspan(first, (static_cast<size_t>(last) + 1) * size_bytes(out.dtype) - first);
  return out;
}

/// The elements in row-major order. What is repeated (a stride of 0) may not make more of a file than its own size.
std::span<const std::byte> StateDict::gathered(const View& view, const std::string& name) {
  const auto [known, is_new] = gathered_.try_emplace({view.data.data(), view.shape, view.strides, view.dtype});
  if (!is_new) return known->second;
  const size_t size = size_bytes(view.dtype), last = view.shape.size() - 1;
  const auto count = static_cast<size_t>(element_count(view.shape));
  if (count > room_ / size)
    fail(where_,
         fmt::format("tensor '{}' of size {} and stride {} repeats more than the file holds", printable(name),
                     to_string(view.shape), to_string(view.strides)),
         "save contiguous tensors");
  room_ -= count * size;
  std::vector<std::byte> out(count * size);
  std::vector<int64_t> index(view.shape.size());
  const auto columns = static_cast<size_t>(view.shape[last]), step = static_cast<size_t>(view.strides[last]) * size;
  for (size_t to = 0; to < out.size();) {
    size_t from = 0;
    for (size_t i = 0; i < last; ++i) from += static_cast<size_t>(index[i] * view.strides[i]) * size;
    for (size_t c = 0; c < columns; ++c, to += size) std::memcpy(&out[to], &view.data[from + c * step], size);
    for (size_t i = last; i > 0 && ++index[i - 1] == view.shape[i - 1]; --i) index[i - 1] = 0;
  }
  contents_.owned.push_back(std::move(out));
  return known->second = contents_.owned.back();
}

void StateDict::check_depth(int depth) const {
  if (depth > kMaxDepth) fail(where_, fmt::format("it has dicts nested more than {} deep", kMaxDepth), "");
}

bool StateDict::has_tensors(Ref ref, int depth) {
  if (is_tensor(ref)) return true;
  if (at(ref).kind != Kind::dict) return false;
  const auto [known, is_new] = has_tensors_.try_emplace(ref, false);
  if (!is_new) return known->second;
  check_depth(depth);
  bool any = false;
  for (size_t i = 1; i < at(ref).items.size(); i += 2) any = has_tensors(at(ref).items[i], depth + 1) || any;
  return has_tensors_[ref] = any;
}

/// Of a training run's file, the model's own dict.
Ref StateDict::innermost() {
  constexpr auto kModel = std::to_array<std::string_view>({"state_dict", "model_state_dict", "model", "module"});
  Ref dict = pickle_.root;
  if (at(dict).kind != Kind::dict || !has_tensors(dict))
    fail(where_, "it holds no dict of tensors", "give a file of weights");
  for (;;) {
    const std::vector<Ref>& items = at(dict).items;
    std::vector<Ref> inner, named;
    for (size_t i = 0; i < items.size(); i += 2) {
      if (is_tensor(items[i + 1])) return dict;
      if (!has_tensors(items[i + 1])) continue;
      inner.push_back(items[i + 1]);
      if (std::ranges::find(kModel, at(items[i]).text) != kModel.end()) named.push_back(items[i + 1]);
    }
    if (inner.size() != 1 && named.empty()) return dict;
    if (collected_.size() > kMaxDepth || !collected_.insert(dict).second) fail(where_, "a dict in it holds itself", "");
    dict = inner.size() == 1 ? inner[0] : named[0];
  }
}

void StateDict::collect(Ref dict, const std::string& prefix, const Storages& storages, int depth) {
  if (!collected_.insert(dict).second) fail(where_, "a dict of tensors in it appears twice", "");
  check_depth(depth);  // here too: has_tensors stops at dicts that it knows
  const std::vector<Ref>& items = at(dict).items;
  bool beside_tensors = false;
  for (size_t i = 1; i < items.size(); i += 2) beside_tensors = beside_tensors || is_tensor(items[i]);
  for (size_t i = 0; i < items.size(); i += 2) {
    const PickleValue& key = at(items[i]);
    if (!has_tensors(items[i + 1])) {
      if (beside_tensors && key.kind == Kind::string) add_value(prefix + std::string(key.text), items[i + 1]);
      continue;
    }
    if (key.kind != Kind::string && key.kind != Kind::integer) fail(where_, "a tensor in it has no name");
    const std::string name =
        prefix + (key.kind == Kind::string ? std::string(key.text) : fmt::format("{}", key.integer));
    if (name.size() > kLongestName)
      fail(where_,
           fmt::format("the name '{}' has {} bytes, the most are {}", printable(name), name.size(), kLongestName));
    if (is_tensor(items[i + 1]))
      add(name, items[i + 1], storages);
    else
      collect(items[i + 1], name + ".", storages, depth + 1);
  }
}

void StateDict::add(const std::string& name, Ref tensor, const Storages& storages) {
  if (!is_utf8(name)) fail(where_, fmt::format("the name '{}' is no UTF-8", printable(name)));
  if (!names_.insert(name).second) fail(where_, fmt::format("tensor '{}' is there twice", printable(name)));
  View v = view(tensor, name, storages);
  const std::span<const std::byte> data = v.data.empty() || v.is_contiguous() ? v.data : gathered(v, name);
  contents_.arrays.push_back({.name = name, .dtype = v.dtype, .shape = std::move(v.shape), .data = data});
}

/// Numbers, short texts, names of number types, short lists of numbers; null for anything else.
Json StateDict::plain_value(Ref ref) const {
  constexpr size_t kLongestText = 64;
  const PickleValue& value = at(ref);
  if (value.kind == Kind::integer) return value.integer;
  if (value.kind == Kind::boolean) return value.integer != 0;
  if (value.kind == Kind::string && value.text.size() <= kLongestText && is_utf8(value.text)) return value.text;
  if (const Global* type = global(value); type != nullptr && type->kind == Global::Kind::dtype) return type->name;
  Ref list = ref;
  if (const Global* made = called(ref); made != nullptr && made->kind == Global::Kind::value) {  // torch.Size((2, 3))
    const std::vector<Ref>& arguments = at(value.items[1]).items;
    if (arguments.size() == 1) list = arguments[0];
  }
  const PickleValue& items = at(list);
  if ((items.kind != Kind::tuple && items.kind != Kind::list) || items.items.size() > kMaxRank) return nullptr;
  Json numbers = Json::array();
  for (const Ref item : items.items) {
    if (at(item).kind != Kind::integer) return nullptr;
    numbers.push_back(at(item).integer);
  }
  return numbers;
}

void StateDict::add_value(const std::string& name, Ref value) {
  if (name.size() > kLongestName || !is_utf8(name)) return;
  if (Json plain = plain_value(value); !plain.is_null()) values_[name] = std::move(plain);
}

WeightContents StateDict::read(const Storages& storages, size_t most_gathered) {
  room_ = most_gathered;
  collect(innermost(), "", storages);
  std::set<const std::byte*> owned;
  for (const std::vector<std::byte>& bytes : contents_.owned) owned.insert(bytes.data());
  std::ranges::stable_sort(contents_.arrays, {}, [&](const StoredArray& array) {
    return std::pair(owned.contains(array.data.data()), array.data.data());
  });
  if (!values_.empty()) contents_.values = std::make_shared<const Json>(std::move(values_));
  return std::move(contents_);
}

/// What a pickle of PyTorch before 1.6 begins with: a number of 80 bits.
constexpr std::array<uint8_t, 15> kMagic = {0x80, 2,    0x8a, 10,   0x6c, 0xfc, 0x9c, 0x46,
                                            0xf9, 0x20, 0x6a, 0xa8, 0x50, 0x19, '.'};
constexpr std::array<uint8_t, 4> kZip = {'P', 'K', 3, 4};

bool starts_with(std::span<const std::byte> file, std::span<const uint8_t> with) {
  return file.size() >= with.size() && std::memcmp(file.data(), with.data(), with.size()) == 0;
}

/// NAME/data.pkl, NAME/byteorder and, for each storage, NAME/data/KEY.
WeightContents read_zip(std::span<const std::byte> file, const std::string& where) {
  constexpr std::string_view kPickle = "/data.pkl", kOrder = "/byteorder", kData = "/data/", kLittle = "little";
  const std::vector<ZipEntry> entries = parse_zip(file, where);
  const auto is_pickle = [&](const ZipEntry& entry) {
    return entry.name.ends_with(kPickle) && entry.name.find('/') == entry.name.size() - kPickle.size();
  };
  const auto pickle = std::ranges::find_if(entries, is_pickle);
  if (pickle == entries.end()) fail(where, "the archive has no data.pkl", "give a file that torch.save wrote");
  const std::string_view root = pickle->name.substr(0, pickle->name.size() - kPickle.size());
  Storages storages;
  for (const ZipEntry& entry : entries) {
    if (!entry.name.starts_with(root)) continue;
    const std::string_view name = entry.name.substr(root.size());
    if (name.starts_with(kData)) storages[name.substr(kData.size())] = entry.data;
    if (name == kOrder && !std::ranges::equal(entry.data, std::as_bytes(std::span(kLittle))))
      fail(where, "its numbers are not little-endian", "save it again on a common machine");
  }
  return StateDict(pickle->data, where).read(storages, file.size());
}

/// Pickles of the magic number, the version, the machine, the state dict and the storages' keys; then each storage's
/// count (64 bits) and elements.
WeightContents read_legacy(std::span<const std::byte> file, const std::string& where) {
  size_t at = kMagic.size();
  const auto next = [&] {
    Pickle pickle = read_pickle(file.subspan(at), {}, where);
    at += pickle.bytes;
    return pickle;
  };
  if (const Pickle version = next(); version.values[version.root].integer != 1001)
    fail(where, "its version is not 1001", "save it again with a newer PyTorch");
  const Pickle machine = next();
  const std::vector<Ref>& facts = machine.values[machine.root].items;
  for (size_t i = 0; i + 1 < facts.size(); i += 2)
    if (machine.values[facts[i]].text == "little_endian" && machine.values[facts[i + 1]].integer != 1)
      fail(where, "its numbers are not little-endian", "save it again on a common machine");

  StateDict state(file.subspan(at), where);
  at += state.pickle_bytes();
  std::map<std::string_view, StorageName> described;
  for (const StorageName& storage : state.storages()) described.emplace(storage.key, storage);
  const Pickle keys = next();
  Storages storages;
  for (const Ref key : keys.values[keys.root].items) {
    const auto storage = described.find(keys.values[key].text);
    if (storage == described.end()) fail(where, "it holds a storage that no tensor lies in");
    uint64_t count = 0;
    if (file.size() - at < sizeof count) fail(where, "it ends before its last storage");
    std::memcpy(&count, file.data() + at, sizeof count);
    at += sizeof count;
    if (count != storage->second.count || storage->second.bytes > file.size() - at)
      fail(where, fmt::format("storage '{}' has {} elements, {} are announced; {} bytes follow",
                              printable(storage->first), count, storage->second.count, file.size() - at));
    storages[storage->first] = file.subspan(at, storage->second.bytes);
    at += storage->second.bytes;
  }
  if (at != file.size()) fail(where, fmt::format("{} bytes follow its last storage", file.size() - at));
  return state.read(storages, file.size());
}

bool detect(std::span<const std::byte> start) {
  const bool numpy = first_zip_name(start).ends_with(".npy");
  return (starts_with(start, kZip) && !numpy) || starts_with(start, kMagic);
}

WeightContents parse(std::span<const std::byte> file, const std::string& where) {
  if (starts_with(file, kMagic)) return read_legacy(file, where);
  constexpr std::array<uint8_t, 2> kPacked = {'P', 'K'};
  if (!file.empty() && !starts_with(file, kPacked))
    fail(where, "it begins neither as an archive nor as torch.save's older files", "give a file that torch.save wrote");
  return read_zip(file, where);
}

}  // namespace

extern const WeightFormat torch_file_format;
const WeightFormat torch_file_format = {
    .name = "torch",
    .suffix = ".bin",
    .other_suffixes = {".pt", ".pth"},
    .usual_name = "pytorch_model.bin",
    .source = "PyTorch 1.13, torch/serialization.py; https://docs.python.org/3/library/pickletools.html",
    .detect = detect,
    .parse = parse};

}  // namespace bitwright
