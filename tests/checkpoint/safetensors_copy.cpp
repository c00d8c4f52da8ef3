#include <anabranch/safetensors.h>
// Usage: safetensors_copy FROM TO
// Reads a safetensors file and writes what it holds to another: for tests from Python.
#include <exception>
#include <iostream>

int main(int argc, char** argv) {
  if (argc != 3) {
    std::cerr << "usage: safetensors_copy FROM TO\n";
    return 2;
  }
  try {
    const anabranch::SafetensorsReader reader(argv[1]);
    std::vector<anabranch::NamedTensor> tensors;
    for (const auto& [name, entry] : reader.entries()) tensors.push_back({name, reader.read(name)});
    anabranch::write_safetensors(argv[2], tensors);
    return 0;
  } catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 1;
  }
}
