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
    furthest ahead of the others, by the mean log rank over seeds. Entries have "caption", "clip"
    (its number in the store), "store", and "answers", for each method its "label", "rank" of the
    right clip and "found", the first FOUND clips as (number, caption), both of the lowest seed."""
    methods = [*study.best_by_order(), *study.baselines()[:1]]
    runs = {method: study.of(method)[0].final for method in methods}
    ranks = {method: list(study.ranks(method).values()) for method in methods}
    rows = {method: geometry.load(run.path / "youcook2.npz") for method, run in runs.items()}
    methods = [m for m in methods if len(rows[m]) == 3 and ranks[m]]
    stores = {runs[method].metrics.get("data", "") for method in methods}
    if len(methods) < 2 or len(stores) > 1:
        return []
    (store,) = stores
    try:
        captions = list(Store(Path(store)).texts())
    except (StoreError, OSError):
        return []
    # With several captions a clip a query's clip is not its number.
    if any(of.shape != (len(captions),) for m in methods for of in (*ranks[m], rows[m]["text"][1])):
        return []
    means = np.stack([np.log(ranks[method]).mean(axis=0) for method in methods])
    chosen: list[int] = []
    for i in range(len(methods)):
        lead = np.delete(means, i, axis=0).min(axis=0) - means[i]
        lead[chosen] = -np.inf
        chosen.append(int(lead.argmax()))
    scores = {method: geometry.scores(rows[method]) for method in methods}
    examples = []
    for query in chosen:
        answers = []
        for method in methods:
            first = np.argsort(-scores[method][query], kind="stable")[:FOUND].tolist()
            answer = {"label": study.labels[method], "rank": ranks[method][0][query]}
            answers.append(answer | {"found": [(clip, captions[clip]) for clip in first]})
        example = {"caption": captions[query], "clip": query, "store": store}
        examples.append(example | {"answers": answers})
    return examples


def find(folder: Path, store: Path) -> dict[str, list[Path]]:
    """{clip id: its video files}; SystemExit where no file is named as a clip of the store."""
    from mcn_ext.prepare.videos import find_media

    media, ids = find_media(folder), Store(store).ids()
    if not media.keys() & set(ids):
        raise SystemExit(
            f"--media {folder}: none of its {len(media)} videos is named as a clip of {store}, "
            f"such as {ids[0] if ids else ''}.mp4"
        )
    return media


def draw(plt, examples: list[dict], media: dict[str, list[Path]]):
    """A row for each query: a frame of its own clip, and of the clip that each method finds first;
    green where that is right."""
    from mcn_ext.prepare.decode import frame_at

    store = Store(Path(examples[0]["store"]))
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
            text = "\n".join(textwrap.wrap(textwrap.shorten(printable(caption), 70), 32))
            axis.set_xlabel(text, fontsize=7, parse_math=False)
            axis.set_title(answer["label"], fontsize=8)
    return figure
