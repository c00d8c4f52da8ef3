#include "arguments.h"

#include <ATen/Parallel.h>

#include <CLI/CLI.hpp>
#include <iostream>
#include <map>
#include <stdexcept>

namespace anabranch::benchmark {
namespace {

const std::map<std::string, AllToAll>& all_to_all_names() {
  static const std::map<std::string, AllToAll> names = {{"flat", AllToAll::kFlat},
                                                        {"hierarchical", AllToAll::kHierarchical},
                                                        {"auto", AllToAll::kAuto}};
  return names;
}

/// Adds the option of a name to `app`, which fills a field of the arguments.
using AddOption = std::function<void(CLI::App& app, const std::string& name, Arguments& arguments)>;

template <typename Field>
AddOption option(Field Arguments::*field, const std::string& help,
                 const CLI::Validator& check = {}) {
  return [=](CLI::App& app, const std::string& name, Arguments& arguments) {
    app.add_option("--" + name, arguments.*field, help)->check(check);
  };
}

AddOption flag(bool Arguments::*field, const std::string& help) {
  return [=](CLI::App& app, const std::string& name, Arguments& arguments) {
    app.add_flag("--" + name, arguments.*field, help);
  };
}

void add_all_to_all(CLI::App& app, const std::string& name, Arguments& arguments) {
  app.add_option("--" + name, arguments.all_to_all, "flat, hierarchical or auto")
      ->transform(CLI::CheckedTransformer(all_to_all_names()));
}

void add_bytes(CLI::App& app, const std::string& name, Arguments& arguments) {
  app.add_option("--" + name, arguments.bytes, "mean bytes from a rank to another")->delimiter(',');
}

void add_shapes(CLI::App& app, const std::string& name, Arguments& arguments) {
  app.add_option("--" + name, arguments.shapes, "of these names only")->delimiter(',');
}

const std::map<std::string, AddOption>& known_options() {
  static const std::map<std::string, AddOption> options = {
      {"json", option(&Arguments::json, "file for the results")},
      {"commit", option(&Arguments::commit, "commit of the measured sources, for the record")},
      {"quick", flag(&Arguments::quick, "a few cases only")},
      {"rounds", option(&Arguments::rounds, "timed rounds", CLI::PositiveNumber)},
      {"threads", option(&Arguments::threads, "0: LibTorch's default", CLI::NonNegativeNumber)},
      {"engine", option(&Arguments::engine, "of the grouped GEMM")},
      {"tokens", option(&Arguments::tokens, "of each rank", CLI::PositiveNumber)},
      {"hidden", option(&Arguments::hidden, "size of a token's row", CLI::PositiveNumber)},
      {"expert-hidden",
       option(&Arguments::expert_hidden, "size within an expert", CLI::PositiveNumber)},
      {"experts", option(&Arguments::experts, "over all ranks", CLI::PositiveNumber)},
      {"top-k", option(&Arguments::top_k, "experts of a token", CLI::PositiveNumber)},
      {"skew", option(&Arguments::skew, "s of Zipf's law for the experts' popularity; 0: uniform",
                      CLI::NonNegativeNumber)},
      {"seed", option(&Arguments::seed, "of random numbers")},
      {"device", option(&Arguments::device, "cpu, or cuda: a GPU for each rank, by NCCL",
                        CLI::IsMember({"cpu", "cuda"}))},
      {"dtype",
       option(&Arguments::dtype, "of rows and parameters", CLI::IsMember({"fp32", "bf16"}))},
      {"all-to-all", add_all_to_all},
      {"overlap",
       option(&Arguments::overlap, "how rows travel beside the products, see MoEOptions")},
      {"balance", option(&Arguments::balance, "what travels where load is skewed, see MoEOptions")},
      {"receive-rows-limit",
       option(&Arguments::receive_rows_limit, "rows that a rank receives at a time; 0: any number",
              CLI::NonNegativeNumber)},
      {"bytes", add_bytes},
      {"shapes", add_shapes},
  };
  return options;
}

}  // namespace

std::string to_string(AllToAll way) {
  for (const auto& [name, value] : all_to_all_names()) {
    if (value == way) {
      return name;
    }
  }
  throw std::invalid_argument("no such all-to-all");
}

int run_benchmark(int argc, char** argv, const Program& program,
                  const std::function<void(const Arguments&)>& run) {
  Arguments arguments = program.defaults;
  try {
    CLI::App app(program.description);
    app.option_defaults()->always_capture_default();
    for (const auto& name : program.options) {
      known_options().at(name)(app, name, arguments);
    }
    CLI11_PARSE(app, argc, argv);
    if (arguments.threads > 0) {
      at::set_num_threads(arguments.threads);
    }
    run(arguments);
    return 0;
  } catch (const std::exception& error) {
    std::cerr << error.what() << std::endl;
    return 1;
  }
}

}  // namespace anabranch::benchmark
