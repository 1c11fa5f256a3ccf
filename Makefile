SHELL := /bin/bash
python := .venv/bin/python
ready := .venv/.ready
# MLX is ten times as fast with it on a Linux CPU
blas := $(wildcard /usr/lib/*-linux-gnu/openblas-pthread/libopenblas.so.0)

.PHONY: help setup demo demo-vlm test docs lab bench readme fill clean
help:           ## list these targets
	@sed -n 's/^\([a-z-]*\): .*## /\1\t/p' Makefile | expand -t 10

setup: $(ready)  ## make .venv; every other target does it too
$(ready): settings.ini setup.py constraints.txt
	@tools/venv.sh
	@touch $@

demo: $(ready)   ## convert the model that comes with the project and print the result
	$(python) models/demo/run.py

demo-vlm: $(ready) ## convert the witness, a small model that sees, and print the result
	$(if $(blas),LD_PRELOAD=$(blas)) $(python) models/witness/run.py

test: $(ready)   ## check the code and its layers, run all notebooks, then all tests
	tools/test.sh

docs: $(ready)   ## build the site into _docs
	$(python) tools/site.py

lab: $(ready)    ## open JupyterLab on the tour (LAB holds more options)
	.venv/bin/jupyter lab --notebook-dir=nbs --LabApp.default_url=/lab/tree/index.ipynb $(LAB)

bench: $(ready)  ## measure quality, speed and memory on this machine (MODEL, TEXT, OUT)
	bench/run.sh

readme: $(ready) ## make README.md and CONTRIBUTING.md from their notebooks
	$(python) tools/readme.py

fill: $(ready)   ## re-run notebooks and keep their outputs: all, or NB="nbs/00_formats.ipynb …"
	$(python) tools/fill.py $(NB)

clean:          ## remove what was built; .venv stays
	rm -rf _docs _proc build dist nbs/nbdev.yml .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -path ./.venv -prune -o -name __pycache__ -print | xargs rm -rf
