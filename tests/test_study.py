"""The study's plan (which runs, what is equal) and its runner (order, failures, kills)."""

import json
import os
import shlex
import signal
import subprocess
import sys

import numpy as np
import pytest

from mcn_ext.study import plan, run
from tests.conftest import SMALL, started, wait_for

EPOCHS = SMALL.index("--epochs")
FLAGS = SMALL[:EPOCHS] + SMALL[EPOCHS + 2 :]


@pytest.fixture
def command(tmp_path, store_path, eval_path, capsys):
    """Prints a study's commands: a list of chains of (script, flags)."""

    def call(words="", show="--print"):
        stores = ["--data", store_path, "--youcook2", eval_path, "--out", tmp_path / "a study"]
        words = shlex.split(f"--seeds 0 3 {' '.join(FLAGS)} {words} {show}")
        plan.main([*map(str, stores), *words])
        return capsys.readouterr().out

    return call


# ------------------------------------------------------------------------------------ the plan
def test_all_orders_and_the_baselines_that_are_equal(command, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "run", lambda *_: [])
    joint = "--variant 'joint=--stage1_encoders finetune --learn_temperature'"
    command(f"{joint} --variant 'long=--epochs 20'", show="")
    runs = json.loads((tmp_path / "a study/study.json").read_text())["runs"]
    methods = {entry["method"]: entry for entry in runs if entry["seed"] == 3}
    assert len(runs) == 2 * len(methods)
    orders = [o + v for o in plan.ORDERS for v in ("", "-finetune", "-joint", "-long")]
    assert list(methods)[:12] == orders
    assert methods["AV_T-long"]["epochs"] == [20, 20]
    assert methods["AV_T-long"]["encoders"] == "frozen"
    assert methods["VT_A"]["flops"] < methods["AV_T"]["flops"] < methods["AV_T-finetune"]["flops"]
    epoch = methods["AVT-30"]["flops"] / 30
    for order in orders:
        for kind in ("steps_of", "baseline_of"):
            same = [m for m in methods.values() if order in m.get(kind, ())]
            # A variant of the objective is compared with a baseline of the same objective, too.
            assert len(same) == (2 if order.endswith("-joint") else 1), (order, kind)
            for baseline in same:
                if kind == "steps_of":
                    assert baseline["epochs"] == [sum(methods[order]["epochs"])]
                else:
                    assert abs(baseline["flops"] - methods[order]["flops"]) <= 0.05 * 41 * epoch


def test_commands_of_a_chain(command):
    variant = "--variant 'long=--epochs 2 --queue_size 2 --stage1_encoders finetune'"
    lines = command(f"--clip_grad_norm 7 {variant}").splitlines()
    assert len(lines) == len(set(lines))
    chain = [shlex.split(part) for part in lines[0].split(" && ")]
    scripts = ["train_stage1.py"] + ["train_stage2.py"] * 3
    assert [os.path.basename(words[1]) for words in chain[::2]] == scripts
    for train, evaluate in zip(chain[::2], chain[1::2], strict=True):
        folder = train[train.index("--out") + 1]
        assert evaluate[evaluate.index("--run") + 1] == folder
        assert "--require_complete" in evaluate
        assert train[train.index("--clip_grad_norm") + 1] == "7"
        assert ("--embd_dim" in train) == ("train_stage1.py" in train[1])  # stage 2 inherits sizes
    last = chain[6]
    assert last[last.index("--init") + 1].endswith("a study/seed0/stage1-AV")
    assert "--queue_size 2" in " ".join(last) and "--epochs 2" in " ".join(last)
    assert any("AVT-22-long" in line and "--queue_size 2" in line for line in lines)


def test_sbatch_script_runs_one_chain_a_task(command):
    launch = "--launch 'torchrun --nproc_per_node 4'"
    lines = command(launch).splitlines()
    script = command(launch, show="--print slurm")
    assert f"--array=1-{len(lines)} " in script and lines[0].startswith("torchrun --nproc")
    assert "--gpus-per-node=4 --cpus-per-task=32" in script
    srun = 'srun --cpus-per-task="$SLURM_CPUS_PER_TASK" bash -c'
    third = subprocess.run(
        ["bash", "-c", script.replace(srun, "echo")],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "SLURM_ARRAY_TASK_ID": "3"},
    )
    assert third.stdout.strip() == "trap : USR1 TERM; " + lines[2]


@pytest.mark.parametrize(
    "words, message",
    [
        ("--seed 1", "--seed: the study sets it"),
        ("--pair AV", "--pair"),
        ("--variant 'no flags'", "NAME=FLAGS"),
        ("--lr fast", "--lr"),
        ("--joint_pair", "--joint_pair"),
        ("--variant 'x=--add A'", "--variant x"),
        ("--batch_size 99", "--batch_size 99"),
        ("--noise 1", "--noise makes data"),
        ("--shift 0.5", "--shift: misaligns the data that --noise makes"),
        ("--youcook2 none.h5", "none.h5"),
    ],
)
def test_a_wrong_flag_ends_it_before_any_work(command, tmp_path, words, message, capsys):
    with pytest.raises(SystemExit) as end:
        command(words)
    assert message in str(end.value) + capsys.readouterr().err
    assert not (tmp_path / "a study").exists()


