// What train_lm reads, for tests that compare it with their own: token_windows DATA LENGTH SEED PART FIRST
// COUNT SIZE writes sequences FIRST to FIRST + COUNT of the part as int64. PART "training": of a step's
// batch of SIZE, whose step is FIRST / SIZE + 1; "validation": of SIZE of them.
#include <data/data.h>

#include <exception>
#include <iostream>
#include <string>

int main(int argc, char** argv) {
  using namespace train_lm;
  try {
    if (argc != 8) {
      throw std::invalid_argument("expected 7 arguments");
    }
    const auto source = open_token_source(argv[1], std::stoll(argv[2]), std::stoull(argv[3]));
    const int64_t first = std::stoll(argv[5]), count = std::stoll(argv[6]),
                  size = std::stoll(argv[7]);
    const int64_t begin = first / size * size;
    const auto windows =
        std::string(argv[4]) == "training"
            ? source->training_windows({first / size + 1, begin, size}, {first - begin, count})
            : source->validation_windows(size, {first, count});
    std::cout.write(static_cast<const char*>(windows.const_data_ptr()),
                    static_cast<std::streamsize>(windows.nbytes()));
    std::cerr << source->summary() << '\n';
    return 0;
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << '\n';
    return 2;
  }
}
