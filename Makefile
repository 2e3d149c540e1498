# make study    set up, then the whole default study -> figures/emojishift     (STUDY=grid SEEDS=3, DATA=/path, CORES=8,
#               SET='{encoder: vit_base_patch16_224.dino=/path/file.pth}' in every run, GPUS=4 of this machine, PROCESSES=2 of torchrun
#               and as many GPUs a run, MEM_MB=12000 for all runs together, PROFILE=slurm or gpu-node of profiles/)
# make status   what of the study is done, running or failed, and why, and disk use
# make prune    what in runs/ no study and no table needs; DELETE=yes deletes it
# make setup    the environment alone, .venv                                   (TORCH=cpu leaves out what only a GPU needs)
# make test     set up, then every test, with every notebook among them; make test-fast: style, project, changed chapters
# make bench    chapter 10 at full size, peers installed: tens of minutes -> figures/benchmarks
# make outputs  execute the chapters of the book again and keep what a reader of a code host sees
# make docs     the documentation site -> _docs/
# make readme   README.md from nbs/index.ipynb, numbers computed from data/results
# make lab      JupyterLab on the chapters
# make clean    remove the environment and built files; runs/ and figures/ stay
PYTHON ?= python3
STUDY  ?= emojishift
SEEDS  ?= 1
DATA   ?=
CORES  ?= all
SET    ?=
TORCH  ?=
PROFILE ?= local
PROCESSES ?= 1
GPUS   ?= 0
MEM_MB ?= $(shell awk '/MemTotal/ {print int($$2 * 0.9 / 1024)}' /proc/meminfo 2>/dev/null || echo 16000)
DELETE ?=
VENV   := .venv
UV      = $(VENV)/bin/uv pip install --quiet --python $(VENV)/bin/python --constraint constraints.txt $(if $(TORCH),--torch-backend $(TORCH))
LIMITS  = $(if $(filter local,$(PROFILE)),--cores $(CORES) --resources mem_mb=$(MEM_MB) $(if $(filter-out 0,$(GPUS)),gpu=$(GPUS)))
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
# Imports are compiled once and kept; large activations go back to the allocator, not to the system (arithmetic is the same).
unexport PYTHONDONTWRITEBYTECODE
export GLIBC_TUNABLES := glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=8589934592

.PHONY: help setup study status prune test test-fast bench outputs docs readme lab clean
help:
	@sed -n '/^# /s/^# //p' Makefile | sed '/^Imports are compiled/d'

setup: $(VENV)/.ready

$(VENV)/.ready: settings.ini setup.py constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet uv
	$(UV) --editable '.[dev]'
	touch $@

study: setup
	snakemake --workflow-profile profiles/$(PROFILE) $(LIMITS) \
	  --config study=$(STUDY) seeds=$(SEEDS) data="$(DATA)" processes=$(PROCESSES) set="$(SET)"
	@echo "figures are in figures/$(STUDY)"

status: setup
	wlsft status $(STUDY) --seeds $(SEEDS) --data "$(DATA)" --set "$(SET)"

prune: setup
	wlsft prune $(STUDY) --seeds $(SEEDS) --data "$(DATA)" --set "$(SET)" $(if $(DELETE),--delete,)

test: setup
	OMP_NUM_THREADS=1 pytest -q -n 2 --dist worksteal --durations 25

test-fast: setup
	OMP_NUM_THREADS=1 pytest -q -n 2 --dist worksteal --durations 5 --fast

bench: setup
	$(UV) --editable '.[dev,bench]'
	mkdir -p runs && wlsft notebook nbs/10_benchmarks.ipynb runs/10_benchmarks.ipynb -p full true

outputs: setup
	python -m wlsft.build.book
	OMP_NUM_THREADS=1 python -m wlsft.build.outputs nbs/[01]*.ipynb

docs: setup
	rm -rf _proc _docs && nbdev_proc_nbs && cp -r figures _proc/ && python -m wlsft.build.outputs before _proc
	if command -v quarto >/dev/null; then quarto render _proc --no-execute; else smalldocs render _proc --quiet; fi
	mv _proc/_docs _docs && mkdir -p _docs/figures && cp -r figures/explorer figures/method.png _docs/figures/
	python -m wlsft.build.outputs after _docs _proc
	@echo "open _docs/index.html"

readme: setup
	mkdir -p runs && wlsft notebook nbs/index.ipynb runs/README.ipynb -p draws 2000
	jupyter nbconvert --to markdown --no-input --output-dir . runs/README.ipynb
	python -m wlsft.build.outputs readme README.md

lab: setup
	jupyter lab nbs/

clean:
	rm -rf $(VENV) _proc _docs *.egg-info .pytest_cache .snakemake