def test_another_study_in_the_folder_is_refused(command, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "run", lambda *_: [])
    command(show="")
    command("--jobs 2 --variant 'a=--lr 1e-5'", show="")
    for words, message in (
        ("--epochs 5 5", "--epochs"),
        ("--margin 0.1", "--margin"),
        ("--variant 'a=--lr 1e-2'", "a=--lr 1e-5|a --lr 1e-5"),
    ):
        with pytest.raises(SystemExit, match=message):
            command(words, show="")


# ---------------------------------------------------------------------------------- the runner
def fake(folder, code="pass", complete=True):
    """A run that leaves what a trained and evaluated run leaves."""
    metrics = json.dumps({"youcook2": {"complete": complete, "data": "eval.h5"}})
    done = (
        f"import pathlib; f = pathlib.Path({str(folder)!r}); {code}; f.mkdir(exist_ok=True); "
        f"(f / 'youcook2.npz').touch(); (f / 'metrics.json').write_text({metrics!r}); "
        "open(f.parent / 'order.txt', 'a').write(f.name + ' ')"
    )
    return folder, [[sys.executable, "-c", "pass"], [sys.executable, "-c", done]]


def run_chains(out, *chains, keep_epochs=False):
    with run.only_one(out) as lock:
        return run.run(list(chains), out, 1, lock, keep_epochs)


def test_a_failure_ends_its_own_chain_alone_and_finished_runs_are_skipped(tmp_path):
    a, b, c, d = (tmp_path / name for name in "abcd")
    burns = fake(b, code="raise SystemExit('disk on fire')")
    failed = run_chains(tmp_path, [fake(a), burns, fake(c)], [fake(d)])
    assert (tmp_path / "order.txt").read_text() == "a d " and not c.exists()
    assert len(failed) == 1 and "disk on fire" in failed[0] and "exit status 1" in failed[0]
    assert run.finished(a, "eval.h5") and not run.finished(a, "other.h5")
    assert run_chains(tmp_path, [fake(a), fake(b), fake(c)], [fake(d)]) == []
    assert (tmp_path / "order.txt").read_text() == "a d b c "
    assert len(run_chains(tmp_path, [fake(tmp_path / "e", complete=False)])) == 1


@pytest.mark.parametrize("keep_epochs", [False, True])
def test_weights_of_epochs_go_once_a_run_is_evaluated(tmp_path, keep_epochs):
    names = ("epoch-01.pt", "epoch-best.pt", "checkpoint.pt")
    files = [tmp_path / folder / name for folder in "ab" for name in names]
    for file in files:
        file.parent.mkdir(exist_ok=True)
        file.touch()
    chain = [fake(tmp_path / "a"), fake(tmp_path / "b", complete=False)]
    assert len(run_chains(tmp_path, chain, keep_epochs=keep_epochs)) == 1  # b has failed
    assert [file.exists() for file in files] == [keep_epochs] + 5 * [True]
    (tmp_path / "b/checkpoint.pt").unlink()
    run.remove_epochs(tmp_path / "b")  # the only weights of the run
    assert (tmp_path / "b/epoch-01.pt").exists()


PROGRAM = """
import sys
from pathlib import Path
from mcn_ext.study import run
out = Path(sys.argv[1])
child = [sys.executable, "-c", '''
import pathlib, signal, sys, time
def save(*_):
    time.sleep(1)
    pathlib.Path(sys.argv[1], "saved").touch()
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
pathlib.Path(sys.argv[1], "ready").write_text("")
time.sleep(3)
save()
''', str(out)]
with run.only_one(out) as lock:
    run.run([[(out / "run", [child])]], out, 1, lock, False)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_study_loses_no_run_and_the_next_one_waits_for_it(tmp_path, number):
    (tmp_path / "program.py").write_text(PROGRAM)
    with started(tmp_path / "program.py", tmp_path, cwd=tmp_path) as process:
        wait_for((tmp_path / "ready").exists)
        process.send_signal(number)
        if number == signal.SIGKILL:  # its run goes on
            process.wait(30)
            with pytest.raises(SystemExit, match="at work"), run.only_one(tmp_path, patience=0):
                pass
        with run.only_one(tmp_path, patience=30):
            assert (tmp_path / "saved").exists()
        assert process.wait(30) == (-9 if number == signal.SIGKILL else 128 + number)


@pytest.mark.slow
def test_a_study_killed_and_resumed_equals_one_that_was_not(tmp_path, store_path, eval_path):
    stores = ("--data", store_path, "--youcook2", eval_path)
    flags = "--seeds 0 --orders VT_A --epochs 4 2 --save_every 1 --stage1_encoders frozen --out"

    def study(out):
        words = ("-m mcn_ext.study", *stores, *FLAGS, flags, out)
        return started(*words, cwd=tmp_path)

    with study("alone") as process:
        assert process.wait() == 0
    for stage in ("stage1-VT", "stage2-VT_A"):
        with study("killed") as process:
            wait_for((tmp_path / "killed/seed0" / stage / "checkpoint.pt").exists)
            process.terminate()
            assert process.wait() == 128 + signal.SIGTERM
    with study("killed") as process:
        assert process.wait() == 0
    (entry,) = json.loads((tmp_path / "killed/study.json").read_text())["runs"]
    one, other = (
        np.load(tmp_path / f / entry["run"] / "youcook2.npz") for f in ("alone", "killed")
    )
    for name in one.files:
        np.testing.assert_array_equal(one[name], other[name])
    assert (tmp_path / "killed/report.html").stat().st_size > 10_000
