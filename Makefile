# Every target makes .venv and installs what it needs; python3, pip and make are all that a machine must have.
PYTHON ?= python3
BIN := .venv/bin
DEV := .venv/.dev
PEERS := .venv/.peers
BROWSER := .venv/.browser
PIPELINES := build/pipelines
FORMATS := build/formats
# Twice quiet: errors are shown, what pip warns of (its sources, its age) is not.
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check
# A file stays on one core, with what its tests share; tests/conftest.py has the long files begin first.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
export NO_MKDOCS_2_WARNING := 1

.PHONY: help demo test test-peers test-triton quick test-gpu test-browser test-pipelines test-formats test-lowest test-newest dist check format notebook docs bench bench-gpu clean

help:
	@echo "make demo    the seed's check, then a network trained on a brain (some 5 minutes)"
	@echo "make test    the test suite"
	@echo "make test-peers  other libraries' losses and scores beside ours, on many random cases"
	@echo "make test-triton  the rest of Triton's kernels, interpreted and compiled; make test has a representative set"
	@echo "make quick   what a change of the core should pass first: no peers, no files, no processes"
	@echo "make test-gpu   the tests that need a CUDA device; fails where there is none"
	@echo "make test-browser  the report in Chromium, which apt-get brings where there is none; fails without"
	@echo "make test-pipelines  nnU-Net, MONAI, mmseg and transformers with our losses, in an environment of their own in build/"
	@echo "make test-formats  files of pynrrd, slicerio, ome-zarr and ngff-zarr, in an environment of their own in build/"
	@echo "make test-lowest  tests with the oldest releases that pyproject.toml allows, in build/ (TORCH=floor: torch's, too)"
	@echo "make test-newest  the test suite with the newest releases of everything, in build/ (TORCH=newest: torch's, too)"
	@echo "make dist    wheel and sdist, and whether they install and run alone, with every extra"
	@echo "make check   format, lint, types, documentation"
	@echo "make notebook  run examples/soft_dice_loss.md and keep what it prints and draws in the notebook beside it"
	@echo "make bench   time and memory against the peers"
	@echo "make bench-gpu  the same on a CUDA device"
	@echo "make docs    the documentation, into site/"

$(DEV): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "Installing what is needed into .venv; the first time takes some minutes"
	@$(PIP) -c constraints.txt -e '.[dev]'
	@touch $@

# Peers that would bring torchvision, which has no CPU build for the pinned torch: their losses need none of it.
$(PEERS): $(DEV) constraints-peers.txt
	@echo "Installing the peers into .venv"
	@$(PIP) --no-deps -r constraints-peers.txt
	@touch $@

demo: $(DEV)
	$(BIN)/softdice check
	$(BIN)/softdice train --out demo --max-minutes 3

test: $(DEV) $(PEERS)
	$(PYTEST) -m "not peers and not triton" --ignore tests/test_scoring_browser.py --ignore tests/test_pipelines.py

test-peers: $(DEV) $(PEERS)
	$(PYTEST) -m peers

test-triton: $(DEV)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 -m triton tests/interpreted_triton.py
	$(BIN)/python -m pytest -n 2 -m triton tests/test_triton_compile.py

quick: $(DEV)
	$(PYTEST) -m "not slow"

test-gpu: $(DEV)
	SOFTDICE_REQUIRE_GPU=1 $(BIN)/python -m pytest -m gpu tests/test_triton_gpu.py

# A driver only: Chromium is the machine's. Where there is none, apt-get is asked for Debian's.
$(BROWSER): $(DEV)
	@$(PIP) -c constraints.txt playwright
	@touch $@

test-browser: $(BROWSER)
	@tests/chromium.sh
	SOFTDICE_REQUIRE_BROWSER=1 $(BIN)/python -m pytest tests/test_scoring_browser.py

# timm, which nnU-Net brings, brings a torchvision that does not load beside every build of torch: then none at all.
$(PIPELINES)/.made: pyproject.toml constraints.txt
	@test -x $(PIPELINES)/bin/python || $(PYTHON) -m venv $(PIPELINES)
	@echo "Installing nnU-Net, transformers, ignite and mmseg into $(PIPELINES); the first time takes some minutes"
	@$(PIPELINES)/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[cpu,metrics,images,cli]' \
		pytest hypothesis torch monai nnunetv2==2.8.1 transformers==5.24.0 pytorch-ignite==0.5.5 \
		addict ftfy opencv-python-headless prettytable termcolor yapf
	@$(PIPELINES)/bin/python -m pip install -qq --disable-pip-version-check --no-deps \
		mmsegmentation==1.2.2 mmengine==0.10.7 mmcv-lite==2.1.0
	@$(PIPELINES)/bin/python -c "import torchvision" 2>/dev/null || \
		$(PIPELINES)/bin/python -m pip uninstall -qq -y torchvision
	@touch $@

test-pipelines: $(PIPELINES)/.made
	SOFTDICE_REQUIRE_PIPELINES=1 $(PIPELINES)/bin/python -m pytest tests/test_pipelines.py tests/test_masks.py \
		"tests/test_docs.py::test_docstring_examples[softdice.compat.mmseg]"

# Writers of images whose files the tests read, and formats of extras that `all` leaves out.
$(FORMATS)/.made: pyproject.toml constraints.txt
	@test -x $(FORMATS)/bin/python || $(PYTHON) -m venv $(FORMATS)
	@echo "Installing pynrrd, slicerio, ome-zarr and ngff-zarr into $(FORMATS); the first time takes some minutes"
	@$(FORMATS)/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[all,zarr,coco]' \
		pytest hypothesis mpmath pynrrd==1.1.3 slicerio==1.4.0 ngff-zarr==0.50.0
	@$(FORMATS)/bin/python -m pip install -qq --disable-pip-version-check ome-zarr==0.18.0  # older fsspec than our pin
	@touch $@

test-formats: $(FORMATS)/.made
	SOFTDICE_REQUIRE_FORMATS=1 $(FORMATS)/bin/python -m pytest tests/test_images_writers.py tests/test_images_matrix.py

test-lowest:
	@$(PYTHON) tests/lowest.py

test-newest:
	@$(PYTHON) tests/newest.py

dist:
	@$(PYTHON) tests/distribution.py

check: $(DEV)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mkdocs build --strict

format: $(DEV)
	$(BIN)/python tests/functional_stub.py
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

notebook: $(DEV)
	$(BIN)/python tests/notebook_outputs.py

docs: $(DEV)
	$(BIN)/mkdocs build --strict

bench: $(DEV) $(PEERS)
	$(BIN)/python -m benchmarks.losses
	$(BIN)/python -m benchmarks.dropins
	$(BIN)/python -m benchmarks.variants
	$(BIN)/python -m benchmarks.gradient_memory
	$(BIN)/python -m benchmarks.structures
	$(BIN)/python -m benchmarks.instances
	$(BIN)/python -m benchmarks.voxelwise
	$(BIN)/python -m benchmarks.accuracy
	$(BIN)/python -m benchmarks.head
	$(BIN)/python -m benchmarks.upsampled
	$(BIN)/python -m benchmarks.scores
	$(BIN)/python -m benchmarks.distances

bench-gpu: $(DEV) $(PEERS)
	$(BIN)/python -m benchmarks.gpu

clean:
	rm -rf .venv site build dist
