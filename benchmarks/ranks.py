"""One process and several: what a loss sends, and whether a run stays the same.

    python benchmarks/ranks.py            # both tables, benchmarks/results/ranks-cpu.json

Traffic: bytes through the loopback interface (Linux) while 2, 3 and 4 gloo ranks compute a loss and
its gradients. Curves: 50 steps of stage 1 (AV, demo data) on 4 ranks and on 1, largest relative
difference of a term; beside it 1 process with 2 threads instead of 1, whose sums round differently,
too; and the same in float64, where there is next to no rounding.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
import torch.distributed.nn

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from mcn_ext import distributed, ops  # noqa: E402
from mcn_ext.train.log import read  # noqa: E402

TERMS = ("total", "contrastive", "cluster", "reconstruction")
RUN = (
    "--pair AV --preset demo --device cpu --max_steps 50 --log_every 1 --batch_size 16 --n_pair "
    "4 --embd_dim 64 --recon_dim 32 --audio_width 0.0625 --audio_frames 200 --cluster_size 16 "
    "--queue_size 5"
).split()


def sent() -> int:
    """Bytes sent through the loopback interface since the machine started."""
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if "lo:" in line)
    return int(line.split(":")[1].split()[8])


def gather_both(x, y):
    """The usual way: gather both sides with gradients, and every rank computes everything."""
    both = [torch.cat(torch.distributed.nn.all_gather(side)) for side in (x, y)]
    return ops.contrastive_loss(*both)


def one_sided(x, y):
    return ops.contrastive_loss(x, y, group=distributed.default_group())


def traffic(n: int, d: int, repeats: int) -> None:
    """What every rank does; rank 0 prints {way: [MiB, seconds]} as JSON."""
    torch.set_num_threads(1)
    distributed.init("cpu")
    torch.manual_seed(distributed.rank())
    # The usual way needs equal parts.
    x, y = (torch.randn(n // distributed.world(), d) for _ in range(2))
    found = {}
    for way in (gather_both, one_sided):
        values = []
        for _ in range(repeats + 1):
            rows = [side.clone().requires_grad_() for side in (x, y)]
            time.sleep(0.1)
            distributed.barrier()
            before, begin = sent(), time.perf_counter()
            way(*rows).backward()
            distributed.barrier()
            values.append(((sent() - before) / 2**20, time.perf_counter() - begin))
            time.sleep(0.1)
        found[way.__name__] = [median(v) for v in zip(*values[1:], strict=True)]
    if distributed.rank() == 0:
        print(json.dumps(found))
    distributed.finish()


def launch(ranks: int, *command, threads: int = 1, cwd=None) -> str:
    words = [str(word) for word in command]
    if ranks > 1:
        words = [
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            str(ranks),
            *words,
        ]
    env = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *words], cwd=cwd, env=env, check=True, text=True, stdout=subprocess.PIPE
    ).stdout


def curves() -> list[dict]:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        launch(1, "-m", "mcn_ext.prepare", "demo", cwd=folder)
        for kind, script in (("fp32", "train_stage1.py"), ("float64", "tests/float64.py")):
            logs = {}
            for name, ranks, threads in (
                ("1 process", 1, 1),
                ("4 ranks", 4, 1),
                ("2 threads", 1, 2),
            ):
                out = f"{kind}-{name}".replace(" ", "-")
                launch(ranks, ROOT / script, *RUN, "--out", out, threads=threads, cwd=folder)
                logs[name] = read(Path(folder) / out / "log.jsonl")
            for name in ("4 ranks", "2 threads"):
                rows.append(
                    {"precision": kind, "against 1 process": name, "steps": 50}
                    | {
                        term: max(
                            abs(a[term] - b[term]) / max(abs(a[term]), 1e-12)
                            for a, b in zip(logs["1 process"], logs[name], strict=True)
                        )
                        for term in TERMS
                    }
                )
                print(f"{kind:8} {name:10}", *(f"{t} {rows[-1][t]:.1e}" for t in TERMS))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=4096, help="rows of all ranks (default 4096)")
    parser.add_argument("--width", type=int, default=512, help="their width (default 512)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return traffic(args.rows, args.width, args.repeats)
    table = []
    print(
        f"contrastive loss and gradients, N {args.rows}, D {args.width}, fp32, one thread a "
        f"rank, median of {args.repeats}"
    )
    for ranks in (2, 3, 4):
        out = launch(
            ranks,
            __file__,
            "--worker",
            "--rows",
            args.rows,
            "--width",
            args.width,
            "--repeats",
            args.repeats,
        )
        (theirs, slow), (ours, fast) = json.loads(out.splitlines()[-1]).values()
        table.append(
            {
                "ranks": ranks,
                "gather_both_mib": theirs,
                "ours_mib": ours,
                "gather_both_s": slow,
                "ours_s": fast,
            }
        )
        print(
            f"{ranks} ranks: gather both {theirs:.1f} MiB, {slow:.2f} s; ours {ours:.1f} MiB, "
            f"{fast:.2f} s; ratios {ours / theirs:.3f}, {fast / slow:.2f}"
        )
    result = {
        "torch": torch.__version__,
        "cores": os.cpu_count(),
        "n": args.rows,
        "d": args.width,
        "traffic": table,
        "curves": curves(),
    }
    path = ROOT / "benchmarks/results/ranks-cpu.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
