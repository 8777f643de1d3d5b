# make demo: train orig and AMO on the demo set and compare them; make test: the test suite. Both install what they need into .venv.
PYTHON ?= python3
VENV ?= .venv
PY = $(VENV)/bin/python
export OMP_WAIT_POLICY = PASSIVE

# two further judges that no training saw, where their files lie beside this repository
SHARED = ../shared
JUDGES = $(if $(wildcard $(SHARED)/tools/cnniqa_live.py),--metrics ranker piqe psnr cnniqa_live:build niqe \
  --metric-weights niqe=$(SHARED)/data/weights/iqa/niqe_modelparameters.mat)
EVALUATE = PYTHONPATH=$(SHARED)/tools $(PY) evaluate.py --demo $(JUDGES)

.PHONY: demo demo-seeds test fast clean table5 table7 table8

demo: $(VENV)/installed
	$(PY) train.py --demo --stage psnr --resume auto
	$(PY) train.py --demo --sampler orig --resume auto
	$(PY) train.py --demo --sampler amo --resume auto
	$(EVALUATE)

# the demo with three seeds, in one table: results/demo.json, results/demo.png
SEEDS = runs/demo-seeds
N = 0 1 2
JSON = results/demo.json
demo-seeds: $(VENV)/installed
	for s in $(N); do \
	  $(PY) train.py --demo --stage psnr --seed $$s --out $(SEEDS)/psnr-$$s --resume auto && \
	  $(PY) train.py --demo --sampler orig --seed $$s --init $(SEEDS)/psnr-$$s --out $(SEEDS)/orig-$$s --resume auto && \
	  $(PY) train.py --demo --sampler amo --seed $$s --init $(SEEDS)/psnr-$$s --out $(SEEDS)/amo-$$s --resume auto || exit 1; done
	$(EVALUATE) --weights $(foreach s,$(N),$(SEEDS)/orig-$(s) $(SEEDS)/amo-$(s)) \
	  --out-json $(JSON) --figure runs/demo-seeds.png
	test "$(N)" != "0 1 2" || $(EVALUATE) --weights $(SEEDS)/orig-0 $(SEEDS)/amo-0 --figure results/demo.png

# the paper's tables: every command that is left, run where HGGT is in place, else printed; make table5 GPUS=8
table5 table7 table8: $(VENV)/installed
	$(PY) -m report.paper_tables $(@:table%=%) $(if $(GPUS),--gpus $(GPUS)) $(if $(wildcard datasets/HGGT),--run)

test: $(VENV)/installed-test
	$(PY) -m pytest -q -n 2 --dist loadfile tests

fast: $(VENV)/installed-test
	$(PY) -m pytest -q -m fast tests

$(VENV)/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; name one with make PYTHON=...")'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/installed-test: $(VENV)/installed requirements-test.txt
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-test.txt
	touch $@

clean:
	rm -rf runs/*-small-* $(SEEDS) datasets/demo
