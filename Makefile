# make try: a first look, minutes.  make demo: the main job on data it makes itself.  make lint: ruff, mypy, the site.
# make test: everything CI checks but lint, JOBS files at a time (3 GB each).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
JOBS ?= 2

.PHONY: try demo npu test slow lint docs format clean

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable '.[test]'
	# Not among the environment's packages, where `import torch` would load it and fail without CANN: see bevfn/__init__.py.
	$(BIN)/pip install --quiet --no-deps --upgrade --target $(VENV)/npu "torch_npu==2.13.0; sys_platform == 'linux'"
	touch $@

npu: $(VENV)/.installed

try: $(VENV)/.installed
	rm -rf runs/try
	$(BIN)/bevfn data synth runs/try/world --scenes 2 --frames 10 --image-size 225 400
	$(BIN)/bevfn train bevfusion_lidar --data-root runs/try/world --backend eager --steps 110 --sweeps 1 --no-eval-first --run-dir runs/try/run
	$(BIN)/bevfn predict runs/try/run runs/try/world --scene val --out runs/try/detections
	@echo "pictures: $(CURDIR)/runs/try/detections/pictures, scores: $$(ls $(CURDIR)/runs/try/run/evaluations/*/report.html)"

demo: $(VENV)/.installed
	rm -rf runs/demo
	$(BIN)/python -m bevfn.experiments.bevfusion --precision fp16 --run-dir runs/demo
	@echo "report: $$(ls $(CURDIR)/runs/demo/evaluations/*/report.html | tail -n 1)"

test: $(VENV)/.installed
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder

slow: $(VENV)/.installed
	$(BIN)/python -m pytest -m slow

lint: docs
	$(BIN)/ruff check bevfn kernels experiments notebooks tests docs/img
	$(BIN)/ruff format --check bevfn kernels experiments notebooks tests docs/img
	$(BIN)/mypy

$(VENV)/.documented: $(VENV)/.installed
	$(BIN)/pip install --quiet --editable '.[docs]'
	touch $@

docs: $(VENV)/.documented
	rm -rf build/docs build/site
	mkdir -p build/docs
	ln -s $(addprefix $(CURDIR)/,README.md CONTRIBUTING.md CHANGELOG.md docs bevfn experiments notebooks tests) build/docs
	$(BIN)/mkdocs build --strict
	@echo "the site: $(CURDIR)/build/site/index.html"

format: $(VENV)/.installed
	$(BIN)/ruff check --fix bevfn kernels experiments notebooks tests docs/img
	$(BIN)/ruff format bevfn kernels experiments notebooks tests docs/img

clean:
	rm -rf $(VENV) build runs *.egg-info
