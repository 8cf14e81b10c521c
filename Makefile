# Two commands do it all: `make demo` prunes a clip, `make test` runs the tests. Both set everything up first.
#
# CONSTRAINTS pins the small CPU build of torch. On a machine with a CUDA GPU, take pip's newest build instead:
#     make demo CONSTRAINTS=/dev/null
PYTHON ?= python3
VENV ?= .venv
APP_VENV ?= .venv-app
DOCS_VENV ?= .venv-docs
RAY_VENV ?= .venv-ray
VLLM_VENV ?= .venv-vllm
LMMS_VENV ?= .venv-lmms-eval
CONSTRAINTS ?= constraints.txt
INSTALLED = $(VENV)/installed

# Where the encoder and the videos lie that the default weights are made of, and what else they need.
SHARED ?= ../shared
PICTURES ?= outputs/pictures
WEIGHTS ?= outputs/weights
PACKED = src/transformers_autogaze/pretrained/features
AUTOGAZE ?= outputs/autogaze
STEPS ?= 4500
PACKAGES = plasma-workspace-wallpapers gnome-backgrounds mate-backgrounds

.PHONY: demo test types coverage docs common-tests wheel-test ray-test app-test vllm-test lmms-eval-test lint weights autogaze-weights clean

demo: $(INSTALLED)
	$(VENV)/bin/autogaze demo -o outputs/demo

test: lint
	$(VENV)/bin/python -m pytest

# The types of the package. mypy is not needed for the tests, so it is installed here.
types: $(INSTALLED)
	$(VENV)/bin/python -m pip install --quiet "mypy>=2.4,<3"
	$(VENV)/bin/mypy

# The lines that the tests run, in subprocesses as well, as a table, and as pages in outputs/coverage/html. Tests that are skipped, such as
# those of the web page, vLLM, lmms-eval and Ray, count as not run.
coverage: $(INSTALLED)
	$(VENV)/bin/python -m pip install --quiet "coverage>=7.13,<8"
	$(VENV)/bin/coverage erase
	$(VENV)/bin/coverage run -m pytest
	$(VENV)/bin/coverage combine --quiet
	$(VENV)/bin/coverage html --quiet
	$(VENV)/bin/coverage report

# The documentation site, in outputs/site; a warning is an error.
docs: $(DOCS_VENV)/installed
	$(DOCS_VENV)/bin/python -m pytest tests/test_site.py
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --strict

