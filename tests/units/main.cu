// The wrappers of csrc/cuda/ptx and the layouts of csrc/cuda/tile, one by one, on a GPU:
//
//   cuda_units
#include "units.h"

int main() {
  using namespace jax_flash::units;
  test_ptx();
  test_tiles();
  std::printf(failed ? "%d failed\n" : "all passed\n", failed);
  return failed ? 1 : 0;
}
