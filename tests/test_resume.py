"""Ends before time: what is saved, and that the run resumed from it is the one not interrupted."""

import contextlib
import math
import os
import random
import re
import resource
import signal
import subprocess

import numpy as np
import pytest
import torch

from mcn_ext.data import clips as data
from mcn_ext.data.store import Store
from mcn_ext.model import MCN
from mcn_ext.train import checkpoint, guard, log, signals
from mcn_ext.train.log import read
from tests.conftest import (
    SMALL,
    call,
    is_empty,
    stage1,
    started,
    torchrun,
    wait_for,
    write_store,
)

EVERY = (*SMALL, "--save_every 1")
OF_THE_MACHINE = {"clips_per_s", "data_wait", "peak_mib"}


@pytest.fixture(autouse=True)
def own_signal_handlers():
    """This process's own, whatever a run left."""
    handlers = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def train(store, out, *flags, **options):
    return stage1(store, "--save_every 1 --out", out, *flags, cwd=out.parent, **options)


def step_of(file):
    return checkpoint.load(file)["step"]


def equal(a, b):
    """Bit for bit, in dictionaries and lists, too; NaN is NaN."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return (
            isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
        )
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b or (a != a and b != b)


def content_of(run):
    """What a run folder holds that does not depend on the machine, by the files' names."""
    content = {path.name: checkpoint.load(path) for path in run.glob("epoch-*.pt")}
    content["checkpoint.pt"] = checkpoint.load(run / "checkpoint.pt")
    for file in content.values():
        del file["args"], file["run_id"]
    rows = read(run / "log.jsonl")
    content["log.jsonl"] = [{k: row[k] for k in row.keys() - OF_THE_MACHINE} for row in rows]
    return content


def differences(a, b):
    """Files that differ between two run folders."""
    a, b = content_of(a), content_of(b)
    return [name for name in a.keys() | b.keys() if not equal(a.get(name, 0), b.get(name, 0))]


