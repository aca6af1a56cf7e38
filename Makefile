# `make demo` and `make test` are all the set-up there is: they make the virtual environment when it is missing.
PYTHON ?= python3
VENV ?= .venv
LAB_FLAGS ?=
FILES ?=
BIN = $(VENV)/bin
INSTALLED = $(VENV)/installed

.PHONY: help demo test lab export readme clean

help:
	@echo "make demo    steer a real language model on real data (the main job)"
	@echo "make test    run every notebook and every test; FILES='nbs/00_sites.ipynb' runs only those"
	@echo "make lab     open JupyterLab on the notebooks; LAB_FLAGS='--no-browser' is passed on"
	@echo "make export  write steer_nb/ from the notebooks, and clean the notebooks"
	@echo "make readme  write README.md from nbs/index.ipynb"
	@echo "make clean   remove caches and build leftovers; $(VENV) stays"

$(BIN)/python:
	@command -v "$(PYTHON)" > /dev/null || { echo "error: there is no $(PYTHON) here: install Python 3.10 or newer, or name one with PYTHON=..." >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "error: $(PYTHON) is $$("$(PYTHON)" --version 2>&1), and steer_nb needs 3.10 or newer: name one with PYTHON=..." >&2; exit 1; }
	@echo "Making a virtual environment in $(VENV)"
	@"$(PYTHON)" -m venv "$(VENV)" || \
		{ rm -f "$(BIN)/python"; echo "error: $(PYTHON) cannot make a virtual environment (on Debian and Ubuntu: apt install python3-venv)" >&2; exit 1; }

$(INSTALLED): settings.ini setup.py pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing steer_nb and its tools into $(VENV), in the versions of constraints.txt (once; it takes some minutes)"
	@"$(BIN)/python" -m pip install --quiet --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch "$@"

demo: $(INSTALLED)
	@echo "Steering SmolLM2-135M on SST-2 (the first run fetches the model and the data)"
	@"$(BIN)/steer_nb" demo --overwrite

test: $(INSTALLED)
	@echo "Running the notebooks and the tests (the first run fetches the model and the data)"
	@"$(BIN)/python" tests/run_all.py $(FILES)

lab: $(INSTALLED)
	@echo "Opening JupyterLab on nbs/ (stop it with Ctrl-C)"
	@"$(BIN)/jupyter" lab $(LAB_FLAGS) --notebook-dir=nbs

export: $(INSTALLED)
	@echo "Writing steer_nb/ from the notebooks, and cleaning the notebooks"
	@"$(BIN)/nbdev_export"
	@"$(BIN)/nbdev_clean"

readme: $(INSTALLED)
	@echo "Writing README.md from nbs/index.ipynb"
	@"$(BIN)/python" nbs/make_readme.py

clean:
	@echo "Removing caches and build leftovers ($(VENV) stays)"
	@rm -rf build dist _docs _proc .pytest_cache *.egg-info
	@find nbs steer_nb tests \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +
