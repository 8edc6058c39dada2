#include "cli/command.hpp"

int main(int argc, char** argv) { return bitwright::run_command_line(argc, argv); }
