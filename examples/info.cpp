// What this build of anabranch can use here: ./info
#include <anabranch/build.h>

#include <exception>
#include <iostream>

int main() {
  try {
    std::cout << anabranch::describe_build();
    return 0;
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << std::endl;
    return 1;
  }
}
