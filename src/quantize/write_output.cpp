#include "quantize/write_output.hpp"

#include <nlohmann/json.hpp>
#include <string>

#include "base/output.hpp"
#include "base/size.hpp"
#include "quantize/journal.hpp"
#include "quantize/model_files.hpp"

namespace bitwright {

void write_output(const Checkpoint& source, Job& job, const ShardPlan& shards, const Estimate& estimate,
                  const OutputOptions& options, const OutputSteps& steps) {
  OutputDirectory output(options.output, options.existing);
  const std::filesystem::path& staging = output.staging();
  announce(estimate, staging, allocated_bytes(staging));
  const OrderedJson files = source_identity(source);
  job.identity["tool"] = BITWRIGHT_VERSION;
  job.identity["max_shard_size"] = std::to_string(options.max_shard_bytes.value_or(0));
  job.identity["model"] = files;
  std::string headers;  // what a file says of itself depends on configuration and tokenizer too
  for (const ShardPlan::File& file : shards.files) headers += file.header;
  job.identity["headers"] = sha256(headers);
  Journal journal(output.journal(), job.identity);
  check_resumable(journal, job, shards, staging);
  if (steps.side_files) copy_side_files(source, staging);
  resumable(output, [&] {
    if (steps.begin) steps.begin();
    ShardWriter writer(staging, shards);
    const std::vector<SquaredError> errors = stream(job, estimate.piece_memory, writer, journal);
    writer.finish();
    check_unchanged(source, files);
    steps.finish(staging, errors);
    output.commit();
  });
}

}  // namespace bitwright
