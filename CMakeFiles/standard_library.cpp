#include <iostream>
void tell(long number) { std::cout << number; }
