"""What a GPU must hold for one training step, without one: by shapes (benchmarks/shapes.py).

    python benchmarks/memory.py                                  # the published sizes, a table
    python benchmarks/memory.py --pair AVT --clips 2048 --checkpoint_activations

The training code runs as it is, on tensors that have no numbers; every tensor that the device would
hold is counted, with what the compiled losses take inside, and the operators that it is given, with
the bytes that they read and write. Not counted: CUDA's own context (some 0.5 GiB), cuDNN's
workspaces, and what the caching allocator cannot use again.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from shapes import pretend  # noqa: E402

import train_stage1  # noqa: E402
from mcn_ext import batchnorm  # noqa: E402
from mcn_ext.data.batch import to_device  # noqa: E402
from mcn_ext.evaluation.metrics import markdown  # noqa: E402
from mcn_ext.modalities import BY_NAME, MODALITIES  # noqa: E402
from mcn_ext.model import MCN  # noqa: E402
from mcn_ext.objective import Objective  # noqa: E402
from mcn_ext.train.guard import Guard  # noqa: E402

DEVICE = torch.device("cuda")
# (stage 1's pair, added in stage 2, clips on the GPU, clips of all GPUs, --checkpoint_activations)
PAPER = [
    ("AV", "", 1024, 4096, False),
    ("AV", "", 2048, 4096, False),
    ("AV", "", 4096, 4096, False),
    ("AV", "", 4096, 4096, True),
    ("AV", "", 16384, 16384, True),
    ("VT", "", 4096, 4096, False),
    ("AVT", "", 4096, 4096, False),
    ("AV", "T", 4096, 4096, False),
    ("VT", "A", 4096, 4096, False),
]


def clips(args, n: int, short: float, words: int) -> dict:
    """What the loader hands over for n clips, of full length but for a share of ``short``."""
    lengths = torch.full((n,), args.audio_frames)
    some = torch.arange(n) < short * n
    lengths[some] = torch.randint(args.audio_frames // 2, args.audio_frames, (int(some.sum()),))
    sound = torch.empty(n, args.audio_frames, 40, dtype=torch.float16)
    batch = {
        "audio": sound.transpose(1, 2),
        "n_frames": lengths,
        "words": torch.zeros(n, 20, dtype=torch.int64).random_(words),
        "clip_id": torch.arange(n),
        "caption_id": torch.arange(n),
    }
    batch |= {f"video.{name}": torch.empty(n, 2048, dtype=torch.float16) for name in ("2d", "3d")}
    batch |= {f"valid.{name}": torch.ones(n, dtype=torch.bool) for name in BY_NAME}
    return {name: x.pin_memory() for name, x in batch.items()}


def arguments(preset: str = "paper", **changed) -> argparse.Namespace:
    """A training run's flags: their defaults, the preset's and what is changed."""
    args = train_stage1.get_parser().parse_args(["--pair", "AVT"])
    sizes = train_stage1.DEMO if preset == "demo" else {}
    return argparse.Namespace(**(vars(args) | sizes | changed))


def measure(
    args, pair: str, added: str, n: int, everywhere: int, checkpoint: bool, short: float = 0.0
) -> dict:
    """GiB at the peak of a step, and of what stays from step to step. Fewer clips here than
    everywhere: as one of several ranks, but for what they send each other."""
    ranks = SimpleNamespace(world=lambda: everywhere // n, stack=lambda x: x[None])
    with (
        tempfile.TemporaryDirectory() as folder,
        patch.object(batchnorm, "distributed", ranks),
        pretend(allowed_waits=10**9) as gpu,
    ):
        host, held = clips(args, n, short, 1000), gpu.held
        table = torch.zeros(1000, 300).to(DEVICE)
        model = MCN(
            pair + added,
            embd_dim=args.embd_dim,
            recon_dim=args.recon_dim,
            audio_width=args.audio_width,
            checkpoint_activations=checkpoint,
        ).to(DEVICE)
        if added:
            model.freeze(MODALITIES[letter].name for letter in pair)
        model.train()
        objective = Objective(
            model.modalities,
            [MODALITIES[letter].name for letter in added or pair],
            temperature=args.temperature,
            similarity=args.similarity,
            recon_weight=args.recon_weight,
            cluster_size=args.cluster_size,
            queue_size=args.queue_size,
        )
        clusters = objective.clusters
        clusters.centroids = torch.zeros(args.cluster_size, args.embd_dim, device=DEVICE)
        clusters.queue = [
            torch.zeros(everywhere, args.embd_dim, device=DEVICE) for _ in range(args.queue_size)
        ]
        queue = sum(rows.nbytes for rows in clusters.queue)
        learning = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(learning, lr=args.lr, fused=True)
        scaler = torch.amp.GradScaler("cuda", enabled=False)
        guard = Guard(model, objective, scaler, Path(folder))

        gpu.waits, gpu.allowed = 0, 2
        for _ in range(2):  # the first makes gradients and Adam's moments
            guard.remember()
            batch = to_device(host, DEVICE, table)
            before, held.peak = held.live, held.live
            gpu.operators = gpu.moved = 0
            with torch.autocast("cuda", dtype=torch.bfloat16):
                embeddings, errors = model(batch)
            terms = objective(embeddings, errors, batch)
            optimizer.zero_grad(set_to_none=True)
            terms.total.backward()
            norm = torch.nn.utils.get_total_norm([p.grad for p in learning])
            if guard.check(terms.total, norm)[0]:
                raise AssertionError("a step that counts was expected")
            optimizer.step()
            objective.update_clusters(terms)
        gib = 2**30
        return {
            "pair": pair,
            "added": added,
            "clips": n,
            "clips of all GPUs": everywhere,
            "checkpoint_activations": checkpoint,
            "short": short,
            "peak_gib": held.peak / gib,
            "weights_gib": sum(
                4 * x.numel() for x in (*model.parameters(), *(3 * [p for p in learning]))
            )
            / gib,
            "queue_gib": queue / gib,
            "before_gib": before / gib,
            "waits": gpu.waits / 2,
            "operators": gpu.operators,
            "moved_gb": gpu.moved / 1e9,
        }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pair", default=None, help="AV, VT, AT or AVT; default: the table")
    parser.add_argument("--add", default="", help="the modality that a second stage adds")
    parser.add_argument("--clips", type=int, default=4096, help="on the GPU")
    parser.add_argument("--all_clips", type=int, default=None, help="on all GPUs (--clips)")
    parser.add_argument("--checkpoint_activations", action="store_true")
    parser.add_argument("--out", type=Path, help="a JSON file")
    parser.add_argument(
        "--short",
        type=float,
        default=0.0,
        help="share of clips that are shorter, half to all of the length",
    )
    own = parser.parse_args()
    args = arguments()
    cases = [(own.pair, own.add, own.clips, own.all_clips or own.clips, own.checkpoint_activations)]
    rows, body = [], []
    for case in cases if own.pair else PAPER:
        row = measure(args, *case, own.short)
        rows.append(row)
        body.append(
            [
                f"{row['pair']}{', then ' + row['added'] if row['added'] else ''}",
                f"{row['clips']:,}",
                f"{row['clips of all GPUs']:,}",
                "yes" if row["checkpoint_activations"] else "-",
                *(f"{row[name]:.1f}" for name in ("peak_gib", "weights_gib", "queue_gib")),
                f"{row['operators']:,}",
                f"{row['moved_gb']:.0f}",
            ]
        )
        print(body[-1], file=sys.stderr, flush=True)
    header = [
        "stage",
        "clips on the GPU",
        "of all GPUs",
        "`--checkpoint_activations`",
        "GiB at the peak",
        "weights, gradients, Adam",
        "queue",
        "operators",
        "GB moved",
    ]
    print(markdown(header, body))
    if own.out:
        commit = subprocess.run(
            ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
        ).stdout.strip()
        own.out.write_text(
            json.dumps(
                {
                    "command": " ".join(sys.argv),
                    "torch": torch.__version__,
                    "commit": commit,
                    "rows": rows,
                },
                indent=1,
            )
            + "\n"
        )


if __name__ == "__main__":
    main()
