// A code family: the host side of kernels that share one loop per pass. Each family is one file in
// csrc/core/families.
#pragma once

#include "core/plan/call.h"
#include "core/plan/dim.h"
#include "core/plan/launch_plan.h"
#include "core/plan/row.h"
#include "core/plan/workspace.h"

namespace jax_flash {

// One pass of a family.
class PassTraits {
 public:
  // Whether a row runs a call. The plan checks arch, dtypes, head dims, loader, score kinds and shared memory
  // itself.
  virtual bool serves(const KernelRow&, const Call&) const { return true; }
  // Whether a row's kernels of every score kind read block masks.
  virtual bool takes_blocks(const KernelRow&) const { return false; }
  // Bytes of shared memory of a CTA, from the constexpr layout that the kernel is built with.
  virtual int64_t shared_bytes(const KernelRow& row, const Call& call) const = 0;
  // Whether `a` suits the call better than `b`; both run it with the same padding.
  virtual bool better(const KernelRow&, const KernelRow&, const Call&) const { return false; }
  // Whether a forward row suits a call better than the decode row that also runs it.
  virtual bool beats_decode(const KernelRow&, const Call&) const { return false; }
  // Fills the plan's grids and takes the workspace that they need.
  virtual void plan_grid(const KernelRow& row, const Call& call, Workspace& workspace,
                         LaunchPlan& plan) const = 0;
  // Whether a decode row runs packed sequences of any length, so that no forward follows.
  virtual bool runs_every_sequence(const KernelRow&) const { return false; }
  // Upper bound of the workspace on every device.
  virtual Dim workspace_bound(const AttentionSpec& spec, const DimShapes& shapes) const = 0;

 protected:
  ~PassTraits() = default;
};

struct Family {
  const PassTraits* forward = nullptr;  // null: the family has no such pass
  const PassTraits* backward = nullptr;
  const PassTraits* bias_gradient = nullptr;
  const PassTraits* decode = nullptr;
  const PassTraits* tangent = nullptr;

  const PassTraits* of(Pass pass) const {
    switch (pass) {
      case Pass::kForward:
        return forward;
      case Pass::kBackward:
        return backward;
      case Pass::kBiasGradient:
        return bias_gradient;
      case Pass::kDecode:
        return decode;
      case Pass::kTangent:
        return tangent;
      case Pass::kAppend:  // chosen by csrc/cuda/append/append.cc
        return nullptr;
    }
    return nullptr;
  }
};

}  // namespace jax_flash
