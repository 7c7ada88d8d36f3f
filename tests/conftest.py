"""Shared fixtures: a small store made here, and the real recordings where they lie beside it."""

import contextlib
import importlib.util
import io
import os
import shlex
import signal
import subprocess
import sys
import time
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
from mcn_ext.prepare.__main__ import main as prepare

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
def convert(tmp_path, monkeypatch, capsys):
    """Runs a KIND in a folder of its own; returns what it prints and what it lists as skipped."""
    monkeypatch.chdir(tmp_path)

    def command(*words, out="out.h5"):
        assert prepare([*map(str, words), "--out", out]) == 0, capsys.readouterr().err
        skipped = tmp_path / f"{out}.skipped.csv"
        return capsys.readouterr().out, skipped.read_text() if skipped.exists() else ""

    return command


@pytest.fixture
def no_pictures(monkeypatch):
    """matplotlib as if not installed: pictures are slow, and the page must do without them."""
    for module in ("mcn_ext.train.curves", "mcn_ext.study.figures", "mcn_ext.report"):
        monkeypatch.setattr(f"{module}._pyplot", lambda: None)


def command_line(*parts):
    """Words of a command: a string is split as a shell does, anything else (a path) is a word."""
    words = []
    for part in parts:
        words += shlex.split(part) if isinstance(part, str) else [str(part)]
    return words


def program(*parts, env=None):
    """How to start a script of the project, or what ``python`` takes: (words, environment)."""
    words = command_line(*parts)
    if words[0].endswith(".py"):
        words[0] = str(ROOT / words[0])
    alone = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return [sys.executable, *words], os.environ | alone | (env or {})


def run(*parts, cwd, check=True, timeout=300, env=None):
    """Run a script of the project as a user would; returns the finished process with its output."""
    words, env = program(*parts, env=env)
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, timeout=timeout, env=env)
    if check and done.returncode:
        raise AssertionError(
            f"{words} exited with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        )
    return done


def torchrun(n_ranks, *parts, **options):
    """`run` as so many ranks; a script of the project is given with its path."""
    launch = "-m torch.distributed.run --standalone --nproc_per_node"
    return run(launch, n_ranks, *parts, **options)


@contextlib.contextmanager
def started(*parts, cwd, env=None, **options):
    """A process that goes on, in a group of its own, which is killed at the end."""
    words, env = program(*parts, env=env)
    process = subprocess.Popen(
        words, cwd=cwd, env=env, text=True, start_new_session=True, **options
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for(condition, seconds=120):
    """Return once the condition holds; an AssertionError after so long."""
    for _ in range(50 * seconds):
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError(f"not within {seconds} s")


def is_empty(group):
    """Whether a process group has no process left but ended ones, which await their parent."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            state, _, its_group = stat.read_text().rsplit(")", 1)[1].split()[:3]
            if int(its_group) == group and state not in "ZX":
                return False
    return True


def load_script(script):
    """A script of the project as a module."""
    spec = importlib.util.spec_from_file_location(script[:-3], ROOT / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def call(*parts, cwd, check=True, pictures=False):
    """A script's main() in this process: what `run` does, without loading torch again, and without
    pictures unless a test looks at them: one takes longer than a small run."""
    script, *words = command_line(*parts)
    out, err, code = io.StringIO(), io.StringIO(), 0
    module = load_script(script)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        if not pictures:
            patch.setattr("mcn_ext.train.curves.curves", lambda run: None)
            patch.setattr(report, "similarity_picture", lambda *args: None)
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                module.main(words)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
            print(end.code if isinstance(end.code, str) else "", file=err)
    if check and code:
        raise AssertionError(f"{script} {words}:\n{out.getvalue()}\n{err.getvalue()}")
    return subprocess.CompletedProcess([script, *words], code, out.getvalue(), err.getvalue())


def stage1(store, *flags, pair="AV", **options):
    """Train a small stage 1 in this process."""
    return call("train_stage1.py --pair", pair, "--data", store, *SMALL, *flags, **options)


# Flags of a run that takes seconds; all that changes its numbers is in them.
SMALL = command_line(
    "--preset demo --device cpu --embd_dim 16 --recon_dim 8 --audio_width 0.0625",
    "--audio_frames 200 --audio_augment 0 --batch_size 4 --n_pair 4 --min_time 1 --epochs 2",
    "--lr 1e-3 --temperature 0.07 --margin 0.001 --recon_weight 1",
    "--cluster_weight 0.1 --cluster_size 4 --queue_size 2 --log_every 1",
)
