// The wrappers of csrc/cuda/ptx, the layouts of csrc/cuda/tile and score variants with their gradients, one
// by one, on a GPU:
//
//   cuda_units
#include "units.h"

int main() {
  using namespace jax_flash::units;
  test_ptx();
  test_divisor();
  test_tiles();
  test_scores();
  test_ranges();
  test_blocks();
  test_masks();
  test_gradients();
  std::printf(failed ? "%d failed\n" : "all passed\n", failed);
  return failed ? 1 : 0;
}
