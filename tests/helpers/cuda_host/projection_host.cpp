// The projection's kernels as a plain shared library for the tests
// (tests/cuda/test_host_projection.py).
#include <cstring>
#include <exception>
#include <string>

#include "device/path.h"
#include "projection/run_projection.h"
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

// The fault's tensor: what a kernel that does not come to its end has read.
trak_ext::GradientView cut_short(trak_ext::GradientView grad) {
  const trak_ext::cuda::ChunkCut cut = trak_ext::cuda::cut_chunks(grad);
  if (is_planted(Planted::kMissingTail)) --grad.params;
  if (is_planted(Planted::kDroppedLastChunk) && cut.chunks > 1) {
    const auto head = static_cast<int64_t>(grad.param_offset % trak_ext::cuda::kSuperblockParams);
    grad.params =
        (cut.chunks - 1) * cut.chunk_superblocks * trak_ext::cuda::kSuperblockParams - head;
  }
  return grad;
}

}  // namespace

struct HostProblem {
  trak_ext::MatrixLaw law;
  trak_ext::GradientView grad;
  int64_t rows;
  int64_t proj_dim;
  trak_ext::OutputView out;
  trak_ext::cuda::Workspace workspace;
  int64_t tile_for_rows;  // the tile of a batch of so many rows; 0: of those that are left
  int passes;             // 0: the kernel without matrix instructions
  uint64_t order_seed;
  int64_t shared_limit;  // of a block, on the device that is played
  int warpgroups;        // 1: the kernels of sm_90a
  int64_t multiprocessors;
};

extern "C" const char* host_project(const HostProblem* problem) {
  return caught([&] {
    const HostProblem& p = *problem;
    Runner& runner = Runner::get();
    runner.begin(p.order_seed);
    runner.allow(p.grad.data, bytes_of(p.grad, p.rows));
    runner.set_workspace(p.workspace.data, p.workspace.bytes);
    if (p.rows > 0 && p.proj_dim > 0) {
      runner.allow(p.out.data,
                   ((p.rows - 1) * p.out.row_stride + (p.proj_dim - 1) * p.out.column_stride + 1) *
                       static_cast<int64_t>(sizeof(float)));
    }
    const int passes = trak_ext::cuda::passes_of(p.grad.dtype, p.passes);
    const auto path = p.passes == 0       ? trak_ext::cuda::Path::kPlain
                      : p.warpgroups != 0 ? trak_ext::cuda::Path::kWgmma
                                          : trak_ext::cuda::Path::kMma;
    const auto choose = [&](int64_t rows, bool is_rest) {
      const int64_t tile_for = p.tile_for_rows > 0 ? p.tile_for_rows : rows;
      return trak_ext::cuda::choose_multiplier(path, p.law.kind, passes, tile_for, is_rest,
                                               p.shared_limit);
    };
    trak_ext::cuda::run_projection(choose, p.law, cut_short(p.grad), p.rows, p.proj_dim, p.out,
                                   p.workspace, p.multiprocessors, nullptr);
  });
}

extern "C" const char* host_fill_matrix(const trak_ext::cuda::MatrixProblem* problem) {
  return caught([&] {
    Runner& runner = Runner::get();
    runner.begin(0);
    runner.allow(problem->out, problem->params * problem->proj_dim * 4);
    trak_ext::cuda::run_fill_matrix(*problem, nullptr);
  });
}

extern "C" const char* host_find_path(const char* wanted, int best, int* path) {
  return caught([&] {
    *path = static_cast<int>(
        trak_ext::cuda::find_path(wanted, static_cast<trak_ext::cuda::Path>(best)));
  });
}

extern "C" void host_note_launches(trak_ext::host_run::LaunchNote note) {
  Runner::get().note_launches(note);
}

extern "C" void host_show_to(trak_ext::host_run::Witness witness) {
  Runner::get().show_to(witness);
}

extern "C" int64_t host_sizeof_problem() { return sizeof(HostProblem); }
