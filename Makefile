# Two commands on a fresh machine: `make demo` and `make test`. `make check` is what CI holds a change to.

python := .venv/bin/python
installed := .venv/.installed
ready := .venv/.ready

.PHONY: demo test check everything extras gpu format lint types imports sizes

demo: $(installed)
	.venv/bin/gradsift demo

test: $(ready)
	$(python) -m pytest -n 2 --dist worksteal -m "not slow and not gpu"

# also those with many processes, real data or kills
everything: $(ready)
	$(python) -m pytest -n 2 --dist worksteal -rs

check: format lint types imports everything

# apart from the others: with bitsandbytes installed every import of PEFT takes five seconds longer
extras: $(ready)
	$(python) -m pip install --quiet -c constraints.txt -e '.[quantized,embed,lm-eval]'
	$(python) -m pytest tests/gradients/test_quantized.py tests/methods/test_embed.py tests/evaluation/test_lm_eval.py
	$(python) -m pip install --quiet 'triton>=3.5'
	TRITON_INTERPRET=1 $(python) -m pytest tests/gradients/test_sign_kernel.py

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
