#pragma once

#include <cstdint>
#include <filesystem>
#include <string>

#include "model/model_options.h"
#include "training_options.h"

namespace train_lm {

struct SampleOptions {
  std::string
      prompt;  ///< bytes or, in another vocabulary, numbers of tokens; empty: of this program
  int64_t length = 400;
  double temperature = 0.8;  ///< 0: always the likeliest
  double top_p = 1;          ///< of the likeliest tokens that have so much probability together
  int64_t context = 0;       ///< see sample_text; of --generate
};

/// Everything `--help` lists.
struct Options {
  ModelOptions model;
  TrainingOptions training;
  SampleOptions sample;

  std::filesystem::path data;
  std::filesystem::path output = "output";
  bool resume = false;
  bool generate = false;          ///< nothing but a sample of the model in `output` or `load_hf`
  bool evaluate = false;          ///< nothing but its loss on held-out data
  std::filesystem::path load_hf;  ///< a folder of transformers' to start from
  std::filesystem::path save_hf;  ///< what to write one into in the end
  int64_t stop_at = 0;  ///< leave after this step as if interrupted; 0: at `training.steps`

  std::string device = "cpu";
  int64_t expert_parallel = 0;  ///< ranks that share one set of experts; 0: all
  std::string all_to_all = "flat";
  int64_t move_experts = 0;         ///< steps between moves of experts to other ranks; 0: none
  std::string balance = "off";      ///< what travels where load is skewed, see MoEOptions
  int64_t receive_rows_limit = 0;   ///< rows that a rank receives at a time; 0: any number
  int64_t micro_batch = 0;          ///< sequences of a rank at a time; 0: all of its share
  bool shard_optimizer = false;     ///< over the ranks that have a parameter (ZeRO-1)
  std::string recompute = "none";   ///< in backward: "experts", or the whole "block"
  std::string attention = "flash";  ///< or "cudnn": the first choice on a GPU
  bool stage_times = false;
  int64_t deadline = 300;  ///< seconds

  int64_t log_interval = 10;
  int64_t validation_interval = 100;
  int64_t validation_sequences = 128;
  int64_t checkpoint_interval = 200;
  bool no_save = false;     ///< no checkpoints at all
  bool async_save = false;  ///< a thread writes them, from a copy in host memory
  std::string progress = "auto";
};

/// The command line's options, or what to say (help, or what is wrong with them) and the exit code
/// to say it with.
struct CommandLine {
  Options options;
  bool train = true;
  std::string message;
  int exit_code = 0;
};

/// Prints nothing: under mpirun only one rank may.
CommandLine parse_command_line(int argc, char** argv);

/// Throws std::invalid_argument naming the first option that no run can be made of.
void check_options(const Options& options, int64_t ranks);

}  // namespace train_lm
