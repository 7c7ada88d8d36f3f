"""Runs killed at random moments, resumed by the same command, and compared bit by bit with one that
was left alone.

    python benchmarks/kills.py                    # 10 kills in each of 3 ways, about 10 minutes
    python benchmarks/kills.py --modes process rank ranks rank4 --kills 40

A small stage-1 run (AV, demo data, 320 steps, a checkpoint every 5, k-means every 4) is killed with
SIGKILL, again and again, a random time after each start: during start-up, steps, k-means, saving.

    process  a single process; then the same command again
    rank     one of 2 ranks, at random; torchrun --max_restarts starts both again
    ranks    torchrun and both ranks at once; then the same command again
    rank4    as rank, one of 4

"Equal" compares with the run left alone, with as many ranks: weights, optimiser, schedule, queue,
centroids, random numbers, every epoch's weights, and what log.jsonl says of every step. A run that
ends before it has had its kills is followed by another. "Lost" are steps logged but not saved.
"""

import argparse
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a checkout that was built in place, not installed

import torch  # noqa: E402

from mcn_ext.train import checkpoint  # noqa: E402
from mcn_ext.train.log import read  # noqa: E402

COMMAND = (
    "train_stage1.py --pair AV --preset demo --device cpu --epochs 20 --embd_dim 64 "
    "--recon_dim 32 --audio_width 0.0625 --audio_frames 200 --batch_size 16 --n_pair 4 "
    "--cluster_size 16 --queue_size 4 --save_every 5 --log_every 1"
).split()
MODES = {"process": 1, "rank": 2, "ranks": 2, "rank4": 4}
OF_ONE = {"rank", "rank4"}  # torchrun lives on, and starts the ranks again
OF_THE_MACHINE = {"clips_per_s", "data_wait", "peak_mib"}
TOO_LONG = 300  # seconds: such a run hangs


def start(work, out, mode, restarts=0):
    launch = (
        []
        if MODES[mode] == 1
        else [
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            str(MODES[mode]),
            "--max_restarts",
            str(restarts),
        ]
    )
    with open(work / "output.txt", "a") as output:
        return subprocess.Popen(
            [sys.executable, *launch, str(ROOT / COMMAND[0]), *COMMAND[1:], "--out", out],
            cwd=work,
            stdout=output,
            stderr=output,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )


