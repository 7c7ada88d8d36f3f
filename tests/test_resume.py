"""Ends before time: what is saved, and that the run resumed from it is the one not interrupted."""

import os
import random
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from mcn_ext.data import clips as data
from mcn_ext.data.store import Store
from mcn_ext.model import MCN
from mcn_ext.train import checkpoint, guard, log, signals
from mcn_ext.train.log import read
from tests.conftest import ROOT, SMALL, call, run, write_store

EVERY = (*SMALL, "--save_every", 1)
OF_THE_MACHINE = {"clips_per_s", "data_wait", "peak_mib"}


@pytest.fixture(autouse=True)
def as_before():
    """One thread, and this process's own signal handlers, whatever a run left."""
    threads, handlers = (
        torch.get_num_threads(),
        {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)},
    )
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def train(store, out, *more, pair="AV", **kwargs):
    return call(
        "train_stage1.py",
        "--pair",
        pair,
        "--data",
        store,
        *EVERY,
        "--out",
        out,
        *more,
        cwd=out.parent,
        **kwargs,
    )


def equal(a, b):
    """Bit for bit; NaN is NaN."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b or (a != a and b != b)


def differences(a, b):
    """What differs between two run folders: log, files, and every part of every checkpoint."""
    logs = [read(folder / "log.jsonl") for folder in (a, b)]
    logs = [[{k: row[k] for k in row.keys() - OF_THE_MACHINE} for row in rows] for rows in logs]
    found = [] if equal(*logs) else ["log.jsonl"]
    epochs = [sorted(path.name for path in folder.glob("epoch-*.pt")) for folder in (a, b)]
    if epochs[0] != epochs[1]:
        return [*found, "epochs"]
    for name in ("checkpoint.pt", *epochs[0]):
        one, other = (checkpoint.load(folder / name) for folder in (a, b))
        for content in (one, other):  # the parts of the training state by their own names
            content |= content.pop("training", {})
        for key in (one.keys() | other.keys()) - {"args", "run_id"}:
            if key not in one or key not in other or not equal(one[key], other[key]):
                found.append(f"{name}: {key}")
    return found


def step_of(file):
    return checkpoint.load(file)["step"]


def flip(file, position=None):
    content = bytearray(file.read_bytes())
    content[len(content) // 2 if position is None else position] ^= 64
    file.write_bytes(content)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, store_path):
    folder = tmp_path_factory.mktemp("whole") / "run"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    train(store_path, folder)
    torch.set_num_threads(threads)
    return folder


# ---------------------------------------------------------------------------------------- files
def test_no_flipped_bit_is_loaded(tmp_path):
    content = {"mcn_checkpoint": 1, "x": torch.randn(40, 40), "y": [1.5, "text", torch.arange(99)]}
    good, bad = tmp_path / "good.pt", tmp_path / "bad.pt"
    checkpoint.write(good, content)
    raw, rng, refused = good.read_bytes(), random.Random(0), 0
    directory = raw.index(b"PK\x01\x02")  # its fields have no checksum
    flags = [i + 38 for i in range(len(raw)) if raw[i : i + 4] == b"PK\x01\x02"]
    places = [*rng.sample(range(len(raw)), 300), *rng.sample(range(directory, len(raw)), 200)]
    for place, bit in [(p, rng.randrange(8)) for p in places] + [(p, 4) for p in flags]:
        changed = bytearray(raw)
        changed[place] ^= 1 << bit
        bad.write_bytes(changed)
        try:
            got = checkpoint.load(bad)
        except checkpoint.Damaged as error:
            assert str(bad) in str(error) and "damaged" in str(error)
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

    def save(folder, step):
        checkpoint.save(
            folder,
            args={},
            sizes={},
            step=step,
            epoch_done=None,
            complete=False,
            run_id="",
            model={},
            training={},
        )

    class Kill(BaseException):
        pass

    seen = []
    for moment in range(6):
        folder = tmp_path / str(moment)
        folder.mkdir()
        for step in (0, 1):
            save(folder, step)
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
    train(store_path, folder, "--max_steps", 3)
    latest, previous = folder / "checkpoint.pt", folder / "checkpoint.previous.pt"
    assert (step_of(latest), step_of(previous)) == (3, 2)
    flip(latest)
    for command in (
        ("train_stage2.py", "--add", "T", "--init", folder),
        ("evaluate.py", "--youcook2", eval_path, "--run", folder),
    ):
        refused = call(*command, cwd=tmp_path, check=False)
        assert refused.returncode == 1 and f"{latest}: damaged" in refused.stderr
        assert str(previous) in refused.stderr and str(folder / "epoch-01.pt") in refused.stderr
    assert (
        call(
            "evaluate.py",
            "--youcook2",
            eval_path,
            "--checkpoint",
            previous,
            "--device",
            "cpu",
            cwd=tmp_path,
        ).returncode
        == 0
    )
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
    train(store_path, folder, "--max_steps", 2)
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
    assert order == [
        "checkpoint.pt",
        "epoch-01.pt",
        "checkpoint.pt",
        "checkpoint.pt",
        "epoch-02.pt",
        "checkpoint.pt",
    ]


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
    train(store_path, folder, "--max_steps", 3)
    content = checkpoint.load(folder / "checkpoint.pt")
    del content["training"]["objective"]
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
        train(store_path, folder, "--no-resume", "--max_steps", 3)
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
        done = train(store_path, folder, "--save_every", 100, check=False)
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
    command = ["train_stage1.py", "--pair", "AV", "--data", store_path, *EVERY, "--epochs", 999]
    words = [sys.executable, *map(str, command)]
    words[1] = str(ROOT / words[1])
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    first = subprocess.Popen(words, cwd=tmp_path, **quiet)
    try:
        folder = tmp_path / "runs/stage1-AV"
        for _ in range(600):
            if (folder / "checkpoint.pt").exists():
                break
            time.sleep(0.1)
        for more in ((), ("--no-resume",)):
            done = run(*command, *more, cwd=tmp_path, check=False)
            assert done.returncode == 1 and "another run is writing here" in done.stderr
            assert f"process {first.pid}, since 2" in done.stderr
        assert not (tmp_path / "runs/stage1-AV.1").exists()
    finally:
        first.kill()
        first.wait()
    done = run(*command, "--max_steps", 1, cwd=tmp_path)  # the lock has ended with the process
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
    "pair,extra",
    [
        ("AV", ()),
        ("AVT", ("--clip_grad_norm", 0.5, "--learn_temperature")),
        ("VT", ("--precision", "bf16")),
        ("AT", ("--precision", "fp16", "--epochs", 12)),
    ],
)
def test_resumed_runs_equal_uninterrupted_ones(tmp_path, store_path, pair, extra):
    train(store_path, tmp_path / "whole", *extra, pair=pair)
    for steps in (1, 3, 4, 100):  # within an epoch, within the next, at its end, to the end
        train(store_path, tmp_path / "pieces", *extra, "--max_steps", steps, pair=pair)
    assert not differences(tmp_path / "whole", tmp_path / "pieces")
    if pair == "AV":  # and stage 2
        common = (
            "train_stage2.py",
            "--add",
            "T",
            "--init",
            "whole",
            "--epochs",
            2,
            "--save_every",
            1,
            "--log_every",
            1,
            "--device",
            "cpu",
        )
        call(*common, "--out", "whole2", cwd=tmp_path)
        for steps in (3, 4):
            call(*common, "--out", "pieces2", "--max_steps", steps, cwd=tmp_path)
        assert not differences(tmp_path / "whole2", tmp_path / "pieces2")


def start(store, folder):
    """A training process of 60 steps in a process group of its own, its output as text."""
    command = [sys.executable, ROOT / "train_stage1.py", "--pair", "AV", "--data", store, *SMALL]
    command += ["--epochs", 6, "--save_every", 5, "--workers", 1, "--out", folder]
    return subprocess.Popen(
        list(map(str, command)),
        stdout=subprocess.PIPE,
        text=True,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_the_same(tmp_path):
    """During start-up, steps, k-means, saving; the process that reads ahead is killed, too."""
    store, rng = write_store(tmp_path / "train.h5", n_videos=40), random.Random()
    begin = time.perf_counter()
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert "step 60 of 60" in start(store, whole).communicate(timeout=300)[0]
    seconds = time.perf_counter() - begin
    for _ in range(4):
        process = start(store, killed)
        try:
            process.communicate(timeout=rng.uniform(0, seconds))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    output = start(store, killed).communicate(timeout=300)[0]
    assert "of 60" in output and not differences(whole, killed), output


@pytest.mark.slow
def test_sigterm_to_all_processes_saves_and_resumes(tmp_path):
    """It reaches the process that reads ahead, too, as in a SLURM step."""
    store, folder = write_store(tmp_path / "train.h5", n_videos=40), tmp_path / "run"
    process = start(store, folder)
    saved = folder / "checkpoint.pt"
    for _ in range(6000):
        if saved.exists() or process.poll() is not None:
            break
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    step = step_of(saved)
    assert process.returncode == 0 and f"is saved at step {step} of 60" in output, output
    assert 0 < step < 60 and len(read(folder / "log.jsonl")) == step
    assert f"resumed, step {step} of 60" in start(store, folder).communicate(timeout=300)[0]
    assert [r["step"] for r in read(folder / "log.jsonl")] == list(range(1, 61))


AT_STEP_3 = """
import os, runpy, signal, sys
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
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_ranks_resume_together(tmp_path, store_path):
    """A rank that dies is restarted by torchrun; a signal to one rank saves and ends all."""
    (tmp_path / "at_step_3.py").write_text(AT_STEP_3)

    def ranks(out, *more, **env):
        return run(
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            2,
            "--max_restarts",
            1,
            "at_step_3.py",
            ROOT / "train_stage1.py",
            "--pair",
            "AV",
            "--data",
            store_path,
            *EVERY,
            "--out",
            out,
            *more,
            cwd=tmp_path,
            env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **env},
        )

    ranks("whole", SPARED="1")
    killed = ranks("killed", "--no-resume", SEND="SIGKILL")
    assert "resumed, step 2" in killed.stdout
    assert not differences(tmp_path / "whole", tmp_path / "killed")
    ended = ranks("ended", "--save_every", 100, SEND="SIGTERM")
    assert "another rank: ended is saved at step 3 of 4" in ended.stdout
    content = checkpoint.load(tmp_path / "ended/checkpoint.pt")["training"]["rng"]
    assert len(content) == 2 and not torch.equal(content[0]["cpu"], content[1]["cpu"])
    alone = train(store_path, tmp_path / "ended")
    assert "resuming on 1 rank(s) what ran on 2" in alone.stdout and "step 3 of 4" in alone.stdout
    assert [row["step"] for row in read(tmp_path / "ended/log.jsonl")] == [1, 2, 3, 4]
    assert all(np.isfinite(row["total"]) for row in read(tmp_path / "ended/log.jsonl"))


BY_RANK = """
import os, runpy, sys
sys.argv = sys.argv[1:]
os.makedirs("disk" + os.environ["RANK"], exist_ok=True)
os.chdir("disk" + os.environ["RANK"])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_ranks_that_see_different_checkpoints_end_at_once(tmp_path, store_path):
    (tmp_path / "by_rank.py").write_text(BY_RANK)
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, "by_rank.py")
    command = (ROOT / "train_stage1.py", "--pair", "AV", "--data", store_path, *EVERY)
    command = (*command, "--out", "run")
    env = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run(*launch, *command, "--max_steps", 2, cwd=tmp_path, env=env)
    done = run(*launch, *command, cwd=tmp_path, env=env, check=False)
    assert done.returncode and "ranks see different checkpoints" in done.stderr
    assert step_of(tmp_path / "disk0/run/checkpoint.pt") == 2
