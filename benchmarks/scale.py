"""HowTo100M on paper: what a step and an epoch ask of disk, network, memory and GPUs.

    python benchmarks/scale.py [--videos 1200000] [--cpu_us 244]

Arithmetic, from counted FLOPs (of the encoders' code, by torch's counter) and the formulas below.
A GPU's time is FLOPs / (peak * share): peaks are the vendors' dense bf16 numbers, of k-means those
of fp32; the shares are assumptions that are printed beside it. Nothing here was measured on a GPU.
--cpu_us is the CPU time of a clip from the store to a batch (benchmarks/loader.py).
"""

import argparse
import math
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from mcn_ext.evaluation.metrics import markdown  # noqa: E402
from mcn_ext.study import plan as study  # noqa: E402
from mcn_ext.train import flags  # noqa: E402

DIMS = {"2d": 2048, "3d": 2048}
SECONDS = 390  # of a video
BYTES = {"2d": 2048 * 2 * 1.0, "3d": 2048 * 2 * 1.5, "mel": 40 * 2 * 100.0}  # a second, fp16
PEAK = {"A100": 312e12, "H200": 989e12}
FP32 = {"A100": 19.5e12, "H200": 67e12}  # without tensor cores, as k-means has it
MACHINES = (("A100", 4), ("H200", 8), ("H200", 64))
BATCHES = (4096, 16_384, 65_536, 262_144, 1_048_576)
D, K, QUEUE, REFIT, CLIP_SECONDS, PER_VIDEO = 6144, 256, 20, 20, 10, 32
ROUNDS = 20  # of a refit, at most


def losses(n: int, pairs: int = 1) -> float:
    """FLOPs of contrastive loss and gradients: similarities, and two products for the gradients;
    streamed, the similarities once more."""
    return pairs * (2 + 2 + 2 * 2) * n * n * D


def refit(n: int) -> float:
    """FLOPs of a k-means refit on the queue: a product with the centroids every round."""
    return ROUNDS * 2 * QUEUE * n * K * D


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--videos", type=int, default=1_200_000)
    parser.add_argument("--cpu_us", type=float, default=244)
    parser.add_argument("--share", type=float, default=0.3, help="of the peak, assumed")
    parser.add_argument("--fp32_share", type=float, default=0.6, help="the same of k-means")
    args = parser.parse_args()
    paper = argparse.Namespace(**flags.PRESETS["paper"])
    encoders = study.training_flops(paper, DIMS, "AV")
    clip = sum(BYTES.values()) * (CLIP_SECONDS + 1)
    store = args.videos * SECONDS * sum(BYTES.values())
    print(
        f"stage 1, AV: {encoders / 1e9:.1f} GFLOP a clip of {CLIP_SECONDS} s, forward and "
        f"backward; a store of {args.videos:,} videos of {SECONDS} s: {store / 1e12:.1f} TB; a "
        f"clip reads {clip / 1e6:.2f} MB\n"
    )
    body = []
    for n in BATCHES:
        body.append(
            [
                f"{n:,}",
                f"{n * encoders / 1e12:.0f}",
                f"{losses(n) / 1e12:.1f}",
                f"{refit(n) / REFIT / 1e12:.1f}",
                f"{n * clip / 1e9:.1f}",
                f"{n * D * 4 / 2**30:.2f}",
                f"{QUEUE * n * D * 4 / 2**30:.1f}",
                f"{n * n * 4 / 2**30:.1f}",
            ]
        )
    print(
        markdown(
            [
                "clips a step",
                "encoders, TFLOP",
                "losses of a pair, TFLOP",
                "k-means a step, TFLOP",
                "read, GB",
                "rows of a modality, GiB",
                "queue, GiB",
                "N x N in fp32, GiB (never held)",
            ],
            body,
        ),
        "\n",
    )
    steps, body = args.videos // (4096 // PER_VIDEO), []
    for gpu, count in MACHINES:
        work = 4096 * encoders + losses(4096)
        kmeans = refit(4096) / REFIT / (FP32[gpu] * args.fp32_share * count)
        step = work / (PEAK[gpu] * args.share * count) + kmeans
        body.append(
            [
                f"{count} x {gpu}",
                f"{step:.3f}",
                f"{100 * kmeans / step:.1f}",
                f"{steps * step / 3600:.2f}",
                f"{4096 / step:,.0f}",
                f"{4096 * clip / step / 1e9:.1f}",
                f"{math.ceil(4096 / step * args.cpu_us / 1e6)}",
                f"{4096 * D * 4 * (count - 1) / count * 2 / 2**20:.0f}",
            ]
        )
    print(
        markdown(
            [
                f"4,096 clips, {100 * args.share:.0f} % of the peak, k-means "
                f"{100 * args.fp32_share:.0f} % of fp32's (assumed)",
                "s a step",
                "of which k-means, %",
                f"h an epoch of {steps:,} steps",
                "clips a second",
                "read, GB/s",
                "cores that read",
                "MiB a rank receives for a pair",
            ],
            body,
        )
    )


if __name__ == "__main__":
    main()
