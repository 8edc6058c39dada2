#include "engine/loads.hpp"

#include "engine/plan.hpp"

namespace bitwright {
namespace {

std::vector<Loads> ask_all(const std::string& method, const Json& model, const Facts& facts) {
  std::vector<Loads> answers;
  for (const Json* engine : facts.all("engines")) {
    PlanRequest request = {.engine = (*engine)["name"].get<std::string>(), .checkpoint = method, .model = model};
    const EnginePlan plan = plan_engine(request, facts);
    Loads answer = {.engine = request.engine, .yes = true};
    for (const Diagnostic& said : plan.diagnostics) {
      // Some engines take what they do not know for a plain model, and only warn.
      const bool refuses = said.severity == Severity::error || said.code == "UNSUPPORTED_CKPT";
      if (said.severity != Severity::note && (answer.reason.empty() || (refuses && answer.yes)))
        answer.reason = said.message;
      answer.yes = answer.yes && !refuses;
    }
    answers.push_back(std::move(answer));
  }
  return answers;
}

}  // namespace

std::vector<Loads> engines_that_load(const ModelDocuments& documents, const Facts& facts) {
  const DetectedQuantization found = detect_model_quantization(documents);
  const auto config = documents.find("config.json");
  Json model = config == documents.end() ? Json::object() : model_facts(config->second);
  model.update(found.facts);
  return ask_all(found.method, model, facts);
}

std::vector<Loads> engines_that_load(std::string_view method, const Facts& facts) {
  return ask_all(std::string(method), Json::object(), facts);
}

}  // namespace bitwright
