// One GGUF file in llama.cpp and here: tokens, logits, perplexity, greedy text. Not part of the build: llamacpp.py
// compiles it against a llama.cpp and runs it over many models.
//
//   llamacpp compare MODEL FILE.gguf TEXT CONTEXT WINDOWS   one line of JSON; MODEL: what FILE was made from
//   llamacpp types FILE.gguf                                each tensor and its type
//   llamacpp keys FILE.gguf                                 the metadata as JSON
//   llamacpp tokens FILE.gguf MODEL TEXT                    do both cut TEXT's lines into the same tokens?
//   llamacpp quantize IN.gguf OUT.gguf ID                   by llama.cpp; ID: of the file type (0: all to f32)
#include <llama.h>

#include <algorithm>
#include <cmath>
#include <iostream>
#include <nlohmann/json.hpp>
#include <span>

#include "base/error.hpp"
#include "base/mapped_file.hpp"
#include "checkpoint/gguf.hpp"
#include "evaluate/evaluate.hpp"
#include "model/open_model.hpp"
#include "quantize/model_files.hpp"

using namespace bitwright;

namespace {

constexpr int kGreedy = 32, kPrompt = 8;

void log_errors(ggml_log_level level, const char* text, void*) {
  if (level == GGML_LOG_LEVEL_ERROR || std::getenv("LLAMACPP_LOG") != nullptr) std::fputs(text, stderr);
}

/// llama.cpp with all of its own roundings that can be switched off switched off: keys and values in f32, no flash
/// attention, weights not repacked.
class Peer {
 public:
  Peer(const std::string& path, uint32_t context) {
    llama_model_params model = llama_model_default_params();
    model.n_gpu_layers = 0;
    model.use_extra_bufts = false;
    model.vocab_only = context == 0;
    model_ = llama_model_load_from_file(path.c_str(), model);
    if (model_ == nullptr) throw Error({.code = "peer", .what = "llama.cpp cannot load", .where = path});
    if (context == 0) return;
    llama_context_params params = llama_context_default_params();
    params.n_ctx = params.n_batch = params.n_ubatch = context;
    params.n_threads = params.n_threads_batch = 1;
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;
    params.type_k = params.type_v = GGML_TYPE_F32;
    context_ = llama_init_from_model(model_, params);
    if (context_ == nullptr) throw Error({.code = "peer", .what = "llama.cpp cannot run", .where = path});
  }
  Peer(const Peer&) = delete;
  ~Peer() {
    if (context_ != nullptr) llama_free(context_);
    llama_model_free(model_);
  }

  void clear() { llama_memory_clear(llama_get_memory(context_), true); }
  const llama_vocab* vocabulary() const { return llama_model_get_vocab(model_); }

  /// Appends, and returns the logits of each token.
  std::vector<float> forward(std::span<const int32_t> tokens) {
    llama_batch batch = llama_batch_init(static_cast<int32_t>(tokens.size()), 0, 1);
    for (const int32_t token : tokens) {
      const int32_t i = batch.n_tokens++;
      batch.token[i] = token;
      batch.pos[i] = 1 + llama_memory_seq_pos_max(llama_get_memory(context_), 0) + i;
      batch.n_seq_id[i] = 1;
      batch.seq_id[i][0] = 0;
      batch.logits[i] = 1;
    }
    if (llama_decode(context_, batch) != 0) throw Error({.code = "peer", .what = "llama_decode failed"});
    std::vector<float> out;
    const int32_t size = llama_vocab_n_tokens(vocabulary());
    for (int32_t i = 0; i < batch.n_tokens; ++i) {
      const float* const row = llama_get_logits_ith(context_, i);
      out.insert(out.end(), row, row + size);
    }
    llama_batch_free(batch);
    return out;
  }

  std::vector<int32_t> tokens(const std::string& text) const {
    std::vector<int32_t> out(text.size() + 16);
    const auto room = static_cast<int32_t>(out.size());
    const int32_t n = llama_tokenize(vocabulary(), text.data(), static_cast<int32_t>(text.size()), out.data(), room,
                                     /*add_special=*/false, /*parse_special=*/true);
    if (n < 0) throw Error({.code = "peer", .what = "llama_tokenize failed"});
    out.resize(static_cast<size_t>(n));
    return out;
  }

