"""The order study: which runs, in which order, what is equal; what becomes of it when killed."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from mcn_ext import minimal
from mcn_ext.study import chains
from mcn_ext.study import plan as study
from mcn_ext.study.plan import Study, training_flops
from mcn_ext.train import flags
from tests.conftest import ROOT, SMALL

EPOCHS = SMALL.index("--epochs")
REST = list(map(str, SMALL[:EPOCHS] + SMALL[EPOCHS + 2 :]))


def plan(tmp_path, store, evaluation, *more):
    args, rest = study.parser().parse_known_args(
        [
            "--data",
            str(store),
            "--youcook2",
            str(evaluation),
            "--out",
            str(tmp_path / "study"),
            "--seeds",
            "0",
            "3",
            *REST,
            *more,
        ]
    )
    return Study(args, rest, [])


@pytest.fixture
def quick_count(monkeypatch):
    """FLOPs of made-up layers: the real count is a test of its own."""

    def count(args, dims, modalities, frozen, word_dim):
        return sum(
            {"A": 1e8, "V": 1e6, "T": 1e6}[m] * (1 if m in frozen else 3) for m in modalities
        )

    monkeypatch.setattr(study, "training_flops", count)


# ------------------------------------------------------------------------------------ the plan


def test_all_orders_and_baselines_with_what_is_equal(tmp_path, store_path, eval_path, quick_count):
    made = plan(
        tmp_path,
        store_path,
        eval_path,
        "--variant",
        "joint=--stage1_encoders finetune --joint_pairs",
        "--variant",
        "long=--epochs 20",
    )
    methods = [run["method"] for run in made.runs if run["seed"] == 3]
    assert len(made.runs) == 2 * len(methods) and len(set(methods)) == len(methods)
    orders = [o + v for o in study.ORDERS for v in ("", "-finetune", "-joint", "-long")]
    assert methods[:12] == orders and all(m.startswith("AVT-") for m in methods[12:])
    by = {run["method"]: run for run in made.runs if run["seed"] == 0}
    assert by["AV_T-long"]["epochs"] == [20, 20] and by["AV_T-long"]["encoders"] == "frozen"
    epoch = by["AVT-30"]["flops"] / 30
    for order in orders:
        # Each has a baseline of as many steps, and one whose encoders cost as much, within
        # rounding; with another objective, also such as share it.
        for kind in ("steps_of", "baseline_of"):
            same = [run for run in by.values() if order in run.get(kind, ())]
            own = ["", "-joint"] if order.endswith("-joint") else [""]
            assert [run["method"].lstrip("AVT-0123456789") for run in same] == [
                v.lstrip("-") for v in own
            ], (order, kind)
            for run in same:
                assert (
                    run["epochs"] == [sum(by[order]["epochs"])]
                    if kind == "steps_of"
                    else abs(run["flops"] - by[order]["flops"]) <= 0.05 * 41 * epoch
                )
    assert by["VT_A"]["flops"] < by["AV_T"]["flops"] < by["AV_T-finetune"]["flops"]
    assert {
        run["method"]
        for run in plan(
            tmp_path, store_path, eval_path, "--baselines", "steps", "--orders", "AV_T", "AVT"
        ).runs
    } == {"AV_T", "AV_T-finetune", "AVT-30"}
    # One chain for a pair and seed: its stage 1 first, once, then what starts from it.
    chain = made.chains[0]
    assert [folder.name for folder, _ in chain] == [
        "stage1-AV",
        "stage2-AV_T",
        "stage2-AV_T-finetune",
        "stage2-AV_T-joint",
        "stage2-AV_T-long",
    ]
    for folder, commands in chain:
        assert [os.path.basename(c[1]) for c in commands] == [
            "train_stage1.py" if "stage1" in folder.name else "train_stage2.py",
            "evaluate.py",
        ]
    assert sum(len(chain) for chain in made.chains) == len(made.runs) + 6


def test_flops_are_those_of_the_layers():
    """A gated unit is two linear layers, 2 F D + 2 D D a row; backward is twice that, less the
    gradient of the input, which nobody asks for. Frozen, there is forward alone."""

    class Args:
        embd_dim, recon_dim, recon_weight, audio_width = 16, 8, 0.0, 0.0625
        audio_frames, max_words = 64, 4

    f, d, w = 18, 16, 5
    video = 2 * f * d + 2 * d * d
    text = 4 * 2 * w * d + 2 * (2 * d * d)
    backward = (4 * f * d - 2 * f * d) + 4 * d * d, 4 * 2 * w * d + 2 * 4 * d * d
    dims = {"2d": 12, "3d": 6}
    both = training_flops(Args, dims, "VT", "", w)
    assert both == video + text + sum(backward)
    assert training_flops(Args, dims, "VT", "V", w) == video + text + backward[1]
    assert training_flops(Args, dims, "AVT", "", w) > 10 * both


@pytest.mark.slow
def test_flops_do_not_depend_on_how_a_machine_convolves(monkeypatch):
    class Args:
        embd_dim, recon_dim, recon_weight, audio_width = 16, 8, 0.0, 0.5
        audio_frames, max_words = 256, 4

    with_fewer_products = training_flops(Args, {}, "AT", "", 5)
    monkeypatch.setattr(minimal, "pays", lambda *_: False)
    assert with_fewer_products == training_flops(Args, {}, "AT", "", 5)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--seed", "1"], "--seed: the study sets it"),
        (["--pair", "AV"], "pair"),
        (["--variant", "no flags"], "NAME=FLAGS"),
        (["--lr", "fast"], "--lr"),
        (["--joint_pair"], "--joint_pair"),
        (["--variant", "x=--add A"], "--variant x"),
        (["--batch_size", "99"], "--batch_size 99"),
        (["--noise", "1"], "--noise makes data"),
        (["--youcook2", "none.h5"], "none.h5: no such"),
    ],
)
def test_a_wrong_flag_ends_it_before_any_work(
    tmp_path, store_path, eval_path, words, message, capsys
):
    with pytest.raises(SystemExit) as end:
        plan(tmp_path, store_path, eval_path, *words)
    assert message in str(end.value) + capsys.readouterr().err
    assert not (tmp_path / "study").exists()


def test_printed_commands_are_complete(tmp_path, store_path, eval_path, capsys, quick_count):
    words = [
        "--data",
        str(store_path),
        "--youcook2",
        str(eval_path),
        "--out",
        str(tmp_path / "a study"),
        "--seeds",
        "0",
        "--launch",
        "torchrun --nproc_per_node 4",
    ]
    assert study.main([*words, "--print", "slurm", *REST]) == 0
    script = capsys.readouterr().out
    assert study.main([*words, "--print", *REST]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"--array=1-{len(lines)} " in script and all(line in script for line in lines)
    assert "--gpus-per-node=4 --cpus-per-task=32" in script
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    srun = 'srun --cpus-per-task="$SLURM_CPUS_PER_TASK" bash -c'
    third = subprocess.run(
        ["bash", "-c", script.replace(srun, "echo")],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "SLURM_ARRAY_TASK_ID": "3"},
    )
    assert third.stdout.strip() == "trap : USR1 TERM; " + lines[2]
    first = [shlex.split(command) for command in lines[0].split(" && ")]
    assert first[0][:3] == ["torchrun", "--nproc_per_node", "4"] and first[1][0] == sys.executable
    assert str(tmp_path / "a study/seed0/stage1-AV") in first[0]


@pytest.mark.slow
def test_another_study_in_the_folder_is_refused(tmp_path, store_path, eval_path, quick_count):
    plan(tmp_path, store_path, eval_path).write()
    plan(tmp_path, store_path, eval_path, "--jobs", "2").write()
    plan(tmp_path, store_path, eval_path, "--workers", "0", "--variant", "a=--lr 1e-5").write()
    for words, message in (
        (["--epochs", "5", "5"], "--epochs"),
        (["--margin", "0.1"], "--margin"),
        (["--variant", "a=--lr 1e-2"], "--variant a=--lr 1e-5"),
    ):
        with pytest.raises(SystemExit, match=message):
            plan(tmp_path, store_path, eval_path, *words).write()
    (tmp_path / "study/study.json").write_text("{}")
    with pytest.raises(SystemExit, match="is not a study's"):
        plan(tmp_path, store_path, eval_path).write()


def test_flags_reach_both_stages_but_sizes_of_the_first(
    tmp_path, store_path, eval_path, quick_count
):
    made = plan(
        tmp_path,
        store_path,
        eval_path,
        "--warmup_steps",
        "7",
        "--grad_outliers",
        "clip",
        "--variant",
        "long=--epochs 2 --queue_size 2 --stage1_encoders finetune",
    )
    (_, [stage1, _]), *_, (_, [stage2, evaluate]) = made.chains[0]
    text = [" ".join(words) for words in (stage1, stage2)]
    assert all("--warmup_steps 7" in t and "--grad_outliers clip" in t for t in text)
    assert "--embd_dim 16" in text[0] and "--embd_dim" not in text[1]
    assert "--require_complete" in evaluate
    baseline = next(c for chain in made.chains for f, (c, _) in chain if f.name == "AVT-22-long")
    assert " ".join(baseline).endswith(
        "--queue_size 2 --no-keep_epochs --out " + str(tmp_path / "study/seed0/AVT-22-long")
    )


# ---------------------------------------------------------------------------------- the chains


def fake(folder, code="pass", complete=True):
    """A run whose two commands leave what a trained and evaluated run leaves."""
    done = (
        f"import json, pathlib, time; f = pathlib.Path({str(folder)!r}); {code}; "
        "f.mkdir(parents=True, exist_ok=True); (f / 'youcook2.npz').write_text('x'); "
        "(f / 'metrics.json').write_text(json.dumps({'youcook2': {'complete': "
        f"{complete}, 'data': 'eval.h5'}}}})); "
        "open(f.parent / 'order.txt', 'a').write(f.name + ' ')"
    )
    return folder, [[sys.executable, "-c", "pass"], [sys.executable, "-c", done]]


def run(tmp_path, units, jobs=1):
    with chains.only_one(tmp_path) as lock:
        return chains.run(units, lambda folder: 1.0, tmp_path, jobs, lock)


@pytest.mark.slow
def test_chains_run_in_order_and_a_failure_ends_its_own_alone(tmp_path, capsys):
    a, b, c, d = (tmp_path / name for name in "abcd")
    failed = run(
        tmp_path, [[fake(a), fake(b, code="raise SystemExit('disk on fire')"), fake(c)], [fake(d)]]
    )
    assert (tmp_path / "order.txt").read_text() == "a d " and not c.exists()
    assert len(failed) == 1 and "disk on fire" in failed[0] and "exit status 1" in failed[0]
    assert "2 of 4 runs done" in capsys.readouterr().out
    assert chains.finished(a) and chains.finished(a, "eval.h5") and not chains.finished(a, "b.h5")
    # The same again: what is finished is not run again, the rest is.
    assert run(tmp_path, [[fake(a), fake(b), fake(c)], [fake(d)]]) == []
    assert (tmp_path / "order.txt").read_text() == "a d b c "


def test_a_run_that_ended_early_is_no_success(tmp_path):
    failed = run(tmp_path, [[fake(tmp_path / "a", complete=False), fake(tmp_path / "b")]])
    assert len(failed) == 1 and not (tmp_path / "b").exists()


PROGRAM = """
import signal, sys, time
from pathlib import Path
from mcn_ext.study import chains
out = Path(sys.argv[1])
child = [sys.executable, "-c", '''
import pathlib, signal, sys, time
def save(*_):
    time.sleep(1)
    pathlib.Path(sys.argv[1], "saved").touch()
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
pathlib.Path(sys.argv[1], "ready").touch()
time.sleep(60)
''', str(out)]
with chains.only_one(out) as lock:
    chains.run([[(out / "run", [child])]], lambda folder: 1.0, out, 1, lock)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_runs_save_when_the_study_is_killed_and_the_next_waits_for_them(tmp_path, number):
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(tmp_path)], cwd=ROOT)
    try:
        end = time.monotonic() + 60
        while not (tmp_path / "ready").exists() and time.monotonic() < end:
            time.sleep(0.05)
        process.send_signal(number)
        if number == signal.SIGKILL:  # the run outlives the study, and its lock with it
            process.wait(30)
            with (
                pytest.raises(SystemExit, match="at work in this folder"),
                chains.only_one(tmp_path, patience=0),
            ):
                pass
        with chains.only_one(tmp_path, patience=30):
            assert (tmp_path / "saved").exists()
        assert process.wait(30) == (-9 if number == signal.SIGKILL else 128 + number)
    finally:
        process.kill()


