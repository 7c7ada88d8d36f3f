"""Shared fixtures: a small store made here, and the real recordings where they lie beside it."""

import contextlib
import importlib.util
import io
import os
import subprocess
import sys
from pathlib import Path

# Before torch is loaded, for this process and those it starts: threads that wait sleep. By default
# they spin, and where processes outnumber cores (ranks, pytest -n) all then wait for the spinning.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch

from mcn_ext import report
from mcn_ext.data.store import StoreWriter

ROOT = Path(__file__).resolve().parent.parent
DIGITS = ROOT.parent / "shared" / "data" / "spoken_digits"
STREAMS = {
    "2d": {"dim": 12, "rate_hz": 1.0},
    "3d": {"dim": 6, "rate_hz": 1.5},
    "mel": {"dim": 40, "rate_hz": 100.0},
}
WORDS = "chop fry boil peel onion carrot egg rice".split()


def write_store(
    path, n_videos=10, n_captions=6, seed=0, silent_every=5, caption="now {} it", **kwargs
):
    """A training store in which the word of a caption shows in its video and sound."""
    rng = np.random.default_rng(seed)
    look = {"2d": rng.gamma(0.5, 1, (len(WORDS), 12)), "3d": rng.gamma(0.5, 1, (len(WORDS), 6))}
    sound = rng.uniform(-60, 0, (len(WORDS), 40))
    writer = StoreWriter(path, STREAMS, "test data", **kwargs)
    for video in range(n_videos):
        content = rng.integers(0, len(WORDS), n_captions)
        rows = {}
        for name, spec in STREAMS.items():
            repeats = round(2 * spec["rate_hz"])
            table = sound if name == "mel" else look[name]
            rows[name] = table[np.repeat(content, repeats)] + rng.normal(
                0, 0.1, (n_captions * repeats, spec["dim"])
            )
        if silent_every and video % silent_every == silent_every - 1:
            rows["mel"] = None
        start = np.arange(n_captions) * 2.0
        writer.add(
            f"video{video:06d}",
            rows,
            start,
            start + 1.9,
            [caption.format(WORDS[c]) for c in content],
        )
    return writer.close()


@pytest.fixture(autouse=True, scope="module")
def threads(request):
    """One: nearly all tensors here are too small to share out. A module whose tests are also of
    what threads do says ``THREADS = 2``, whatever the machine and OMP_NUM_THREADS."""
    torch.set_num_threads(getattr(request.module, "THREADS", 1))


@pytest.fixture(scope="session")
def store_path(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("store") / "train.h5")


@pytest.fixture(scope="session")
def eval_path(tmp_path_factory):
    return write_store(
        tmp_path_factory.mktemp("eval") / "eval.h5", n_videos=24, n_captions=1, seed=1
    )


@pytest.fixture(scope="session")
def digits():
    if not DIGITS.is_dir():
        pytest.skip("the spoken digits (../shared/data/spoken_digits) are not beside this checkout")
    return DIGITS


@pytest.fixture
def no_pictures(monkeypatch):
    """matplotlib as if not installed: pictures are slow, and the page must do without them."""
    for module in ("mcn_ext.train.curves", "mcn_ext.study.report", "mcn_ext.report"):
        monkeypatch.setattr(f"{module}._pyplot", lambda: None)


def run(*command, cwd, check=True, timeout=300, env=None):
    """Run a script of the project as a user would; returns the finished process with its output."""
    words = [str(word) for word in command]
    if words[0].endswith(".py"):
        words[0] = str(ROOT / words[0])
    done = subprocess.run(
        [sys.executable, *words],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, **(env or {})},
    )
    if check and done.returncode:
        raise AssertionError(
            f"{words} exited with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        )
    return done


def load_script(script):
    """A script of the project as a module."""
    spec = importlib.util.spec_from_file_location(script[:-3], ROOT / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def call(script, *args, cwd, check=True, pictures=False):
    """A script's main() in this process: what `run` does, without loading torch again, and without
    pictures unless a test looks at them: one takes longer than a small run."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    module = load_script(script)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        if not pictures:
            patch.setattr("mcn_ext.train.curves.curves", lambda run: None)
            patch.setattr(report, "similarity_picture", lambda *args: None)
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                module.main([str(a) for a in args])
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
            print(end.code if isinstance(end.code, str) else "", file=err)
    if check and code:
        raise AssertionError(f"{script} {args}:\n{out.getvalue()}\n{err.getvalue()}")
    return subprocess.CompletedProcess([script, *args], code, out.getvalue(), err.getvalue())


# Flags of a run that takes seconds; all that changes its numbers is in them.
SMALL = (
    "--preset",
    "demo",
    "--embd_dim",
    16,
    "--recon_dim",
    8,
    "--audio_width",
    0.0625,
    "--audio_frames",
    200,
    "--batch_size",
    4,
    "--n_pair",
    4,
    "--cluster_size",
    4,
    "--queue_size",
    2,
    "--refit_every",
    2,
    "--epochs",
    2,
    "--log_every",
    1,
    "--device",
    "cpu",
    "--min_time",
    1,
    "--max_words",
    20,
    "--lr",
    1e-3,
    "--temperature",
    0.07,
    "--margin",
    0.001,
    "--cluster_weight",
    0.1,
    "--recon_weight",
    1,
    "--audio_augment",
    0,
)