 private:
  llama_model* model_ = nullptr;
  llama_context* context_ = nullptr;
};

int32_t most_likely(std::span<const float> logits) {
  return static_cast<int32_t>(std::ranges::max_element(logits) - logits.begin());
}

/// Sums over positions.
struct Sums {
  double nll_peer = 0, nll_file = 0, nll_model = 0, divergence = 0;
  float file = 0, model = 0, spread = 0;
  int64_t positions = 0, top = 0;
};

double log_sum(std::span<const float> row) {
  const float most = std::ranges::max(row);
  double sum = 0;
  for (const float x : row) sum += std::exp(static_cast<double>(x - most));
  return most + std::log(sum);
}

float distance(std::span<const float> a, std::span<const float> b) {
  float most = 0;
  for (size_t i = 0; i < a.size(); ++i) most = std::max(most, std::abs(a[i] - b[i]));
  return most;
}

void add(std::span<const float> peer, std::span<const float> file, std::span<const float> model, int32_t target,
         Sums& sums) {
  const double p = log_sum(peer), f = log_sum(file), m = log_sum(model);
  const auto t = static_cast<size_t>(target);
  sums.nll_peer += p - peer[t];
  sums.nll_file += f - file[t];
  sums.nll_model += m - model[t];
  for (size_t i = 0; i < peer.size(); ++i) sums.divergence += std::exp(peer[i] - p) * ((peer[i] - p) - (file[i] - f));
  sums.file = std::max(sums.file, distance(peer, file));
  sums.model = std::max(sums.model, distance(peer, model));
  sums.spread = std::max(sums.spread, std::ranges::max(peer) - std::ranges::min(peer));
  sums.top += most_likely(peer) == most_likely(file) ? 1 : 0;
  ++sums.positions;
}

std::vector<int32_t> greedy(const Model& model, std::span<const int32_t> prompt, int64_t context) {
  KvCache cache(model.config(), context);
  std::vector<int32_t> step(prompt.begin(), prompt.end()), out;
  for (int i = 0; i < kGreedy; ++i) {
    step = {most_likely(model.forward(step, cache, Model::Logits::last))};
    out.push_back(step.front());
  }
  return out;
}

std::vector<int32_t> greedy(Peer& peer, std::span<const int32_t> prompt) {
  peer.clear();
  std::vector<int32_t> step(prompt.begin(), prompt.end()), out;
  for (int i = 0; i < kGreedy; ++i) {
    const std::vector<float> logits = peer.forward(step);
    step = {most_likely(std::span(logits).last(logits.size() / step.size()))};
    out.push_back(step.front());
  }
  return out;
}

Json compare(const std::string& original, const std::string& file, const std::string& text, int64_t context,
             int64_t windows) {
  const Checkpoint source = open_model(original), written = open_model(file);
  const Model model(source), ours(written);
  const Tokenizer tokenizer(tokenizer_path(source));
  const bool adds = tokenizer.adds_bos() && tokenizer.bos_id();
  const Protocol protocol = {
      .context = context, .stride = context, .bos = adds ? Protocol::Bos::document : Protocol::Bos::none};
  const MappedFile mapped(text);
  const std::vector<int32_t> tokens = token_stream(tokenizer, mapped.text(), protocol);
  Peer peer(file, static_cast<uint32_t>(context));
  Sums sums;
  const auto size = static_cast<size_t>(ours.config().vocabulary), length = static_cast<size_t>(context);
  for (size_t w = 0; w < static_cast<size_t>(windows) && (w + 1) * length < tokens.size(); ++w) {
    const auto input = std::span(tokens).subspan(w * length, length);
    peer.clear();
    KvCache mine(ours.config(), context), theirs(model.config(), context);
    const std::vector<float> a = peer.forward(input), b = ours.forward(input, mine), c = model.forward(input, theirs);
    const auto row = [&](const std::vector<float>& logits, size_t i) {
      return std::span(logits).subspan(i * (logits.size() / length), size);
    };
    for (size_t i = 0; i < length; ++i) add(row(a, i), row(b, i), row(c, i), tokens[w * length + i + 1], sums);
  }
  const auto n = static_cast<double>(sums.positions);
  const auto prompt = std::span(tokens).first(kPrompt);
  const std::vector<int32_t> theirs = greedy(peer, prompt), mine = greedy(ours, prompt, context);
  return {{"positions", sums.positions},
          {"ppl_llamacpp", std::exp(sums.nll_peer / n)},
          {"ppl_file", std::exp(sums.nll_file / n)},
          {"ppl_model", std::exp(sums.nll_model / n)},
          {"file", sums.file},
          {"model", sums.model},
          {"spread", sums.spread},
          {"kl", sums.divergence / n},
          {"top1", static_cast<double>(sums.top) / n},
          {"greedy", std::ranges::mismatch(theirs, mine).in1 - theirs.begin()}};
}

Json types(const std::string& path) {
  const MappedFile file(path);
  Json out = Json::object();
  for (const StoredArray& array : parse_gguf(file.bytes(), path).arrays)
    out[array.name] = array.block != nullptr ? std::string(array.block->name) : std::string(info(array.dtype).name);
  return out;
}

Json keys(const std::string& path) {
  const MappedFile file(path);
  Json out = Json::object();
  for (const GgufEntry& entry : parse_gguf(file.bytes(), path).metadata)
    out[std::string(entry.key)] = entry.is_array ? Json(entry.count) : to_json(entry);
  return out;
}

Json same_tokens(const std::string& file, const std::string& original, const std::string& text) {
  const Peer peer(file, 0);
  const Tokenizer own(original), written(file);
  const MappedFile mapped(text);
  int64_t lines = 0, own_differs = 0, written_differs = 0;
  std::string first;
  for (size_t at = 0; at < mapped.text().size();) {
    const size_t end = std::min(mapped.text().find('\n', at), mapped.text().size());
    const std::string line(mapped.text().substr(at, end - at));
    at = end + 1;
    if (line.empty()) continue;
    const std::vector<int32_t> theirs = peer.tokens(line);
    ++lines;
    if (own.encode(line) != theirs && ++own_differs == 1) first = line;
    written_differs += written.encode(line) != theirs ? 1 : 0;
  }
  return {{"lines", lines}, {"model_differs", own_differs}, {"file_differs", written_differs}, {"first", first}};
}

int quantize(const char* in, const char* out, int type) {
  llama_model_quantize_params params = llama_model_quantize_default_params();
  params.ftype = static_cast<llama_ftype>(type);
  params.allow_requantize = true;
  return static_cast<int>(llama_model_quantize(in, out, &params));
}

int run(std::span<char*> arguments) {
  const std::string command = arguments.size() > 2 ? arguments[1] : "";
  const auto is = [&](std::string_view name, size_t count) { return command == name && arguments.size() == 2 + count; };
  if (is("compare", 5)) {
    std::cout << compare(arguments[2], arguments[3], arguments[4], std::stol(arguments[5]), std::stol(arguments[6]));
  } else if (is("types", 1)) {
    std::cout << types(arguments[2]);
  } else if (is("keys", 1)) {
    std::cout << keys(arguments[2]);
  } else if (is("tokens", 3)) {
    std::cout << same_tokens(arguments[2], arguments[3], arguments[4]);
  } else if (is("quantize", 3)) {
    return quantize(arguments[2], arguments[3], std::stoi(arguments[4]));
  } else {
    std::cerr << "see the head of llamacpp.cpp\n";
    return 2;
  }
  std::cout << '\n';
  return 0;
}

}  // namespace

int main(int count, char** arguments) {
  llama_log_set(log_errors, nullptr);
  if (const char* libraries = std::getenv("LLAMACPP_LIBRARIES")) ggml_backend_load_all_from_path(libraries);
  llama_backend_init();
  try {
    return run(std::span(arguments, static_cast<size_t>(count)));
  } catch (const std::exception& error) {
    std::cerr << error.what() << '\n';
    return 1;
  }
}
