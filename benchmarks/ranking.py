"""Ranking all clips against all: time and memory, in blocks and with the whole matrix.

    python benchmarks/ranking.py --n 100000 --d 256
    python benchmarks/ranking.py --n 20000 --d 256 --whole      # the usual way, for comparison

Embeddings are random, fp32, of text and video; the direction is text->video, and with --videos also
whole videos of 8 clips. Each run is a process of its own; peak memory is its largest resident size,
less what it had when the embeddings were there.
"""

import argparse
import json
import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402

from mcn_ext.evaluation import metrics, retrieval  # noqa: E402


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n", type=int, default=100_000)
    parser.add_argument("--d", type=int, default=256)
    parser.add_argument("--whole", action="store_true", help="one (n, n) matrix")
    parser.add_argument("--videos", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    text, noise = torch.randn(args.n, args.d), torch.randn(args.n, args.d)
    rows = {"text": text, "video": noise.mul_(2).add_(text)}  # hard, and not hopeless
    valid = {m: torch.ones(args.n, dtype=torch.bool) for m in rows}
    before, begun = peak_mib(), time.perf_counter()
    if args.whole:
        rank = metrics.ranks(retrieval.similarity((rows, valid), (rows, valid), "text->video"))
    else:
        scores = retrieval.Scores((rows, valid), "text->video")
        rank = scores.ranks()
    ranked = time.perf_counter()
    result = {
        "n": args.n,
        "d": args.d,
        "how": "whole" if args.whole else "blocks",
        "threads": torch.get_num_threads(),
        "seconds": round(ranked - begun, 1),
        "embeddings_mib": round(2 * args.n * args.d * 4 / 2**20),
        "more_mib": round(peak_mib() - before),
    }
    if args.videos and not args.whole:
        scores.video_ranks([str(i // 8) for i in range(args.n)])
        result["whole_videos_seconds"] = round(time.perf_counter() - ranked, 1)
        result["more_mib"] = round(peak_mib() - before)
    begun = time.perf_counter()
    summary = metrics.summarize(rank)
    result |= {
        "intervals_seconds": round(time.perf_counter() - begun, 1),
        "R@1": summary["R@1"],
        "MedR": summary["MedR"],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
