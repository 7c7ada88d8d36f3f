# make demo | test | setup | bench | nan | study | gpu | gpu-profile | lint. Everything but gpu runs in ./.venv and leaves the system alone.
PYTHON ?= python3
PY := .venv/bin/python
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test setup bench nan study gpu gpu-profile lint clean

demo: setup
	$(PY) train_stage1.py --pair AV --data demo
	$(PY) train_stage2.py --add T --init runs/stage1-AV-demo
	$(PY) evaluate.py --youcook2 --run runs/stage2-AV_T-demo
	$(PY) -m mcn_ext.report runs/stage2-AV_T-demo

test: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pytest -n 2 --dist loadfile

setup: .venv/dependencies mcn_ext/_C.so

.venv/dependencies: requirements.txt
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet -r requirements.txt
	touch $@

mcn_ext/_C.so: setup.py pyproject.toml $(wildcard csrc/*) .venv/dependencies
	$(PY) -m pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@

# The tables of docs/performance.md, in about 7 minutes on 2 cores; results in benchmarks/results, or in OUT.
bench: setup
	$(PY) benchmarks/loss.py
	$(PY) benchmarks/accuracy.py
	$(PY) benchmarks/ranks.py
	$(PY) benchmarks/loader.py
	$(PY) benchmarks/kmeans.py
	$(PY) benchmarks/step.py --preset demo
	$(PY) benchmarks/step.py --preset paper --batch_size 1 --n_pair 8 --cluster_size 64

# The published recipe until it goes NaN, ours beside it: a figure, runs/nan.png.
nan: setup
	OUT=runs $(PY) benchmarks/nan.py

# Which pair first, where video or audio is noisy: a small grid on demo data, runs/study-noise.
study: setup
	$(PY) -m mcn_ext.study --noise 0.5 2 --videos 128 --n_pair 4 --seeds 0 --jobs 2 --baselines steps \
		--stage1_encoders frozen --out runs/study-noise

# With the python3 at hand and its own CUDA torch; nothing is installed. Results: OUT, else runs/gpu.
gpu:
	PYTHON=$(PYTHON) bash benchmarks/gpu.sh main

gpu-profile:
	PYTHON=$(PYTHON) bash benchmarks/gpu.sh profile

lint: setup
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean:
	rm -rf .venv build mcn_ext/_C*.so *.egg-info
