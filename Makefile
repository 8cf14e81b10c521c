# Two commands do it all: `make demo` prunes a clip, `make test` runs the tests. Both set everything up first.
#
# CONSTRAINTS pins the small CPU build of torch. On a machine with a CUDA GPU, take pip's newest build instead:
#     make demo CONSTRAINTS=/dev/null
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
INSTALLED = $(VENV)/installed

# Where the encoder and the videos lie that the default weights are made of, and what else they need.
SHARED ?= ../shared
PICTURES ?= outputs/pictures
WEIGHTS ?= outputs/weights
STEPS ?= 2500
PACKAGES = plasma-workspace-wallpapers gnome-backgrounds mate-backgrounds

.PHONY: demo test common-tests lint weights clean

demo: $(INSTALLED)
	$(VENV)/bin/autogaze demo -o outputs/demo

test: lint
	$(VENV)/bin/python -m pytest

# The tests that the library itself has for every model, of the version that is installed; they are in its source distribution.
common-tests: $(INSTALLED)
	$(VENV)/bin/python -m pip install --quiet parameterized
	mkdir -p outputs/common
	$(VENV)/bin/python -m pip download --quiet --no-binary :all: --no-deps --dest outputs/common \
		transformers==$$($(VENV)/bin/python -c "import transformers; print(transformers.__version__)")
	tar -xzf outputs/common/transformers-*.tar.gz -C outputs/common --one-top-level=library --strip-components=1
	TRANSFORMERS_TESTS=$(CURDIR)/outputs/common/library $(VENV)/bin/python -m pytest tests/common/common_*.py

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable ".[dev]"
	touch $(INSTALLED)

# The default weights; pictures are packages of Debian. A run that broke off goes on with RESUME=outputs/weights/checkpoint-500.
weights: $(INSTALLED) $(PICTURES)/unpacked
	$(VENV)/bin/autogaze distill $(SHARED)/encoders/dinov2-small $(SHARED)/videos/train $(PICTURES)/*/usr -o $(WEIGHTS) \
		--crops-per-video 160 --crops-per-picture 40 --max-steps $(STEPS) --bf16 --logging-steps 20 --report-to none \
		--cache-dir $(WEIGHTS)/cache --credits docs/weights_credits.md $(if $(RESUME),--resume-from-checkpoint $(RESUME))

$(PICTURES)/unpacked:
	mkdir -p $(PICTURES)
	cd $(PICTURES) && apt-get download $(PACKAGES) && for package in *.deb; do dpkg -x $$package $${package%%_*}; done
	find $(PICTURES) -name 'screenshot.*' -delete
	touch $@

clean:
	rm -rf $(VENV) outputs
