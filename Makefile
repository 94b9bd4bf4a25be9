# `make demo` and `make test` start from nothing but Python >= 3.10 and a C++ compiler. All targets
# share .venv and one build of the package, which is made again when one of its sources changes.

PYTHON ?= python3
TORCH ?= torch==2.13.0
# What pyproject.toml asks of a build. In .venv, so that a second build compiles what changed only.
tools := "scikit-build-core>=0.11" "pybind11>=2.13" cmake ninja
WORKERS ?= auto

# CUDA kernels are built where a GPU is seen; CUDA=1 builds them anyway, CUDA=0 never.
gpu := $(shell nvidia-smi -L > /dev/null 2>&1 && echo yes)
cuda := $(if $(CUDA),$(if $(filter 0,$(CUDA)),OFF,ON),$(if $(gpu),AUTO,OFF))
why := $(if $(CUDA),CUDA=$(CUDA) was given,$(if $(gpu),a GPU is seen,no GPU is seen))
sources := pyproject.toml CMakeLists.txt \
  $(shell find csrc trak_ext -not -path '*__pycache__*' -not -name '*.md')
pip := .venv/bin/python -m pip --disable-pip-version-check -q
# Two runs of make in one folder wait for each other where there is flock.
lock := $(if $(shell command -v flock),flock build/lock)

.PHONY: demo test docs lint clean

demo: .venv/built-$(cuda)
	@echo "== Demonstration: about 20 seconds on two cores; results go to demo_out"
	@.venv/bin/trak-ext demo --out demo_out

test: .venv/built-$(cuda) .venv/extra-test
	@echo "== All tests, on $(WORKERS) workers: about 20 minutes on two cores"
	@.venv/bin/pytest -n $(WORKERS)

docs: .venv/built-$(cuda) .venv/extra-docs
	@echo "== Documentation: about 10 seconds; pages go to build/site"
	@NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict --quiet

lint: .venv/built-$(cuda) .venv/extra-lint
	@echo "== ruff, clang-format, mypy: half a minute"
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@git ls-files '*.h' '*.cpp' '*.cu' | xargs .venv/bin/clang-format --dry-run -Werror
	@.venv/bin/mypy

clean:
	rm -rf build .venv demo_out

.venv/base:
	@echo "== .venv with $(TORCH): a minute, or as long as the download takes"
	@mkdir -p build
	@$(lock) $(PYTHON) -m venv .venv
	@$(lock) $(pip) install "$(TORCH)" $(tools)
	@touch $@

.venv/built-$(cuda): .venv/base $(sources)
	@echo "== Building trak_ext, TRAK_EXT_CUDA=$(cuda) since $(why):" \
	  "$(if $(filter OFF,$(cuda)),no CUDA kernels; half a minute,with CUDA kernels; 5 to 10 minutes on two cores)"
	@mkdir -p build && rm -f .venv/built-*
	@PATH="$(CURDIR)/.venv/bin:$$PATH" $(lock) $(pip) install ".[demo]" --no-build-isolation \
	  --config-settings=build-dir=build/make-$(cuda) \
	  --config-settings=cmake.define.TRAK_EXT_CUDA=$(cuda)
	@touch $@

# The package is there, so that pip brings only what the extra names.
.venv/extra-%: pyproject.toml | .venv/built-$(cuda)
	@echo "== Packages of the extra '$*'"
	@mkdir -p build
	@$(lock) $(pip) install "trak-ext[$*]"
	@touch $@
