# make demo      set up, then plug an image into a real guest, step by step, and show the guest in the browser
# make test      set up, then run every test (guests included)
# make test-kerbside  the whole of kerbside, the SPICE proxy, with its database, in front of a guest
# make lint      ruff, mypy --strict (also for macOS and Windows), import contracts, words, shellcheck, docs
# make bench     one table: ratios to QEMU's own disks, to spice-gtk's emulated CD and to usbredirect; figures of the
#                parser; what a command costs without QEMU, and a start; what TLS and the SPICE proxy kerbside cost; what the page
#                costs; how fast the USB keyboard types. It draws the chart of README.md.
# make fuzz      run every fuzzer, SECONDS each
# make fuzz-guided   fuzz every parser guided by coverage, with atheris, SECONDS each
# make fuzz-nightly  all fuzzers for an hour in all
# make load      200 sessions through kerbside, by two Locust workers, and the figures of docs/load.md
# make stress    what make test shortens, in full: a minute of parallel readers, writers and failing commands, over each
#                transport; all combinations of disks, ports and file systems; long pauses, texts, files and downloads;
#                hundreds of rounds of attach and detach
# make soak      browsers come and go for SOAK seconds while a guest's screen scrolls and changes its size; nothing may grow
# make picture   draw the pictures of the demo and of its page in README.md again
# make man       write docs/farplug.1, the man page, from the commands and their help
# make docs      render docs/ and the docstrings to build/docs; a warning is an error
# make powercut  kill farplug or QEMU, or cut the power, hundreds of times while a guest writes
PYTHON := .venv/bin/python
SECONDS := 20
CUTS := 60
SOAK := 3600
# Processes whose tests have guests. One more runs the other tests.
PROCESSES := 4
COVERED := tests/usbredir tests/scsi
# The files that make test runs in a short form (tests/long.py).
STRESSED = $(sort $(shell grep -rl --include='test_*.py' '^from tests.long import' tests))
SITE := -q -W --keep-going -j 2 -b html -d build/doctrees docs build/docs

.PHONY: demo test test-others test-unit test-guest test-kerbside coverage lint format bench load fuzz fuzz-guided fuzz-nightly stress soak picture man docs powercut setup clean

setup:
	@scripts/setup dev

demo:
	@scripts/setup runtime
	@.venv/bin/farplug demo

test: setup
	@$(MAKE) --no-print-directory -j 2 test-others coverage

test-others: setup
	$(PYTHON) -m pytest -n $$(($(PROCESSES) + 1)) --dist loadfile $(COVERED:%=--ignore=%)

test-unit: setup
	$(PYTHON) -m pytest -n 2 --dist loadfile -m "not guest"

test-guest: setup
	$(PYTHON) -m pytest -n $(PROCESSES) --dist loadfile -m guest

test-kerbside:
	@scripts/setup kerbside
	FARPLUG_REQUIRE_ALL=1 FARPLUG_WHOLE_KERBSIDE=1 $(PYTHON) -m pytest tests/guest/test_kerbside_service.py

# The tests of the protocol and of the SCSI commands must cover every branch of these packages. They run once, here.
coverage: setup
	@$(PYTHON) -m coverage erase
	@$(PYTHON) -m coverage run --source=farplug.usbredir,farplug.scsi -m pytest -q $(COVERED)
	@$(PYTHON) -m coverage report --fail-under=100

lint: setup
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy
	$(PYTHON) scripts/check_platforms.py types
	.venv/bin/lint-imports
	$(PYTHON) scripts/words.py
	shellcheck scripts/setup scripts/build_package .ci/run
	.venv/bin/sphinx-build $(SITE)

format: setup
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

bench: setup
	$(PYTHON) bench/table.py

load: setup
	FARPLUG_LOAD_SESSIONS=200 $(PYTHON) -m pytest tests/load
	PYTHONPATH=. $(PYTHON) bench/load.py

stress: setup
	FARPLUG_LONG=1 $(PYTHON) -m pytest $(STRESSED)

soak: setup
	$(PYTHON) bench/soak.py --seconds $(SOAK)

picture: setup
	$(PYTHON) scripts/demo_picture.py
	$(PYTHON) scripts/page_picture.py

docs: setup
	.venv/bin/sphinx-build $(SITE)

man: setup
	$(PYTHON) scripts/man_page.py

powercut: setup
	FARPLUG_LONG=1 FARPLUG_POWER_CUTS=$(CUTS) $(PYTHON) -m pytest -n 2 --dist loadfile tests/guest/test_killed.py tests/guest/test_power_loss.py

fuzz: setup
	@for target in fuzz/fuzz_*.py; do PYTHONPATH=. $(PYTHON) $$target --seconds $(SECONDS) || exit 1; done

fuzz-guided: setup
	@$(PYTHON) fuzz/guided.py --seconds $(SECONDS)

# The fuzzers and the 12 parsers of fuzz/guided.py share an hour. All of them run, also after a failure.
FUZZERS := $(wildcard fuzz/fuzz_*.py)
fuzz-nightly: setup
	@$(MAKE) --no-print-directory --keep-going SECONDS=$$((3600 / ($(words $(FUZZERS)) + 12))) $(FUZZERS:%=fuzz/.run-%) fuzz-guided

fuzz/.run-%:
	@PYTHONPATH=. $(PYTHON) $* --seconds $(SECONDS)

clean:
	rm -rf .venv .venv-kerbside .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache build dist htmlcov .coverage*
