# make demo       the whole chain on SmolLM2, six to eleven minutes on two cores with AVX-512 after the install
# make test       linters, unit, contract and pipeline tests; with D2O_TEST_SLURM=1 and as root, those on a real
#                 Slurm too, which they install by apt-get; with D2O_TEST_CHROMIUM=1 those in Chromium likewise, which
#                 run anyway where there is one
# make test-quick those that start no engine, about four minutes
# make test-faults   a hundred faults at random moments, in about 50 minutes; D2O_FAULTS_SEED=2 takes other ones
# make bench      a training step, generation and starts beside others' code, a log of ten million rows; over an hour
# make env        .venv from the locked list (LOCK=gpu on a machine with NVIDIA GPUs)
.PHONY: env demo test test-quick test-faults bench lint lock settings

PYTHON ?= python3
# The lock that is installed; CPU builds where none is.
LOCK ?= $(if $(wildcard .venv/.installed-gpu),gpu,cpu)
export PATH := $(CURDIR)/.venv/bin:$(PATH)

env: .venv/.installed-$(LOCK)

.venv/.installed-$(LOCK): envs/$(LOCK).lock.txt envs/install.sh pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 env")'
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet uv
	# One stamp at a time: an install replaces the packages of the other lock.
	rm -f .venv/.installed-*
	envs/install.sh $(LOCK)
ifeq ($(LOCK),cpu)
	# DeepSpeed's operator for ranks on CPUs takes two minutes: the first training would wait for it.
	.venv/bin/python -c 'from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder as B; B().load(verbose=False)'
endif
	touch $@

demo: env
	snakemake --cores all

test: lint
	pytest -n 2 --dist loadfile --no-loadscope-reorder --durations 25

test-quick: env
	pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"

test-faults: env
	D2O_FAULTS=$${D2O_FAULTS:-100} pytest -s tests/test_faults.py

bench: env
	OMP_NUM_THREADS=1 python benchmarks/train_step.py results/benchmarks
	python benchmarks/generate.py results/benchmarks
	python benchmarks/startup.py results/benchmarks
	python benchmarks/negatives.py results/benchmarks
	python benchmarks/groups.py results/benchmarks
	python benchmarks/score.py results/benchmarks

lint: env
	ruff check .
	ruff format --check .
	snakefmt --check Snakefile workflow/rules
	snakemake --lint

# Resolves envs/*.in again. Where PyTorch's CPU build is not on pip's find-links, uv's --torch-backend finds it.
lock: env
	uv pip compile envs/cpu.in --overrides envs/cpu.overrides.txt --universal --python-version 3.11 \
	    --torch-backend cpu --no-annotate --no-header --generate-hashes -o envs/cpu.lock.txt
	uv pip compile envs/gpu.in --overrides envs/gpu.overrides.txt --python-version 3.11 \
	    --python-platform x86_64-manylinux_2_35 --no-annotate --no-header --generate-hashes -o envs/gpu.lock.txt
	python envs/stages.py

# config/schema.json and config/README.md, from workflow/d2o/settings/
settings: env
	d2o schema config
