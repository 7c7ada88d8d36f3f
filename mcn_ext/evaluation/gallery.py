"""Which clips are ranked (--only), and results for others to read (--export, --export_mteb)."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from mcn_ext.data.store import Store
from mcn_ext.train.log import write_text

TOP = 10
# Tasks of MVEB (mteb 2): a prefix, the direction in letters, a suffix; and how many clips it ranks.
MTEB_DIRECTIONS = ("A2V", "AT2V", "T2V", "T2VA", "V2A", "V2T", "VA2T", "VT2A")
MTEB = {"youcook2": ("YouCook2", "Retrieval", 3104), "msrvtt": ("MSRVTT", "", 879)}


def choose(path: Path, store: Store, drop: bool) -> tuple[list[int], dict]:
    """Numbers in the store of the clips that a file lists, an id a line, and what tells this
    gallery from others. ``drop``: clips that are not in the store are left out, else misses.
    SystemExit for a file that is not such a list."""
    try:
        ids = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise SystemExit(
            f"--only {path}: cannot be read ({error}); expected an id a line"
        ) from None
    ids, number = [name for name in ids if name], {name: i for i, name in enumerate(store.ids())}
    if repeated := len(ids) - len(set(ids)):
        raise SystemExit(f"--only {path}: {repeated} ids are there more than once")
    chosen = sorted(number[name] for name in ids if name in number)
    if not chosen:
        raise SystemExit(
            f"--only {path}: none of its {len(ids)} ids, such as {next(iter(ids), None)}, is in "
            f"{store.path}, where ids are like {next(iter(number), None)}"
        )
    missing = [name for name in ids if name not in number]
    return chosen, {
        "file": str(path),
        "ids": len(ids),
        # Who has the same number has ranked the same clips.
        "sha256": hashlib.sha256("\n".join(sorted(ids)).encode()).hexdigest(),
        "missing": missing,
        "missing_are": "left out" if drop else "misses",
    }


def notice(gallery: Mapping) -> str:
    """A gallery in words, for the line above a table."""
    missing, text = gallery["missing"], f"gallery {gallery['file']} ({gallery['sha256'][:8]})"
    if missing:
        names = ", ".join(missing[:3]) + ", ..." * (len(missing) > 3)
        text += f", {len(missing)} of {gallery['ids']} not in the store ({names})"
        text += f": {gallery['missing_are']}"
    return text


def rows(
    name: str,
    ids: list[str],
    captions: list[str],
    ranks: Mapping[str, np.ndarray],
    best: Mapping[str, np.ndarray],
) -> list[list]:
    """Rows for :func:`table` of a set: each query of each direction, its rank, the best clips.

    ids, captions: of the clips, and ids of those that are misses behind them, without a caption.
    best: {direction: (clips, TOP) numbers of clips, -1 for none}.
    """
    found = []
    for direction, rank in ranks.items():
        for i, of in enumerate(rank):
            known = i < len(captions)
            top = [ids[k] if k >= 0 else "" for k in best[direction][i]] if known else [""] * TOP
            found.append([name, direction, ids[i], captions[i] if known else "", f"{of:g}", *top])
    return found


def table(found: list[list]) -> str:
    """Rows as CSV. Texts stay as they are, also those that a spreadsheet would take for a formula
    (ids of YouTube may begin with -): open it there as text."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["set", "direction", "id", "caption", "rank", *map(str, range(1, TOP + 1))])
    writer.writerows(found)
    return file.getvalue()


def write_mteb(folder: Path, name: str, ranks: Mapping[str, np.ndarray], data: str) -> str:
    """Write ``folder/FUSION/TASK.json`` for each direction that MTEB has, by the layout of its
    results (mteb 2, ``TaskResult``), and return what to know about them.

    Scores are fractions. A query has one right clip: nDCG@k is 1 / log2(1 + rank) and MAP@k is
    1 / rank where rank <= k, else 0. Rows with the words spoken are left out: MTEB's tasks have no
    speech.
    """
    prefix, suffix, theirs = MTEB[name]
    n = 0
    for label, rank in ranks.items():
        direction, _, fusion = label.rstrip(")").partition(" (")
        letters = "2".join(
            "".join(modality[0].upper() for modality in side.split("+"))
            for side in direction.split("->")
        )
        if "words" in label or letters not in MTEB_DIRECTIONS:
            continue
        n, scores = len(rank), {}
        for k in (1, 3, 5, 10, 20, 100, 1000):
            hit = rank <= k
            of = {
                "ndcg": hit / np.log2(1 + rank),
                "map": hit / rank,
                "mrr": hit / rank,
                "recall": hit,
                "hit_rate": hit,
                "precision": hit / k,
            }
            scores |= {f"{metric}_at_{k}": round(float(of[metric].mean()), 5) for metric in of}
        scores |= {"main_score": scores["ndcg_at_10"], "hf_subset": "default"}
        result = {
            "dataset_revision": f"{data}, {n} clips",
            "task_name": f"{prefix}{letters}{suffix}",
            "mteb_version": None,
            "scores": {"test": [scores | {"languages": ["eng-Latn"]}]},
            "evaluation_time": None,
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        file = folder / (fusion or "sum") / f"{result['task_name']}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(result, indent=2) + "\n")
    if not n:
        return f"{folder}: nothing written, MTEB has no task of these rows"
    return f"{folder}: comparable with MVEB's only on its {theirs} clips; here {n}"
