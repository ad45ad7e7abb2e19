# Every target sets up what it needs in .venv inside the checkout; a bare machine with Python 3.11 is enough.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed-$(shell cksum setup.py pyproject.toml | cksum | cut -d' ' -f1)

.PHONY: install quickstart test check bench bench-writing bench-gpu kernels reproduce reproduce-gpu test-slow test-faults test-gpu goldens clean

install: $(STAMP)
$(STAMP): setup.py pyproject.toml
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade "pip>=23" "setuptools>=68" wheel
	$(PY) -m pip install --quiet --no-build-isolation --editable ".[dev]"
	@rm -f $(VENV)/.installed-*; touch $@

kernels:                ## compiles the CUDA kernels; needs nvcc, and no GPU; PARLANCE_CUDA_ARCHS='80+PTX;90a'
	$(PYTHON) kernels/csrc/build.py

quickstart: install     ## text -> JANUS -> fine-tuned AR and NAR -> scores; OBJECTIVE=janus|elmer|cmlm|denoise STEPS=...
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(PY) -m finetune.quickstart --objective $(or $(OBJECTIVE),janus) $(if $(STEPS),--steps $(STEPS))

check: install          ## style, types, layers
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

test: install           ## everything that fits a laptop
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(PY) -m pytest -m "not slow and not gpu" --numprocesses logical --maxprocesses 4 --dist loadfile

test-slow: install      ## minutes long
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(PY) -m pytest -m slow

test-faults: install    ## kills, signals, full disks, hostile files ... as often as tests/fault_table.py says, and their table
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(PY) -m pytest --fault-table --numprocesses logical --maxprocesses 2 --dist loadfile

test-gpu: install kernels ## every kernel on this machine's GPU, against float64 and under compute-sanitizer
	$(PY) -m pytest -m gpu

bench: install          ## every figure, each after its equality check
	$(PY) -m pip install --quiet --no-build-isolation --editable ".[dev,bench]"
	$(PY) kernels/bench/run.py

bench-writing: install  ## every way to write beside transformers and CTranslate2; ARGS='--device cuda --batch 1 128'
	$(PY) -m pip install --quiet --no-build-isolation --editable ".[dev,bench]"
	$(PY) kernels/bench/writing.py $(ARGS)

bench-gpu: install kernels ## every figure of this machine's GPU; ARGS='--suite attn,loss,exit,step,loader,latency,exit_latency'
	$(PY) kernels/bench/gpu.py $(ARGS)

# Where multi30k/, squad_qg/, wikipedia_en/ and books/ lie.
DATA ?= $(or $(PARLANCE_TEST_DATA),../shared/data)
STUDY = PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(PY) -m finetune reproduce

reproduce: install      ## the papers' claims on two cores -> RESULTS.md; HOURS=3 ONLY='train/multi30k ...' DATA=DIR
	$(PY) -m pip install --quiet --no-build-isolation --editable ".[dev,bench]"
	$(STUDY) configs/reproduce/cpu.yaml data=$(DATA) --hours $(or $(HOURS),3) $(if $(ONLY),--only $(ONLY))

reproduce-gpu: install  ## the same, larger, on a GPU -> RESULTS-gpu.md
	$(STUDY) configs/reproduce/gpu.yaml data=$(DATA) --out RESULTS-gpu.md $(if $(HOURS),--hours $(HOURS)) $(if $(ONLY),--only $(ONLY))

goldens: install        ## writes the golden curves anew: say why in the commit
	$(PY) -m pytest --update-goldens tests/pretrain/objectives/test_golden_curves.py

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
