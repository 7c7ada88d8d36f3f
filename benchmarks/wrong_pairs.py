"""Is the share of pairs that do not belong together found? Against a known truth.

    python benchmarks/wrong_pairs.py STORE.h5 [flags of train_stage1.py, such as --min_time 0.5]

In each pair of modalities 0, 10, 30 and 50 % of the clips get the second modality of another clip,
drawn from all videos; `python -m mcn_ext.study --predict` estimates the share. Also the area under
the ROC curve with which its p-values tell the swapped clips from the others. Three draws.
"""

import sys
from pathlib import Path

import numpy as np
from common import describe, now, save, show

from mcn_ext.study.plan import stage_args
from mcn_ext.study.predict import THIRD, p_values, sample, wrong_share

SHARES, SEEDS = (0.0, 0.1, 0.3, 0.5), range(3)


def area(wrong: np.ndarray, right: np.ndarray) -> float:
    """Chance that a wrong pair's p is above a right one's; ties count by half."""
    right = np.sort(right)
    below = [np.searchsorted(right, wrong, side=side).sum() for side in ("left", "right")]
    return sum(below) / (2 * len(right) * max(1, len(wrong)))


def main(path: str, *words: str):
    begin = now()
    features, usable, video = sample(stage_args(1, [*words, "--data", path]), Path(path))
    seconds, rows = (now() - begin) / 1000, []
    for pair in THIRD:
        there = usable[pair[0]] & usable[pair[1]]
        x, y = features[pair[0]][there], features[pair[1]][there]
        for share in SHARES:
            found, areas = [], []
            for seed in SEEDS:
                rng = np.random.default_rng(seed)
                swapped = rng.choice(len(x), int(share * len(x)), replace=False)
                other = y.copy()
                other[swapped] = y[np.roll(swapped, 1)]
                p = p_values(x, other, video[there])
                found.append(100 * wrong_share(p))
                wrong = np.isin(np.arange(len(x)), swapped)
                areas.append(area(p[wrong], p[~wrong]))
            row = {"pair": pair, "clips": len(x), "swapped %": 100 * share}
            rows.append(row | {"found %": float(np.mean(found))})
            rows[-1]["area"] = float(np.mean(areas)) if share else None
    name = f"wrong-pairs-{Path(path).parent.name}"
    save(name, describe() | {"store": Path(path).name, "flags": words, "rows": rows})
    show(f"{path}, {len(video)} clips read in {seconds:.1f} s", rows)


if __name__ == "__main__":
    main(*sys.argv[1:])