def save(folder, step, run_id=""):
    """A checkpoint of a run without a model."""
    folder.mkdir(exist_ok=True)
    state = dict(args={}, sizes={}, run_id=run_id, model={}, training={})
    checkpoint.save(folder, step=step, epoch_done=None, complete=False, **state)


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 64
    file.write_bytes(content)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, store_path):
    """A run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(store_path, folder)
    return folder


# ---------------------------------------------------------------------------------------- files
def test_no_flipped_bit_is_loaded(tmp_path):
    content = {"mcn_checkpoint": 1, "x": torch.randn(40, 40), "y": [1.5, "text", torch.arange(99)]}
    good, bad = tmp_path / "good.pt", tmp_path / "bad.pt"
    checkpoint.write(good, content)
    raw, rng, refused = good.read_bytes(), random.Random(0), 0
    # In the directory of the archive, whose fields have no checksum, more often; its flags, too.
    directory = raw.index(b"PK\x01\x02")
    places = [*rng.sample(range(len(raw)), 300), *rng.sample(range(directory, len(raw)), 200)]
    flips = [(place, rng.randrange(8)) for place in places]
    flips += [(entry.start() + 38, 4) for entry in re.finditer(b"PK\x01\x02", raw)]
    for place, bit in flips:
        changed = bytearray(raw)
        changed[place] ^= 1 << bit
        bad.write_bytes(changed)
        try:
            got = checkpoint.load(bad)
        except checkpoint.Damaged as error:
            assert f"{bad}: damaged" in str(error)
            refused += 1
        else:  # in padding, or a time that nobody reads
            assert torch.equal(got["x"], content["x"]) and torch.equal(got["y"][2], content["y"][2])
    assert refused > 300
    for size in (0, 10, len(raw) // 2, len(raw) - 1):
        bad.write_bytes(raw[:size])
        with pytest.raises(checkpoint.Damaged):
            checkpoint.load(bad)


@pytest.mark.parametrize("links", [True, False])
def test_a_good_checkpoint_is_there_at_every_moment(tmp_path, monkeypatch, links):
    """Killed before any call that changes the folder, the run goes on from step 1 or 2."""

    class Kill(BaseException):
        pass

    seen = []
    for moment in range(6):
        folder = tmp_path / str(moment)
        save(folder, 0)
        save(folder, 1)
        calls = iter(range(100))

        def killed(name, calls=calls, moment=moment):
            function = getattr(os, name)

            def wrapped(*args):
                if next(calls) == moment:
                    raise Kill
                if name == "link" and not links:
                    raise PermissionError("no links here")
                return function(*args)

            return wrapped

        with monkeypatch.context() as patch:
            for name in ("link", "replace", "fsync"):
                patch.setattr(log.os, name, killed(name))
            try:
                save(folder, 2)
            except Kill:
                pass
        if links:
            assert step_of(folder / "checkpoint.pt") in (1, 2)
        seen.append(checkpoint.open_run(folder, {}, True)["step"])
        assert step_of(folder / "checkpoint.pt") == seen[-1]  # in its place again
    assert seen == [1, 1, 1, 1, 2, 2]
    assert step_of(folder / "checkpoint.previous.pt") == 1


@pytest.mark.slow
def test_a_damaged_checkpoint_is_refused_by_name_and_the_one_before_used(
    tmp_path, store_path, eval_path, whole
):
    folder = tmp_path / "run"
    train(store_path, folder, "--max_steps 3")
    latest, previous = folder / "checkpoint.pt", folder / "checkpoint.previous.pt"
    assert (step_of(latest), step_of(previous)) == (3, 2)
    flip(latest)
    for command in (
        ("train_stage2.py --add T --init", folder),
        ("evaluate.py --youcook2", eval_path, "--run", folder),
    ):
        refused = call(*command, cwd=tmp_path, check=False)
        assert refused.returncode == 1 and f"{latest}: damaged" in refused.stderr
        assert str(previous) in refused.stderr and str(folder / "epoch-01.pt") in refused.stderr
    call("evaluate.py --device cpu --youcook2", eval_path, "--checkpoint", previous, cwd=tmp_path)
    done = train(store_path, folder)
    assert f"{latest}: damaged" in done.stdout and "resumed, step 2 of 4" in done.stdout
    assert (folder / "checkpoint.damaged.pt").exists() and not differences(whole, folder)

    flip(latest)
    flip(previous)
    refused = train(store_path, folder, check=False)
    assert refused.returncode == 1 and all(
        str(file) in refused.stderr for file in (latest, previous, folder / "epoch-02.pt")
    )
    assert latest.exists() and previous.exists()
    latest.write_bytes((folder / "epoch-01.pt").read_bytes())
    refused = train(store_path, folder, check=False)
    assert refused.returncode == 1 and "weights alone, of an epoch-*.pt" in refused.stderr


@pytest.mark.slow
def test_a_full_disk_keeps_what_was_there(tmp_path, store_path, whole):
    folder = tmp_path / "run"
    train(store_path, folder, "--max_steps 2")
    file, before = folder / "log.jsonl", resource.getrlimit(resource.RLIMIT_FSIZE)
    row = file.read_text()
    try:  # writing beyond so many bytes fails as on a full disk, after the part that has room
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, before[1]))
        done = train(store_path, folder, check=False)
        assert done.returncode == 1 and "Make room" in done.stderr
        assert f"{folder / 'checkpoint.pt'}: could not be written (File too large)" in done.stderr
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(row) + 20, before[1]))
        file.write_text(row)
        for write in (
            lambda: log.append(file, row),
            lambda: log.write_text(folder / "args.json", 2 * row),
        ):
            with pytest.raises(SystemExit, match="could not be written"):
                write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (
        step_of(folder / "checkpoint.pt") == 2
        and "batch_size" in (folder / "args.json").read_text()
    )
    assert len(file.read_text()) == len(row) + 20 and len(read(file)) == 2  # a row cut short
    assert not [path for path in folder.iterdir() if path.name.endswith(".tmp")]
    train(store_path, folder)
    assert not differences(whole, folder)


def test_an_epoch_is_saved_before_the_run_says_so(tmp_path, store_path, monkeypatch):
    write, order = checkpoint.write, []
    monkeypatch.setattr(
        checkpoint, "write", lambda path, *a, **k: (order.append(path.name), write(path, *a, **k))
    )
    train(store_path, tmp_path / "run")
    last = "checkpoint.pt"
    assert order == [last, "epoch-01.pt", last, last, "epoch-02.pt", last]


# ---------------------------------------------------------------------------------------- state
@pytest.mark.slow
def test_random_numbers_go_on(tmp_path, store_path, monkeypatch):
    """With a model that draws: dropout on its embeddings."""
    forward = MCN.forward

    def dropping(self, batch):
        embeddings, errors = forward(self, batch)
        drop = torch.nn.functional.dropout
        return {k: drop(x, 0.1, self.training) for k, x in embeddings.items()}, errors

    monkeypatch.setattr(MCN, "forward", dropping)
    train(store_path, tmp_path / "whole")
    for steps in (1, 3, 4):
        train(store_path, tmp_path / "pieces", "--max_steps", steps)
    assert not differences(tmp_path / "whole", tmp_path / "pieces")


@pytest.mark.slow
def test_a_checkpoint_of_the_first_edition_resumes(tmp_path, store_path, whole):
    folder = tmp_path / "run"
    train(store_path, folder, "--max_steps 3")
    content = checkpoint.load(folder / "checkpoint.pt")
    del content["training"]["objective"]
    for flag in ("loss", "n_candidates"):
        del content["args"][flag]
    content["training"]["guard"] |= {"clipped": 0, "norms": [1.0, 2.0]}
    first = {"max_words": 20, "refit_every": 2, "micro_batch": 0, "loss_impl": "fused"}
    for joint_pairs in (True, False):
        content["args"] |= first | {"joint_pairs": joint_pairs}
        checkpoint.write(folder / "checkpoint.pt", content)
        done = train(store_path, folder, check=False)
        if joint_pairs:
            assert "holds a run with --joint_pairs True (now False)" in done.stderr
    assert not done.returncode and not differences(whole, folder)


@pytest.mark.slow
def test_a_restart_by_the_launcher_resumes_even_with_no_resume(
    tmp_path, store_path, whole, monkeypatch
):
    folder = tmp_path / "run"
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    for _ in range(2):
        train(store_path, folder, "--no-resume --max_steps 3")
    assert (tmp_path / "run.1").exists()
    for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"):
        monkeypatch.setenv(name, "1")
        done = train(store_path, folder, "--no-resume")
        assert "resumed, step 3" in done.stdout or "step 4 of 4: nothing" in done.stdout
        monkeypatch.delenv(name)
    assert not (tmp_path / "run.2").exists() and not differences(whole, folder)


# -------------------------------------------------------------------------------------- signals
@pytest.mark.parametrize(
    "number,step",
    [
        (signal.SIGTERM, 3),
        pytest.param(signal.SIGUSR1, 2, marks=pytest.mark.slow),
        (signal.SIGINT, 2),
    ],
)
def test_a_signal_saves_and_ends_with_0(tmp_path, store_path, whole, monkeypatch, number, step):
    check, folder, calls = guard.Guard.check, tmp_path / "run", []

    def signalled(self, total, norm, stop):
        calls.append(1)
        if len(calls) == step:
            signal.raise_signal(number)
            stop = True
        return check(self, total, norm, stop)

    with monkeypatch.context() as patch:
        patch.setattr(guard.Guard, "check", signalled)
        done = train(store_path, folder, "--save_every 100", check=False)
    assert f"{number.name}: {folder} is saved at step {step} of 4" in done.stdout
    assert done.returncode == (130 if number == signal.SIGINT else 0)
    assert step_of(folder / "checkpoint.pt") == step
    train(store_path, folder)
    assert not differences(whole, folder)  # the epoch that ended with the signal has its file


def test_ctrl_c_again_ends_at_once():
    child = os.fork()
    if child == 0:
        request = signals.StopRequest()
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # of SLURM, and passed on by torchrun
        signal.raise_signal(signal.SIGINT)
        if request.requested:
            signal.raise_signal(signal.SIGINT)
        os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGINT


@pytest.mark.slow
def test_a_second_run_in_a_folder_ends_at_once(tmp_path, store_path):
    command = ("train_stage1.py --pair AV --data", store_path, *EVERY, "--epochs 999")
    folder = tmp_path / "runs/stage1-AV"
    with started(*command, cwd=tmp_path, stderr=subprocess.DEVNULL) as first:
        wait_for((folder / "checkpoint.pt").exists)
        for more in ("", "--no-resume"):
            done = call(*command, more, cwd=tmp_path, check=False)
            assert done.returncode == 1 and "another run is writing here" in done.stderr
            assert f"process {first.pid}, since 2" in done.stderr
        assert not (tmp_path / "runs/stage1-AV.1").exists()
    done = call(*command, "--max_steps 1", cwd=tmp_path)  # the lock has ended with the process
    assert "nothing to do" in done.stdout


def test_processes_that_read_ahead_outlive_signals(store_path):
    reader = data.ClipReader(Store(store_path), "A")
    clips = data.TrainingClips(reader, n_pair=2, min_time=1, seed=0)
    loader = data.make_loader(clips, data.ClipSampler(10, 2, 0), 1, torch.device("cpu"))
    batches = iter(loader)
    next(batches)
    (worker,) = loader._iterator._workers
    for name in ("-TERM", "-USR1", "-INT"):
        subprocess.run(["kill", name, str(worker.pid)], check=True)
    assert len(list(batches)) == 4 and len(list(loader)) == 5 and worker.is_alive()
    del loader, batches
    worker.join(10)
    assert worker.exitcode == 0


# ------------------------------------------------------------------------------- real processes
@pytest.mark.slow
@pytest.mark.parametrize(
    "pair, flags",
    [
        ("AV", ""),
        ("AVT", "--clip_grad_norm 0.5 --learn_temperature --loss sigmoid"),
        ("VT", "--precision bf16"),
        ("AT", "--precision fp16 --epochs 12"),
    ],
)
def test_resumed_runs_equal_uninterrupted_ones(tmp_path, store_path, pair, flags):
    train(store_path, tmp_path / "whole", flags, pair=pair)
    for steps in (1, 3, 4, 100):  # within an epoch, within the next, at its end, to the end
        train(store_path, tmp_path / "pieces", flags, "--max_steps", steps, pair=pair)
    assert not differences(tmp_path / "whole", tmp_path / "pieces")
    if pair == "AV":  # and stage 2
        stage2 = "train_stage2.py --add T --init whole --epochs 2 --save_every 1 --log_every 1"
        call(stage2, "--device cpu --out whole2", cwd=tmp_path)
        for steps in (3, 4):
            call(stage2, "--device cpu --out pieces2 --max_steps", steps, cwd=tmp_path)
        assert not differences(tmp_path / "whole2", tmp_path / "pieces2")


def sixty_steps(store, folder):
    return (
        *("train_stage1.py --pair AV --data", store, *SMALL),
        *("--epochs 6 --save_every 5 --workers 1 --out", folder),
    )


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_the_same(tmp_path):
    """During start-up, steps, k-means, saving; the process that reads ahead is killed, too. With a
    loss that learns a parameter of its own."""
    store, rng = write_store(tmp_path / "train.h5", n_videos=40), random.Random()
    whole, killed, loss = tmp_path / "whole", tmp_path / "killed", "--loss sigmoid"
    call(*sixty_steps(store, whole), loss, cwd=tmp_path)
    for _ in range(3):
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        with started(*sixty_steps(store, killed), loss, cwd=tmp_path, **quiet) as process:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(rng.uniform(2, 8))
    call(*sixty_steps(store, killed), loss, cwd=tmp_path)
    assert not differences(whole, killed)
    bias = checkpoint.load(killed / "checkpoint.pt")["training"]["objective"]["bias"]
    assert abs(bias + math.log(16)) > 1e-4, "it has learnt; a step has 16 clips"


@pytest.mark.slow
def test_sigterm_to_all_processes_saves_and_resumes(tmp_path):
    """It reaches the process that reads ahead, too, as in a SLURM step; none is left."""
    store, folder = write_store(tmp_path / "train.h5", n_videos=40), tmp_path / "run"
    command = sixty_steps(store, folder)
    with started(*command, cwd=tmp_path, stdout=subprocess.PIPE) as process:
        wait_for((folder / "checkpoint.pt").exists)
        os.killpg(process.pid, signal.SIGTERM)
        output = process.communicate(timeout=60)[0]
        wait_for(lambda: is_empty(process.pid))
    step = step_of(folder / "checkpoint.pt")
    assert process.returncode == 0 and f"is saved at step {step} of 60" in output, output
    assert 0 < step < 60 and len(read(folder / "log.jsonl")) == step
    assert f"resumed, step {step} of 60" in call(*command, cwd=tmp_path).stdout
    assert [r["step"] for r in read(folder / "log.jsonl")] == list(range(1, 61))


AT_STEP_3 = """
import os, signal, sys
import train_stage1
from mcn_ext.train import guard
check, calls = guard.Guard.check, []
def interrupted(self, total, norm, stop):
    calls.append(1)
    if len(calls) == 3 and os.environ["RANK"] == "1" and not os.environ.get("SPARED"):
        if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            signal.raise_signal(getattr(signal, os.environ["SEND"]))
            stop = True
    return check(self, total, norm, stop)
