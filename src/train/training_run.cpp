#include "train/training_run.hpp"

#include <chrono>

#include "base/mapped_file.hpp"
#include "base/output.hpp"
#include "base/threads.hpp"
#include "bitwright/torch/trainer.hpp"
#include "model/open_model.hpp"
#include "quantize/model_files.hpp"
#include "recipe/config.hpp"
#include "train/causal_lm.hpp"
#include "train/data_parallel.hpp"
#include "train/dataset.hpp"
#include "train/export.hpp"
#include "train/tensor_memory.hpp"
#include "train/training_checkpoint.hpp"
#include "train/training_mode.hpp"

namespace bitwright::train {
namespace {

namespace fs = std::filesystem;

/// The model that is trained, and where its other files come from.
struct Source {
  std::optional<Checkpoint> checkpoint{};
  std::shared_ptr<CausalLm> model{};
  ExportSource files{};
  fs::path tokenizer{};
};

[[noreturn]] void bad_config(const fs::path& where, const std::string& why, const std::string& fix) {
  throw Error({.code = "bad-value",
               .what = "bad configuration",
               .where = where.string(),
               .why = why,
               .fix = fix,
               .status = ExitStatus::usage});
}

OrderedJson architecture_json(const TrainingConfig& config) {
  if (config.architecture.starts_with('{')) return parse_ordered_json(config.architecture, "architecture");
  return parse_ordered_json(read_text_file(config.architecture), config.architecture);
}

Source open_source(const TrainingConfig& config, const TrainingMode& mode, const fs::path& where) {
  CausalLmOptions options = {.recompute_layers = config.activation_checkpointing,
                             .seed = static_cast<uint64_t>(config.seed)};
  Source source;
  if (!config.model.empty()) {
    source.checkpoint.emplace(open_model(config.model));
    source.checkpoint->verify_digests();
    if (mode.load != nullptr) mode.load(config, options);
    source.model = std::make_shared<CausalLm>(*source.checkpoint, options);
    source.files = export_source(*source.checkpoint);
    source.tokenizer = config.tokenizer.empty() ? tokenizer_path(*source.checkpoint) : fs::path(config.tokenizer);
  } else if (!config.architecture.empty()) {
    if (config.tokenizer.empty())
      bad_config(where, "there is no tokenizer", "'architecture' begins from nothing: name a model's 'tokenizer'");
    source.files.config = architecture_json(config);
    source.model = std::make_shared<CausalLm>(Json(source.files.config), options);
    source.tokenizer = config.tokenizer;
  } else {
    bad_config(where, "there is neither 'model' nor 'architecture'",
               "name a model to go on from, or a config.json to begin with random weights");
  }
  if (!config.tokenizer.empty())
    source.files.directory = fs::is_directory(source.tokenizer) ? source.tokenizer : source.tokenizer.parent_path();
  return source;
}

/// The output directory is new, or holds a run that is gone on with, or one that may be removed.
void check_output(const TrainingConfig& config, const TrainingRunOptions& options) {
  const fs::path output = config.output;
  std::error_code none;
  if (output.empty()) bad_config(options.config, "'output' is empty", "name a directory");
  if (!fs::exists(fs::symlink_status(output, none)) || (fs::is_directory(output) && fs::is_empty(output))) return;
  const bool is_run = fs::is_directory(output) && fs::exists(output / "run.json");
  if (!is_run)
    throw Error({.code = "output-exists",
                 .what = "cannot write output",
                 .where = output.string(),
                 .why = "it is there, and no output of `train`",
                 .fix = "choose another 'output'"});
  if (options.resume) return;
  if (!options.force)
    throw Error({.code = "output-exists",
                 .what = "cannot write output",
                 .where = output.string(),
                 .why = "a run is there already",
                 .fix = "add --resume to go on with it, --force to start again, or choose another 'output'"});
  fs::remove_all(output);
}

/// SHA-256 over the digests of all weight files. Reads them through.
std::string weights_digest(const Checkpoint& checkpoint) {
  const fs::path path = checkpoint.path(), directory = fs::is_directory(path) ? path : path.parent_path();
  std::string all;
  for (const Checkpoint::File& file : checkpoint.files()) all += MappedFile(directory / file.name).digest();
  return sha256(all);
}

TrainableModel trainable(const std::shared_ptr<CausalLm>& model) {
  return {.module = model,
          .logits = [model](const torch::Tensor& inputs) { return model->forward(inputs); },
          .loss = [model](const torch::Tensor& inputs,
                          const torch::Tensor& targets) { return model->loss(inputs, targets); },
          .set_compute = [model](torch::ScalarType type) { model->options().compute = type; }};
}

/// What a checkpoint holds besides what learns, so that it can be read without anything else at hand.
void add_checkpoint_files(Trainer& trainer, const Source& source, const OrderedJson& quantization) {
  trainer.add_files([&source, quantization](const fs::path& directory) {
    write_text_file(directory / "model_config.json", source.files.config.dump(1) + "\n");
    for (const char* name : {"tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "merges.txt"})
      if (fs::is_regular_file(source.files.directory / name))
        fs::copy_file(source.files.directory / name, directory / name);
    if (quantization.is_null()) return;
    OrderedJson metadata = {{"format_version", "1.0"}, {"bitwright", BITWRIGHT_VERSION}, {"state", "training"}};
    metadata.update(quantization);
    write_text_file(directory / "quantization_metadata.json", metadata.dump(1) + "\n");
  });
}

void export_trained(const CausalLm& model, const Source& source, const TrainingConfig& config, const fs::path& output,
                    const OrderedJson& record) {
  const std::vector<ExportedTensor> tensors = exported_tensors(model);
  const bool quantized =
      std::ranges::any_of(tensors, [](const ExportedTensor& tensor) { return !tensor.floats.defined(); });
  export_model(tensors, source.files,
               {.output = {.output = output, .existing = fs::exists(output) ? Existing::replace : Existing::refuse},
                .container = quantized ? find_container(config.container) : nullptr,
                .floats = *dtype_from_name(config.export_dtype),
                .record = record});
}

}  // namespace

namespace {

/// How this process takes part in training the model; null: it is alone.
std::shared_ptr<ParallelModel> in_parallel(const std::shared_ptr<ProcessGroup>& group,
                                           const std::shared_ptr<CausalLm>& model, const TrainingConfig& config,
                                           const Prepared& prepared) {
  const bool split = config.sharding == "parameters";
  if (group->size() == 1 && !split) return nullptr;
  const auto refuse = [](const std::string& key, const std::string& why, const std::string& fix) {
    throw Error({.code = "bad-value",
                 .what = "bad configuration",
                 .where = key,
                 .why = why,
                 .fix = fix,
                 .status = ExitStatus::usage});
  };
  if (split && prepared.finetuning)
    refuse("sharding", "quantized weights that learn are whole in every process", "set it to none");
  if (split && config.optimizer != "adamw")
    refuse("optimizer", fmt::format("{}'s blocks are not split between processes", config.optimizer),
           "use adamw, or sharding: none");
  const auto parallel = std::make_shared<ParallelModel>(group, model, split ? Sharding::parameters : Sharding::none,
                                                        model->layer_paths());
  if (split)
    model->options().hooks = {.before = [parallel](size_t layer) { parallel->before(layer); },
                              .after = [parallel](size_t layer) { parallel->after(layer); },
                              .after_backward = [parallel](size_t layer) { parallel->after_backward(layer); }};
  return parallel;
}

/// The same in every process until the model is trained; what comes then is rank 0's.
OrderedJson run_as_one(const TrainingRunOptions& options, const TrainingConfig& config,
                       const std::shared_ptr<ProcessGroup>& group, std::vector<Warning>& warnings) {
  const auto start = std::chrono::steady_clock::now();
  const TrainingMode& mode = training_mode(config);
  at::set_num_threads(static_cast<int>(thread_count()));
  if (mode.frozen) use_tensor_memory();  // small against the base, that is what it is for
  const Source source = open_source(config, mode, options.config);
  CausalLm& model = *source.model;
  const Tokenizer tokenizer(source.tokenizer);
  const Protocol protocol = protocol_of(config, tokenizer, model.config().context);
  TokenTexts tokens = read_texts(config, tokenizer, protocol);
  if (group->rank() == 0) check_output(config, options);
  group->barrier();

  torch::manual_seed(static_cast<uint64_t>(config.seed));
  const Prepared prepared = mode.prepare ? mode.prepare(model, config, warnings) : Prepared();
  const std::shared_ptr<ParallelModel> parallel = in_parallel(group, source.model, config, prepared);
  Trainer trainer(trainable(source.model), config, prepared.finetuning, parallel);
  add_checkpoint_files(trainer, source, prepared.quantization);
  if (mode.frozen && source.checkpoint) trainer.require_base(weights_digest(*source.checkpoint));
  if (options.resume && !trainer.resume())
    warnings.push_back({"NO_CHECKPOINT", fmt::format("there is no checkpoint in {}: training begins", config.output)});
  const Trainer::Texts texts = {.training = std::move(tokens.training),
                                .validation = std::move(tokens.validation),
                                .sequence_length = protocol.context,
                                .vocabulary = model.config().vocabulary,
                                .encode = [&](const std::string& text) { return tokenizer.encode(text); },
                                .decode = [&](std::span<const int32_t> ids) { return tokenizer.decode(ids); }};
  const TrainingResult trained = trainer.train(texts);
  if (parallel) {
    parallel->join_on_first();
    model.options().hooks = {};
    if (group->rank() != 0) return {{"steps", trained.steps}, {"rank", group->rank()}};
  }

  const bool validates = static_cast<int64_t>(texts.validation.size()) > texts.sequence_length;
  const auto validate = [&] { return trainer.evaluate(texts.validation, texts.sequence_length, config.eval_windows); };
  const TokenDataset data(texts.training, texts.sequence_length, static_cast<uint64_t>(config.seed));
  OrderedJson result = {{"steps", trained.steps}, {"loss", nullptr}, {"val_loss", nullptr}};
  if (trained.loss) result["loss"] = *trained.loss;
  if (trained.val_loss)
    result["val_loss"] = *trained.val_loss;
  else if (validates)
    result["val_loss"] = validate();
  result["checkpoint"] = trained.checkpoint.string();
  const fs::path adapter = fs::path(config.output) / "adapter", exported = fs::path(config.output) / "model";
  bool has_model = true;
  if (mode.finish != nullptr) {
    has_model = mode.finish({.model = model,
                             .config = config,
                             .calibrate =
                                 [&] {
                                   const torch::NoGradGuard no_gradients;
                                   constexpr int64_t kWindows = 32;
                                   for (int64_t i = 0; i < kWindows; i += config.batch_size)
                                     model.forward(data.batch(i, config.batch_size).narrow(1, 0, data.length()));
                                 },
                             .loss = validates ? std::function<double()>(validate) : nullptr,
                             .adapter = adapter,
                             .result = result,
                             .warnings = warnings});
    if (has_model && validates) result["val_loss"] = validate();  // of what is exported
  }
  const OrderedJson record = {{"run_id", trainer.run_id()},
                              {"config_hash", config.hash()},
                              {"mode", mode.name},
                              {"steps", trained.steps},
                              {"val_loss", result["val_loss"]}};
  if (has_model) export_trained(model, source, config, exported, record);
  result["model"] = (has_model ? exported : adapter).string();
  result["mode"] = mode.name;
  result["run_id"] = trainer.run_id();
  result["config_hash"] = config.hash();
  result["seconds"] = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return result;
}

}  // namespace

OrderedJson run_training(const TrainingRunOptions& options, std::vector<Warning>& warnings) {
  const TrainingConfig config = TrainingConfig::read(options.config, options.set);
  const ProcessPlace place = place_from_environment();
  if (place.local_size > 1)  // they share the machine's cores
    set_thread_count(std::max<size_t>(1, thread_count() / static_cast<size_t>(place.local_size)));
  const auto group = ProcessGroup::join(place);
  try {
    return run_as_one(options, config, group, warnings);
  } catch (const Error& error) {
    group->leave(error.what());
    throw;
  }
}

}  // namespace bitwright::train
