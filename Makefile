# make demo: train with the originals and with AMO's choice on the demo set, compare; make lint test: the checks. All install what they need
# into .venv. LOCK=1 installs the exact versions of requirements.lock.
PYTHON ?= python3
VENV ?= .venv
PY = $(VENV)/bin/python
REQUIREMENTS = $(if $(LOCK),requirements.lock,requirements.txt)
# one per set of versions: LOCK=1 after a plain call installs again
INSTALLED = $(VENV)/installed$(if $(LOCK),-lock)
export OMP_WAIT_POLICY = PASSIVE

gpu_needs = $(if $(filter $(VENV)/bin/python,$(PY)),$(VENV)/installed-test)

.PHONY: demo gpu lint test slow fast clean table5 table7 table8

demo: $(INSTALLED)
	$(PY) train.py --demo --stage psnr --resume auto
	$(PY) train.py --demo --sampler orig --resume auto
	$(PY) train.py --demo --sampler amo --resume auto
	$(PY) evaluate.py --demo

# the paper's tables: every command that is left, run where HGGT is in place, else printed; make table5 GPUS=8
table5 table7 table8: $(INSTALLED)
	$(PY) -m report.paper_tables $(@:table%=%) $(if $(GPUS),--gpus $(GPUS)) $(if $(wildcard datasets/HGGT),--run)

# on a CUDA machine, eight minutes; make gpu PY=python3 installs nothing; ONLY="speed exact": some of its jobs,
# or an experiment: ONLY=paper_network, selfsup or dpo; OUT=DIR: where the results go
gpu: $(gpu_needs)
	$(PY) -m experiments.gpu $(if $(ONLY),--only $(ONLY)) $(if $(OUT),--out $(OUT))

lint: $(VENV)/installed-test
	$(PY) -m ruff check .

test: $(VENV)/installed-test
	$(PY) -m pytest -q -n 2 --dist loadfile -m "not slow" tests

# what `make test` leaves out: whole demos, experiments in small, runs of many processes
slow: $(VENV)/installed-test
	$(PY) -m pytest -q -n 2 --dist loadfile -m slow tests

fast: $(VENV)/installed-test
	$(PY) -m pytest -q -m fast tests

$(INSTALLED): $(REQUIREMENTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; name one with make PYTHON=...")'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -r $(REQUIREMENTS)
	touch $@

$(VENV)/installed-test: $(INSTALLED) tests/requirements.txt
	$(PY) -m pip install --quiet --disable-pip-version-check -r tests/requirements.txt
	touch $@

clean:
	rm -rf runs/*-small-* runs/demo.json runs/demo.png datasets/demo
