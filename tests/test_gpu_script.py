"""benchmarks/gpu.sh at tiny sizes on a CPU: one part fails, all run, results are under $OUT."""

import json
import os
import re
import subprocess
import sys

import pytest

from mcn_ext import ops
from tests.conftest import ROOT, run

STEPS = [
    "built",
    "data",
    "check",
    "tests",
    "machine",
    "loss",
    "step",
    "paper: stage 1",
    "paper: words",
    "paper: stage 2",
    "paper: evaluate",
    "demo: stage 1",
    "demo: words",
    "demo: stage 2",
    "demo: evaluate",
    "experiments",
]
FILES = ["experiments-cpu.json", "loss-cpu.json", "machine-cpu.json", "main.log", "runs.txt"]
FILES.append("step-paper-cpu.json")

pytestmark = [pytest.mark.slow, pytest.mark.skipif("error" in ops.build_info(), reason="not built")]


def gpu_sh(mode, folder, python=sys.executable):
    environment = os.environ | {
        "DEVICE": "cpu",
        "QUICK": "1",
        "OUT": str(folder / "out"),
        "PYTHON": str(python),
    }
    done = subprocess.run(
        ["bash", ROOT / "benchmarks/gpu.sh", mode],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=500,
    )
    summary = done.stdout.rpartition("=== ")[2]
    return done, dict(re.findall(r"^(.+): (rc \d+|left out)", summary, re.MULTILINE))


def test_every_step_runs_though_one_fails_and_results_are_kept(tmp_path):
    python = tmp_path / "python3"
    python.write_text(
        f'#!/bin/sh\ncase "$*" in *"gpu_check.py") echo broken; exit 3 ;; esac\n'
        f'exec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    done, steps = gpu_sh("main", tmp_path, python)
    assert steps == dict.fromkeys(STEPS, "rc 0") | {"check": "rc 3"}, done.stdout[-20000:]
    assert done.returncode == 1
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == FILES
    assert (out / "main.log").read_text() == done.stdout
    found = {path.name: json.loads(path.read_text()) for path in out.glob("*.json")}
    for report in found.values():
        assert report["date"] and report["commit"] and report["torch"], report
    ours = found["loss-cpu.json"]["rows"][0]["results"]["ours"]
    assert 0 < ours["host_ms"] <= ours["ms"]
    runs = (out / "runs.txt").read_text()
    assert "runs/paper-2/metrics.json" in runs and "runs/demo-2/metrics.json" in runs


def test_profiles_and_checks_exit_with_zero(tmp_path):
    done, steps = gpu_sh("profile", tmp_path)
    assert steps == dict.fromkeys(["built", "data", "profiler"], "rc 0") and not done.returncode
    assert "contrastive_loss, N 64" in done.stdout and "training step, AVT" in done.stdout
    checked = subprocess.run(
        [sys.executable, ROOT / "benchmarks/gpu_check.py"],
        text=True,
        env=os.environ | {"DEVICE": "cpu", "QUICK": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
    )
    assert "0 failures" in checked.stdout and not checked.returncode, checked.stdout


@pytest.mark.parametrize("name", ["accuracy", "loader", "nan", "ranks"])
def test_the_other_benchmarks_run(tmp_path, name):
    environment = {"DEVICE": "cpu", "QUICK": "1", "OUT": str(tmp_path), "PYTHONPATH": str(ROOT)}
    run(f"benchmarks/{name}.py", cwd=tmp_path, env=environment)
    report = json.loads((tmp_path / f"{name}-cpu.json").read_text())
    assert report["commit"] and (report.get("rows") or report["data"])