$(DOCS_VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable ".[docs]" pytest
	touch $@

# The web page in an environment of its own. Its tests in a browser need Chromium (on Debian: apt-get install chromium).
app-test: $(APP_VENV)/installed
	$(APP_VENV)/bin/python -m pytest tests/app

$(APP_VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(APP_VENV)
	$(APP_VENV)/bin/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable ".[app]" pytest playwright
	touch $@

# The tests that the library itself has for every model, of the version that is installed; they are in its source distribution.
# Those that do not apply are skipped and say why.
common-tests: $(INSTALLED)
	$(VENV)/bin/python -m pip install --quiet parameterized
	mkdir -p outputs/common
	$(VENV)/bin/python -m pip download --quiet --no-binary :all: --no-deps --dest outputs/common \
		transformers==$$($(VENV)/bin/python -c "import transformers; print(transformers.__version__)")
	tar -xzf outputs/common/transformers-*.tar.gz -C outputs/common --one-top-level=library --strip-components=1
	TRANSFORMERS_TESTS=$(CURDIR)/outputs/common/library $(VENV)/bin/python -m pytest -m "" -rs tests/common/common_*.py

# What is released: wheel and source distribution are built and looked into, and the wheel is tried in a new environment, with the
# interpreter PYTHON.
RELEASE = outputs/release
wheel-test:
	rm -rf $(RELEASE)
	mkdir -p $(RELEASE)/trial
	$(PYTHON) -m venv $(RELEASE)/builder
	$(RELEASE)/builder/bin/python -m pip install --quiet --no-compile build twine
	$(RELEASE)/builder/bin/python -m build --outdir $(RELEASE)/dist .
	$(RELEASE)/builder/bin/python -m twine check --strict $(RELEASE)/dist/*
	$(RELEASE)/builder/bin/python tests/release/check_distributions.py $(RELEASE)/dist
	$(PYTHON) -m venv $(RELEASE)/installed
	$(RELEASE)/installed/bin/python -m pip install --quiet --no-compile --constraint $(CONSTRAINTS) $(RELEASE)/dist/*.whl
	cd $(RELEASE)/trial && ../installed/bin/python $(CURDIR)/tests/release/try_installed.py $(CURDIR)/README.md

# The tests with lmms-eval, in an environment of its own: it needs an older PyAV. On the videos of AUTOGAZE_TEST_VIDEOS, or on drawn ones.
lmms-eval-test: $(LMMS_VENV)/installed
	$(LMMS_VENV)/bin/python -m pytest tests/lmms_eval_harness

$(LMMS_VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(LMMS_VENV)
	$(LMMS_VENV)/bin/python -m pip install --quiet --editable ".[lmms-eval]" pytest
	touch $@

# The plug-in for vLLM, also below lmms-eval, in an environment of its own: vLLM needs the versions of torch and transformers that it
# was built with.
vllm-test: $(VLLM_VENV)/installed
	$(VLLM_VENV)/bin/python -m pytest tests/serving tests/lmms_eval_harness/test_through_vllm.py

$(VLLM_VENV)/installed: pyproject.toml tests/serving/environment.sh
	PYTHON=$(PYTHON) bash tests/serving/environment.sh $(VLLM_VENV)
	touch $@

# Datasets of videos on Ray, in an environment of its own; RAY_CHECK=1 prunes 500 videos as well, which takes minutes.
ray-test: $(RAY_VENV)/installed
	$(RAY_VENV)/bin/python -m pytest tests/test_dataset_pruning.py tests/ray
	$(if $(RAY_CHECK),mkdir -p outputs)
	$(if $(RAY_CHECK),$(RAY_VENV)/bin/python benchmarks/dataset_pruning.py $(SHARED)/videos/train -o outputs/dataset_pruning.json)

$(RAY_VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(RAY_VENV)
	$(RAY_VENV)/bin/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable ".[ray]" pytest
	touch $@

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable ".[dev]"
	touch $(INSTALLED)

# The default weights, put into the package with their card; pictures are packages of Debian. A run that broke off goes on with RESUME=outputs/weights/checkpoint-500.
weights: $(INSTALLED) $(PICTURES)/unpacked
	$(VENV)/bin/autogaze distill $(SHARED)/encoders/dinov2-small $(SHARED)/videos/train $(PICTURES)/*/usr -o $(WEIGHTS) \
		--crops-per-video 240 --crops-per-picture 8 --max-steps $(STEPS) --bf16 --logging-steps 20 --report-to none \
		--cache-dir $(WEIGHTS)/cache --credits docs/weights_credits.md $(if $(RESUME),--resume-from-checkpoint $(RESUME))
	cp $(WEIGHTS)/model.safetensors $(PACKED)
	$(VENV)/bin/python -c "import json; config = json.load(open('$(WEIGHTS)/config.json')); del config['auto_map']; \
		json.dump(config, open('$(PACKED)/config.json', 'w'), indent=2, sort_keys=True)"
	sed '1,/^# /{/^# /!d}' $(WEIGHTS)/README.md > docs/distilled_selector.md

$(PICTURES)/unpacked:
	mkdir -p $(PICTURES)
	cd $(PICTURES) && apt-get download $(PACKAGES) && for package in *.deb; do dpkg -x $$package $${package%%_*}; done
	find $(PICTURES) -name 'screenshot.*' -delete
	touch $@

# A new AutoGaze by the published recipe: random crops, labelled during training by the features that the default weights predict,
# a tenth of the patches; then its own gazes, rewarded by the same features. Each stage takes STEPS steps.
autogaze-weights: $(INSTALLED)
	$(VENV)/bin/autogaze train $(SHARED)/videos/train --task features -o $(AUTOGAZE)/stage1 \
		--ratio-strategy fixed --ratio-min 0.1 --dirichlet-share 1 --threshold-share 0 --flip 0 --colour 0 --still 0 \
		--clips-per-video 100 --per-device-train-batch-size 4 --max-steps $(STEPS) --logging-steps 20 --report-to none
	$(VENV)/bin/autogaze train-grpo $(SHARED)/videos/train --task features --model $(AUTOGAZE)/stage1 \
		-o $(AUTOGAZE)/stage2 --flip 0 --colour 0 --still 0 \
		--clips-per-video 100 --per-device-train-batch-size 1 --max-steps $(STEPS) --logging-steps 20 --report-to none

clean:
	rm -rf $(VENV) $(LMMS_VENV) $(VLLM_VENV) $(APP_VENV) $(DOCS_VENV) $(RAY_VENV) outputs