guard.Guard.check = interrupted
train_stage1.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_ranks_resume_together(tmp_path, store_path):
    """A rank that dies is restarted by torchrun; a signal to one rank saves and ends all."""
    script = tmp_path / "at_step_3.py"
    script.write_text(AT_STEP_3)

    def ranks(out, flags="", **env):
        command = ("--max_restarts 1", script, "--pair AV --data", store_path, *EVERY, flags)
        return torchrun(2, *command, "--out", out, cwd=tmp_path, env=env)

    ranks("whole", SPARED="1")
    killed = ranks("killed", "--no-resume", SEND="SIGKILL")
    assert "resumed, step 2" in killed.stdout
    assert not differences(tmp_path / "whole", tmp_path / "killed")
    ended = ranks("ended", "--save_every 100", SEND="SIGTERM")
    assert "another rank: ended is saved at step 3 of 4" in ended.stdout
    content = checkpoint.load(tmp_path / "ended/checkpoint.pt")["training"]["rng"]
    assert len(content) == 2 and not torch.equal(content[0]["cpu"], content[1]["cpu"])
    alone = train(store_path, tmp_path / "ended")
    assert "resuming on 1 rank(s) what ran on 2" in alone.stdout and "step 3 of 4" in alone.stdout
    rows = read(tmp_path / "ended/log.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(np.isfinite(row["total"]) for row in rows)


DIFFERENT = """
import sys
from pathlib import Path
from mcn_ext import distributed
from mcn_ext.train import checkpoint
distributed.init("cpu")
folder = Path(sys.argv[1]) / str(distributed.rank())
checkpoint.open_run(folder, {}, True)
"""


@pytest.mark.slow
def test_ranks_that_see_different_checkpoints_end_at_once(tmp_path):
    (tmp_path / "different.py").write_text(DIFFERENT)
    for rank in ("0", "1"):
        save(tmp_path / rank, 2, run_id=rank)
    done = torchrun(2, tmp_path / "different.py", tmp_path, cwd=tmp_path, check=False)
    assert done.returncode and "ranks see different checkpoints" in done.stderr
    assert step_of(tmp_path / "0/checkpoint.pt") == 2
