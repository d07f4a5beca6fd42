// What a caller says of a launch on the host; tests/host.rs has the same struct. Included by host.h and by a stand-in driver.
#pragma once

namespace shim {

struct Launch {
  unsigned grid[3], block[3], shared;
  unsigned order;  // 0 forward, 1 backward, 2 random
  unsigned long long seed;
  unsigned first;  // blocks before it along x do not run
};

}  // namespace shim
