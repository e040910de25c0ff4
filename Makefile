# Two commands on a fresh machine: `make demo` and `make test`. `make check` is what CI holds a change to.

python := .venv/bin/python
installed := .venv/.installed
ready := .venv/.ready

.PHONY: demo test docs package lowest check everything extras gpu format lint types imports sizes

demo: $(installed)
	.venv/bin/gradsift demo

test: $(ready)
	$(python) -m pytest -n 2 --dist worksteal -m "not slow and not gpu"

# also those with many processes, real data or kills
everything: $(ready)
	$(python) -m pytest -n 2 --dist worksteal -rs

check: format lint types imports docs everything

# apart from the others: with bitsandbytes installed every import of PEFT takes five seconds longer
extras: $(ready)
	$(python) -m pip install --quiet -c constraints.txt -e '.[quantized,embed,lm-eval,wandb]'
	$(python) -m pytest tests/gradients/test_quantized.py tests/methods/test_embed.py tests/evaluation/test_lm_eval.py tests/models/test_tracking.py
	$(python) -m pip install --quiet 'triton>=3.5'
	TRITON_INTERPRET=1 $(python) -m pytest tests/gradients/test_sign_kernel.py

# the site, into site/; warnings, dead links among them, are errors
docs: $(ready)
	$(python) -m pip install --quiet -c constraints.txt --group docs
	.venv/bin/zensical build --strict --clean
	$(python) docs/versions.py

# wheel and sdist, into dist/; with the wheel alone, in an environment of its own, the demo runs
package: $(ready)
	rm -rf dist build/bare build/demo
	$(python) -m hatchling build -d dist
	test $$(stat -c %s dist/*.whl) -lt 1000000
	python3 -m venv build/bare
	build/bare/bin/python -m pip install --quiet -c constraints.txt torch dist/*.whl
	cd build && bare/bin/python -c 'import gradsift; gradsift.select' && bare/bin/gradsift demo --output-dir demo

# the lowest versions that pyproject.toml allows, in an environment of their own; torch as pinned
lowest: $(ready)
	rm -rf build/lowest && mkdir -p build && python3 -m venv build/lowest
	sed -nE '/^dependencies/,/^]/s/^    "([a-z0-9]+)>=([0-9.]+)",$$/\1==\2/p' pyproject.toml | grep -v '^torch=' > build/lowest.txt
	build/lowest/bin/python -m pip install --quiet -c build/lowest.txt torch==2.13.0 -e . beartype hypothesis pytest-xdist
	# but for a test that saves a data set without rows, which datasets cannot before 5.2
	build/lowest/bin/python -m pytest -n 2 -o addopts=--strict-markers -o filterwarnings=default -m "not slow and not gpu" \
		--deselect tests/data/test_folders.py::test_a_saved_data_set_is_read_as_it_is_stored \
		tests/test_pipeline.py tests/test_notebook.py tests/data tests/models tests/gradients tests/methods tests/selection tests/report tests/cli

# on a machine with a GPU, with what Python it has: see docs/gpu.md
gpu:
	python3 benchmarks/gpu.py

format: $(ready)
	$(python) -m ruff format --check .

lint: $(ready)
	$(python) -m ruff check .

types: $(ready)
	$(python) -m pyright

imports: $(ready)
	.venv/bin/lint-imports

# lines of files and functions: median, 90th percentile, longest
sizes:
	python3 tests/test_structure.py

# what a user needs
$(installed): pyproject.toml constraints.txt
	test -x $(python) || python3 -m venv .venv
	@echo "installing PyTorch and what gradsift needs into .venv: a few minutes, once"
	$(python) -m pip install --quiet 'pip>=25.1'
	$(python) -m pip install --quiet -c constraints.txt torch
	$(python) -m pip install --quiet -c constraints.txt -e .
	touch $(installed)

# and what its developers need; pip 25.1 and later read dependency groups
$(ready): $(installed)
	$(python) -m pip install --quiet -c constraints.txt --group dev
	touch $(ready)
