"""Clips ranked by BM25 of a caption and the words spoken in each clip: recall, time and memory.

    python benchmarks/words.py --speech train.json     # recall on real captions and speech
    python benchmarks/words.py                         # time and memory alone, 20 s on 2 cores

--speech: a list of {"video_id", "desc", "subtitle"}, as ``prepare youcook2 --speech`` reads; GRAM
(https://github.com/ispamm/GRAM) publishes one of YouCook2.
"""

import argparse
import json
import time
import tracemalloc
from pathlib import Path

import numpy as np
from common import QUICK, describe, save, show

from mcn_ext.evaluation.metrics import markdown, summarize, table_rows
from mcn_ext.evaluation.retrieval import WordScores, videos_of
from mcn_ext.evaluation.words import BM25


def within_video(scores: WordScores, videos: list[str]) -> tuple[np.ndarray, float]:
    """Rank of each clip among those of its video, and chance's R@1 in percent."""
    numbers = np.unique(videos, return_inverse=True)[1]
    rank, size = np.empty(len(videos)), np.bincount(numbers)[numbers]
    for queries, block in scores.blocks():
        for row, i in zip(block.numpy(), range(queries.start, queries.stop), strict=True):
            others = row[numbers == numbers[i]]
            rank[i] = 1 + (others > row[i]).sum() + ((others == row[i]).sum() - 1) / 2
    return rank, float(100 * np.mean(1 / size))


def recall(path: Path) -> dict:
    rows = json.loads(path.read_text(encoding="utf-8"))
    begun = time.perf_counter()
    scores = WordScores([row["desc"] for row in rows], [row["subtitle"] for row in rows])
    rank = scores.ranks()
    seconds = time.perf_counter() - begun
    inside, chance = within_video(scores, videos_of([row["video_id"] for row in rows]))
    result = {"all clips": summarize(rank), "clips of the same video": summarize(inside)}
    print(f"\n{path.name}, {seconds:.2f} s\n")
    print(markdown(*table_rows(result, len(rows), "among")))
    silent = sum(not row["subtitle"].strip() for row in rows)
    print(f"{silent} clips without a word; chance within a video: R@1 {chance:.1f} %")
    return result | {"n": len(rows), "silent": silent, "chance_within": chance, "s": seconds}


def cost(n_queries: int, n_documents: int) -> dict:
    """Words drawn by Zipf's law, 15 of each query and 60 of each document, as in YouCook2."""
    rng = np.random.default_rng(0)
    words = np.array([f"w{i}x" for i in range(20_000)])
    part = 1 / np.arange(1, len(words) + 1)

    def texts(n: int, length: int) -> list[str]:
        drawn = rng.choice(words, (n, length), p=part / part.sum())
        return [" ".join(row) for row in drawn]

    documents, queries = texts(n_documents, 60), texts(n_queries, 15)
    times, step = [], max(1, 2**24 // n_documents)
    for _ in range(3):
        begun = time.perf_counter()
        index = BM25(documents)
        made = time.perf_counter()
        for first in range(0, n_queries, step):  # in blocks, as evaluate.py does
            index.scores(queries[first : first + step])
        times.append((made - begun, time.perf_counter() - made))
    tracemalloc.start()
    index = BM25(documents)
    for first in range(0, n_queries, step):
        index.scores(queries[first : first + step])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    index_s, scores_s = np.median(times, axis=0)
    return {
        "documents": n_documents,
        "queries": n_queries,
        "index, s": float(index_s),
        "scores, s": float(scores_s),
        "peak, MiB": peak / 2**20,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--speech", type=Path, metavar="JSON")
    args = parser.parse_args()
    found = {"recall": recall(args.speech)} if args.speech else {}
    sizes = [(100, 100)] if QUICK else [(3000, 3000), (1000, 100_000)]
    found["cost"] = [cost(*size) for size in sizes]
    show("Time and memory", found["cost"])
    save("words", describe() | found)


if __name__ == "__main__":
    main()