def below(pid):
    """Ids of the processes that pid started, and theirs."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except FileNotFoundError:
        return []
    return [int(c) for c in children] + [p for c in children for p in below(int(c))]


def kill(pids):
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def progress(folder):
    """(starts, steps logged, step saved) of a run folder."""
    env, log, saved = (folder / name for name in ("env.txt", "log.jsonl", checkpoint.LATEST))
    rows = read(log) if log.exists() else []
    return (
        env.read_text().count("started:") if env.exists() else 0,
        rows[-1]["step"] if rows else 0,
        checkpoint.load(saved)["step"] if saved.exists() else 0,
    )


def killed_run(work, out, mode, kills, span, rng):
    """Train to the end, killed up to ``kills`` times, each within ``span`` seconds of a start.
    Returns (steps lost by each kill, exit status)."""
    lost, starts = [], 0
    process = start(work, out, mode, kills)
    while True:
        try:
            left = len(lost) < kills
            status = process.wait(rng.uniform(0, span) if left else TOO_LONG)
        except subprocess.TimeoutExpired:
            status = None if left else "hangs"
        if status is not None:
            kill(below(process.pid) + [process.pid] if status == "hangs" else [])
            return lost, status
        victims = below(process.pid)
        if mode in OF_ONE:
            if not victims:
                continue  # between two starts
            kill([rng.choice(victims)])
        else:
            kill([process.pid, *victims])
            process.wait()
        now, logged, saved = progress(work / out)
        # A process killed before it went on has nothing to lose: the log is its predecessor's.
        lost.append(logged - saved if now > starts else 0)
        starts = now
        if mode not in OF_ONE:
            process = start(work, out, mode)


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b or (a != a and b != b)


def differences(a, b):
    """What differs between two run folders."""
    logs = [
        [
            {key: value for key, value in row.items() if key not in OF_THE_MACHINE}
            for row in read(folder / "log.jsonl")
        ]
        for folder in (a, b)
    ]
    found = [] if equal(*logs) else ["log.jsonl"]
    if (names := sorted(p.name for p in a.glob("epoch-*.pt"))) != sorted(
        p.name for p in b.glob("epoch-*.pt")
    ):
        found.append("epochs")
    for name in (checkpoint.LATEST, *names):
        one, other = (checkpoint.load(folder / name) for folder in (a, b))
        for key in one.keys() - {"args", "run_id", "training"}:
            if not equal(one[key], other[key]):
                found.append(f"{name}: {key}")
        found += [
            f"{name}: {key}"
            for key in one.get("training", ())
            if not equal(one["training"][key], other["training"][key])
        ]
    return found


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=30, help="in all modes together (default 30)")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=["process", "rank", "ranks"])
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default 0)")
    parser.add_argument("--out", type=Path, help="write the table as JSON")
    parser.add_argument("--keep", type=Path, help="work in this new folder and keep it")
    args = parser.parse_args(argv)
    work = args.keep or Path(tempfile.mkdtemp(prefix="kills-"))
    work.mkdir(parents=True, exist_ok=True)
    alone, rows = {}, []
    print("mode     kills runs finished lost: median  max equal    alone   killed")
    for i, mode in enumerate(args.modes):
        n_ranks, rng = MODES[mode], random.Random(f"{args.seed} {mode}")
        if n_ranks not in alone:
            begin = time.perf_counter()
            if status := start(work, f"alone{n_ranks}", mode).wait(TOO_LONG):
                raise SystemExit(
                    f"undisturbed run: exit status {status}\n"
                    + (work / "output.txt").read_text()[-3000:]
                )
            alone[n_ranks] = time.perf_counter() - begin
        kills = args.kills // len(args.modes) + (i < args.kills % len(args.modes))
        lost, finished, runs, unlike, begin = [], 0, 0, [], time.perf_counter()
        while len(lost) < kills:
            # Moments over the start and a third of the run: most runs take several.
            more, status = killed_run(
                work, f"{mode}{runs}", mode, kills - len(lost), alone[n_ranks] / 2, rng
            )
            lost, runs, finished = lost + more, runs + 1, finished + (status == 0)
            unlike += (
                differences(work / f"alone{n_ranks}", work / f"{mode}{runs - 1}")
                if status == 0
                else [f"exit status {status}"]
            )
            if status:
                break
        row = {
            "mode": mode,
            "ranks": n_ranks,
            "kills": len(lost),
            "runs": runs,
            "finished": finished,
            "steps_lost": lost,
            "steps_lost_median": median(lost or [0]),
            "steps_lost_max": max(lost, default=0),
            "equal": not unlike,
            "differences": unlike,
            "seconds_undisturbed": round(alone[n_ranks], 1),
            "seconds_killed": round(time.perf_counter() - begin, 1),
        }
        rows.append(row)
        print(
            f"{mode:8s} {len(lost):5d} {runs:4d} {finished:8d} {row['steps_lost_median']:12g} "
            f"{row['steps_lost_max']:4d} {'yes' if not unlike else 'NO':>5s} "
            f"{row['seconds_undisturbed']:6.1f} s {row['seconds_killed']:6.1f} s",
            flush=True,
        )
        for line in unlike:
            print(f"  differs: {line}")
    if args.out:
        args.out.write_text(
            json.dumps(
                {
                    "machine": f"{platform.machine()}, {os.cpu_count()} cores, "
                    f"torch {torch.__version__}",
                    "command": " ".join(COMMAND),
                    "save_every": 5,
                    "seed": args.seed,
                    "rows": rows,
                },
                indent=1,
            )
            + "\n"
        )
    failed = any(not row["equal"] for row in rows)
    if failed:
        print(f"kept: {work}")
    elif args.keep is None:
        shutil.rmtree(work)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
