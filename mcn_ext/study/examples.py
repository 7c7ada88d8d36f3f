"""Queries on which the orders disagree most, and what each order finds for them."""

from __future__ import annotations

import textwrap
from functools import cache
from pathlib import Path

import numpy as np

from mcn_ext.console import printable
from mcn_ext.data.store import Store, StoreError
from mcn_ext.study import geometry
from mcn_ext.study.statistics import Study

FOUND = 3  # clips shown of each order


def choose(study: Study) -> list[dict]:
    """For the best method of each order, and the best with one stage: the query at which it is
    furthest ahead of the others, by the mean log rank over the seeds that all have (1 before 10
    counts as much as 10 before 100).

    Entries have "caption", "clip" (its number in the store), "store", "seed", and "answers": for
    each method its "label" and, of that seed, the "rank" of the right clip and "found", the first
    FOUND clips as (number, caption).
    """
    methods = [m for m in (*study.best_by_order(), *study.baselines()[:1]) if study.ranks(m)]
    ranks = {method: study.ranks(method) for method in methods}
    seeds = sorted(set.intersection(*map(set, ranks.values()))) if ranks else []
    runs = {m: [run.final for run in study.of(m) if run.seed in seeds] for m in methods}
    stores = {run.metrics.get("data", "") for of in runs.values() for run in of}
    if len(methods) < 2 or len(stores) != 1:
        return []
    store = Path(stores.pop())
    try:
        captions = [printable(" ".join(text.split())) for text in Store(store).texts()]
    except (StoreError, OSError):
        return []
    if any(len(ranks[m][seed]) != len(captions) for m in methods for seed in seeds):
        return []
    means = np.stack([np.log([ranks[m][seed] for seed in seeds]).mean(axis=0) for m in methods])
    chosen: list[int] = []
    for i in range(len(methods)):
        lead = np.delete(means, i, axis=0).min(axis=0) - means[i]
        lead[chosen] = 0  # a query is shown once
        if lead.max() > 0:
            chosen.append(int(lead.argmax()))
    answers: list[list[dict]] = [[] for _ in chosen]
    for method in methods:  # one at a time: embeddings are large
        run = runs[method][0]
        rows = geometry.load(run.path / "youcook2.npz", run.args.get("similarity") != "dot")
        if len(rows) < 3 or len(rows["text"][0]) != len(captions):
            continue  # no embeddings of all modalities, or of another store
        for query, scores, of in zip(chosen, geometry.scores(rows, chosen), answers, strict=True):
            first = np.argsort(-scores, kind="stable")[:FOUND].tolist()
            answer = {"label": study.labels[method], "rank": ranks[method][seeds[0]][query]}
            of.append(answer | {"found": [(clip, captions[clip]) for clip in first]})
    same = {"store": store, "seed": seeds[0] if seeds else None}
    return [
        {"caption": captions[query], "clip": query, "answers": of} | same
        for query, of in zip(chosen, answers, strict=True)
        if of
    ]


def find(folder: Path, examples: list[dict]) -> dict[str, list[Path]]:
    """{clip id: its video files}; SystemExit where no file is named as a clip."""
    from mcn_ext.prepare.videos import find_media

    media = find_media(folder)
    ids = set(Store(examples[0]["store"]).ids()) if examples else set()
    # Clips "x" and "x#2" are of one video x: a file x may be the whole video.
    found = {
        name: files
        for name, files in media.items()
        if name in ids - {n.split("#")[0] for n in ids if "#" in n}
    }
    if not found:
        where = f" of {examples[0]['store']}" if examples else ""
        raise SystemExit(
            f"--media {folder}: none of its {len(media)} videos has an evaluation clip's id as its "
            f"name{where}"
        )
    return found


def draw(plt, examples: list[dict], media: dict[str, list[Path]]):
    """A row for each query: a frame of its own clip, and of the clip that each method finds first;
    green where that is right."""
    from mcn_ext.prepare.decode import frame_at

    store = Store(examples[0]["store"])
    ids = store.ids()

    @cache
    def frame(clip: int):
        _, begin, stop = store.caption_times(clip)
        return frame_at(media.get(ids[clip], []), float(begin[0] + stop[0]) / 2)

    shape = len(examples), 1 + len(examples[0]["answers"])
    size = (2.2 * shape[1], 1.9 * shape[0])
    figure, axes = plt.subplots(*shape, figsize=size, squeeze=False)
    for line, example in zip(axes, examples, strict=True):
        query = {"label": "query", "found": [(example["clip"], example["caption"])]}
        for axis, answer in zip(line, [query, *example["answers"]], strict=True):
            clip, caption = answer["found"][0]
            right = clip == example["clip"]
            axis.set(xticks=[], yticks=[])
            axis.grid(False)
            for spine in axis.spines.values():
                spine.set(visible=True, color="tab:green" if right else "tab:red", linewidth=2)
            if (picture := frame(clip)) is not None:
                axis.imshow(picture)
            else:
                axis.text(0.5, 0.5, "no video", ha="center", fontsize=8)
            text = "\n".join(textwrap.wrap(textwrap.shorten(caption, 70), 32))
            axis.set_xlabel(text, fontsize=7, parse_math=False)
            axis.set_title(answer["label"], fontsize=8)
    return figure
