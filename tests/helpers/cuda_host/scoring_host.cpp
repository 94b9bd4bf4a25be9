// The scoring kernels as a plain shared library for the tests (tests/cuda/test_host_scoring.py).
#include <algorithm>
#include <exception>
#include <string>

#include "device/path.h"
#include "runner.h"
#include "scoring/run_scoring.h"

namespace {

using trak_ext::ScoringProblem;
using trak_ext::cuda::Path;
using trak_ext::cuda::Scorer;
using trak_ext::host_run::Runner;
namespace host_run = trak_ext::host_run;

std::string message;

}  // namespace

struct HostScoring {
  int64_t num_checkpoints;
  int64_t num_train;
  int64_t num_targets;
  int64_t proj_dim;
  const void* const* features;
  trak_ext::DType feature_dtype;
  const int64_t* row_strides;
  const void* solved;  // this and the next two of double where `wide`, else of float
  const void* coefficients;
  const void* weights;
  int parts;
  trak_ext::cuda::ScoringWorkspace workspace;
  int64_t features_bytes;    // of every checkpoint
  int64_t tile_for_targets;  // the tile that this number of targets would get
  void* out;                 // [num_train, num_targets], or [num_targets, count] for the best
  int64_t out_row_stride;
  int64_t out_target_stride;
  int64_t count;  // of the best; -1 for all scores
  int64_t* indices;
  int32_t* not_a_number;
  int wide;
  int path;             // as trak_ext::cuda::Path
  int multiprocessors;  // of the device that is played: tiles are shared among its blocks
  uint64_t order_seed;
};

namespace {

template <class T>
void run(const HostScoring& host, const Scorer<T>& scorer) {
  ScoringProblem<T> problem = {host.num_checkpoints,
                               host.num_train,
                               host.num_targets,
                               host.proj_dim,
                               host.features,
                               host.feature_dtype,
                               host.row_strides,
                               static_cast<const T*>(host.solved),
                               static_cast<const T*>(host.coefficients),
                               static_cast<const T*>(host.weights),
                               static_cast<trak_ext::Precision>(host.parts)};
  constexpr auto kBytes = static_cast<int64_t>(sizeof(T));
  Runner& runner = Runner::get();
  runner.begin(host.order_seed);
  for (int64_t m = 0; m < problem.num_checkpoints; ++m) {
    runner.allow(problem.features[m], host.features_bytes);
  }
  runner.allow(problem.solved,
               problem.num_checkpoints * problem.num_targets * problem.proj_dim * kBytes);
  if (problem.coefficients) {
    runner.allow(problem.coefficients, problem.num_checkpoints * problem.num_train * kBytes);
  }
  if (problem.weights) runner.allow(problem.weights, problem.num_train * kBytes);
  runner.set_workspace(host.workspace.data, host.workspace.bytes);
  T* out = static_cast<T*>(host.out);
  if (host_run::is_planted(host_run::Planted::kMissingTail)) --problem.num_train;
  if (host.count < 0) {
    if (problem.num_train > 0 && problem.num_targets > 0) {
      runner.allow(out, ((problem.num_train - 1) * host.out_row_stride +
                         (problem.num_targets - 1) * host.out_target_stride + 1) *
                            kBytes);
    }
    trak_ext::cuda::run_score(scorer, problem, {out, host.out_row_stride, host.out_target_stride},
                              host.workspace, nullptr);
  } else {
    runner.allow(out, problem.num_targets * host.count * kBytes);
    runner.allow(host.indices, problem.num_targets * host.count * 8);
    runner.allow(host.not_a_number, 4);
    trak_ext::cuda::run_top_k(scorer, problem, host.count, {out, host.indices}, host.not_a_number,
                              host.workspace, nullptr);
  }
}

}  // namespace

extern "C" const char* host_score(const HostScoring* host) {
  try {
    if (host->wide) {
      run(*host, trak_ext::cuda::plain_scorer<double>());
    } else if (host->path == static_cast<int>(Path::kPlain)) {
      run(*host, trak_ext::cuda::plain_scorer<float>());
    } else if (host->path == static_cast<int>(Path::kMma)) {
      run(*host, trak_ext::cuda::tensor_core_scorer(host->feature_dtype, host->parts,
                                                    host->tile_for_targets));
    } else {
      ScoringProblem<float> problem = {};
      problem.num_train = host->num_train;
      problem.num_targets = host->tile_for_targets;
      problem.proj_dim = host->proj_dim;
      problem.feature_dtype = host->feature_dtype;
      problem.precision = static_cast<trak_ext::Precision>(host->parts);
      run(*host,
          trak_ext::cuda::choose_warpgroup_scorer(problem, std::max<int64_t>(host->count, 0),
                                                  host->workspace.bytes, host->multiprocessors));
    }
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

extern "C" void host_note_launches(trak_ext::host_run::LaunchNote note) {
  Runner::get().note_launches(note);
}

extern "C" void host_show_to(trak_ext::host_run::Witness witness) {
  Runner::get().show_to(witness);
}

extern "C" int64_t host_sizeof_scoring() { return sizeof(HostScoring); }
