"""What a loss sends between processes: ours beside gathering both sides.

    python benchmarks/ranks.py            # a minute

Bytes through the loopback interface (Linux), and the time, while 2, 3 and 4 gloo ranks of one
thread compute the contrastive loss and its gradients: N 4096 over all ranks, D 512, fp32.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch
import torch.distributed.nn
from common import QUICK, describe, save, show

from mcn_ext import distributed, ops

N, D, REPEATS = (96, 16, 1) if QUICK else (4096, 512, 5)


def sent() -> int:
    """Bytes sent through the loopback interface since the machine started."""
    return int(Path("/proc/net/dev").read_text().split("lo:")[1].split()[8])


def gather_both(x, y):
    """The usual way: gather both sides with gradients, and every rank computes everything."""
    return ops.contrastive_loss(*(torch.cat(torch.distributed.nn.all_gather(s)) for s in (x, y)))


def one_sided(x, y):
    return ops.contrastive_loss(x, y, group=distributed.default_group())


def work() -> None:
    """What every rank does; rank 0 prints its row as JSON."""
    torch.set_num_threads(1)
    distributed.init("cpu")
    torch.manual_seed(distributed.rank())
    # The usual way needs equal parts.
    x, y = (torch.randn(N // distributed.world(), D) for _ in range(2))
    found = {"ranks": distributed.world()}
    for name, way in {"gather both": gather_both, "ours": one_sided}.items():
        values = []
        for _ in range(REPEATS + 1):
            rows = [side.clone().requires_grad_() for side in (x, y)]
            time.sleep(0.1)  # what the barrier sends is through
            distributed.barrier()
            before, begin = sent(), time.perf_counter()
            way(*rows).backward()
            distributed.barrier()
            values.append(((sent() - before) / 2**20, time.perf_counter() - begin))
            time.sleep(0.1)
        mib, seconds = (median(v) for v in zip(*values[1:], strict=True))
        found |= {f"{name}, MiB": mib, f"{name}, s": seconds}
    if distributed.rank() == 0:
        print(json.dumps(found))
    distributed.finish()


def main() -> None:
    if "--worker" in sys.argv:
        return work()
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    rows = []
    for ranks in (2, 3, 4):
        command = [*launch, str(ranks), __file__, "--worker"]
        done = subprocess.run(
            command, check=True, text=True, stdout=subprocess.PIPE, env=environment
        )
        row = json.loads(done.stdout.splitlines()[-1])
        rows.append(row | {"ratio": row["ours, s"] / row["gather both, s"]})
    show(f"N {N}, D {D}, median of {REPEATS}", rows)
    save("ranks", describe() | {"n": N, "d": D, "rows": rows})


if __name__ == "__main__":
    main()
