# make demo   set up, then show the main job in a real guest
# make test   set up, then prove everything (guests included)
# make lint   ruff, mypy --strict, import contracts, shellcheck
# make bench  ratios to QEMU's own disks and to spice-gtk's, and the micro figures
# make fuzz   bounded fuzzing of everything that parses
PYTHON := .venv/bin/python
SECONDS := 20

.PHONY: demo test test-unit test-guest coverage lint format bench fuzz setup clean

setup:
	@scripts/setup dev

demo:
	@scripts/setup runtime
	@.venv/bin/farplug demo

test: setup
	$(PYTHON) -m pytest -n 2 --dist loadfile
	@$(MAKE) --no-print-directory coverage

test-unit: setup
	$(PYTHON) -m pytest -n 2 -m "not guest"

test-guest: setup
	$(PYTHON) -m pytest -n 2 --dist loadfile -m guest

# Every branch of the protocol and of the command set is taken by its own tests.
coverage: setup
	@$(PYTHON) -m coverage erase
	@$(PYTHON) -m coverage run --source=farplug.usbredir,farplug.scsi -m pytest -q tests/usbredir tests/scsi
	@$(PYTHON) -m coverage report --fail-under=100

lint: setup
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy
	.venv/bin/lint-imports
	shellcheck scripts/setup .ci/run

format: setup
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

bench: setup
	$(PYTHON) bench/micro.py
	$(PYTHON) bench/disk.py

fuzz: setup
	@for target in fuzz/fuzz_*.py; do $(PYTHON) $$target --seconds $(SECONDS) || exit 1; done

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache build dist htmlcov .coverage*
