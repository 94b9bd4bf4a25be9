// The sparse kind's kernels as a plain shared library for the tests (tests/cuda/test_host_sjlt.py).
#include <exception>
#include <string>
#include <vector>

#include "projection/run_sjlt.h"
#include "runner.h"

namespace {

using trak_ext::host_run::is_planted;
using trak_ext::host_run::Planted;
using trak_ext::host_run::Runner;

std::string message;

template <class Body>
const char* caught(const Body& body) {
  try {
    body();
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

int64_t bytes_of(const trak_ext::GradientView& grad, int64_t rows) {
  if (rows == 0 || grad.params == 0) return 0;
  return ((rows - 1) * grad.row_stride + (grad.params - 1) * grad.param_stride + 1) *
         trak_ext::element_bytes(grad.dtype);
}

// The fault's last tensor: what kernels that do not come to its end have read.
std::vector<trak_ext::GradientView> cut_short(const trak_ext::SjltProblem& problem) {
  std::vector<trak_ext::GradientView> grads(problem.grads, problem.grads + problem.num_grads);
  if (grads.empty() || grads.back().params == 0) return grads;
  trak_ext::GradientView& last = grads.back();
  if (is_planted(Planted::kMissingTail)) --last.params;
  if (is_planted(Planted::kDroppedLastChunk)) {
    const uint64_t end = last.param_offset + static_cast<uint64_t>(last.params);
    const uint64_t chunk = (end - 1) / problem.law.width * problem.law.width;
    if (chunk > last.param_offset) last.params = static_cast<int64_t>(chunk - last.param_offset);
  }
  return grads;
}

}  // namespace

struct HostProblem {
  trak_ext::SjltProblem problem;
  trak_ext::cuda::SjltWorkspace workspace;
  uint64_t order_seed;
  int64_t blocks_wanted;  // 0: as many rows a block as there are
};

extern "C" const char* host_project(const HostProblem* host) {
  return caught([&] {
    const trak_ext::SjltProblem& problem = host->problem;
    Runner& runner = Runner::get();
    runner.begin(host->order_seed);
    for (int64_t i = 0; i < problem.num_grads; ++i) {
      runner.allow(problem.grads[i].data, bytes_of(problem.grads[i], problem.rows));
    }
    runner.set_workspace(host->workspace.data, host->workspace.bytes);
    const auto columns = static_cast<int64_t>(problem.law.width) * problem.law.repetitions;
    if (problem.rows > 0 && columns > 0) {
      runner.allow(problem.out.data, ((problem.rows - 1) * problem.out.row_stride +
                                      (columns - 1) * problem.out.column_stride + 1) *
                                         static_cast<int64_t>(sizeof(float)));
    }
    const std::vector<trak_ext::GradientView> grads = cut_short(problem);
    trak_ext::SjltProblem taken = problem;
    taken.grads = grads.data();
    trak_ext::cuda::run_sjlt(taken, host->workspace, nullptr, host->blocks_wanted);
  });
}

extern "C" const char* host_fill_matrix(const trak_ext::cuda::SjltMatrixProblem* problem) {
  return caught([&] {
    Runner& runner = Runner::get();
    runner.begin(0);
    runner.allow(problem->out, problem->params * problem->law.repetitions *
                                   static_cast<int64_t>(problem->law.width) * 4);
    trak_ext::cuda::SjltMatrixProblem scaled = *problem;
    scaled.scale = trak_ext::sjlt_scale(problem->law);
    if (is_planted(Planted::kMissingTail)) --scaled.params;
    if (is_planted(Planted::kWrongSign)) scaled.scale = -scaled.scale;
    trak_ext::cuda::run_fill_sjlt_matrix(scaled, nullptr);
  });
}

extern "C" int64_t host_workspace_bytes(const trak_ext::SjltProblem* problem, int64_t limit) {
  return trak_ext::cuda::plan_sjlt_workspace(*problem, limit);
}

extern "C" int host_tile_columns(uint64_t width) {
  return trak_ext::cuda::sjlt_tile_columns(width);
}

extern "C" void host_note_launches(trak_ext::host_run::LaunchNote note) {
  Runner::get().note_launches(note);
}

extern "C" int64_t host_blocks_wanted() { return trak_ext::cuda::kSjltBlocksWanted; }

extern "C" int64_t host_sizeof_problem() { return sizeof(HostProblem); }