@pytest.mark.slow
def test_a_study_killed_in_the_middle_ends_as_one_left_alone(tmp_path, store_path, eval_path):
    """Real runs, SIGKILL of the whole of it: the same ranks for every query, and a report."""

    def command(out):
        return [
            sys.executable,
            "-m",
            "mcn_ext.study",
            "--data",
            store_path,
            "--youcook2",
            eval_path,
            "--out",
            tmp_path / out,
            "--seeds",
            "0",
            "--orders",
            "VT_A",
            "--epochs",
            "4",
            "2",
            "--stage1_encoders",
            "frozen",
            "--save_every",
            "1",
            *REST,
        ]

    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run(list(map(str, command("alone"))), cwd=tmp_path, env=environment, check=True)
    kills = 0
    for wait in ("seed0/stage1-VT/checkpoint.pt", "seed0/stage2-VT_A/checkpoint.pt"):
        process = subprocess.Popen(list(map(str, command("killed"))), cwd=tmp_path, env=environment)
        end = time.monotonic() + 120
        while (
            not (tmp_path / "killed" / wait).exists()
            and process.poll() is None
            and time.monotonic() < end
        ):
            time.sleep(0.02)
        kills += process.poll() is None
        process.kill()
        process.wait()
    assert kills == 2
    subprocess.run(list(map(str, command("killed"))), cwd=tmp_path, env=environment, check=True)
    runs = json.loads((tmp_path / "killed/study.json").read_text())["runs"]
    assert len(runs) == 1
    for made in runs:
        one, other = (
            np.load(tmp_path / out / made["run"] / "youcook2.npz") for out in ("alone", "killed")
        )
        assert one.files == other.files
        for name in one.files:
            np.testing.assert_array_equal(one[name], other[name])
    assert (tmp_path / "killed/report.html").stat().st_size > 10_000


def test_defaults_are_the_published_experiment():
    args, _ = study.parser().parse_known_args([])
    assert args.epochs == [flags.EPOCHS[1], flags.EPOCHS[2]] and args.seeds == [0, 1, 2]
