"""Queries of a study and what each order finds: one that all answer, one that some, one none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from mcn_ext.data.store import Store, StoreError
from mcn_ext.study.page import Bold, Code, Page, Text
from mcn_ext.study.runs import MAIN, Run, Study


def store_of(study: Study) -> Store | None:
    """The first cell's evaluation store, None where it is gone."""
    named = Path(study.cells[0].get("youcook2") or "")
    for path in (named, study.root / named):
        if path.is_file() or any(path.glob("shard-*.h5")):
            try:
                return Store(path)
            except StoreError:
                continue
    return None


def captions_of(study: Study) -> tuple[list[str], list[str]]:
    """(ids, captions) of the evaluation clips; empty where the store is gone."""
    store = store_of(study)
    if store is None:
        return [], []
    return store.ids(), [(store.caption_texts(i) or [""])[0] for i in range(len(store))]


def top(run: Run, queries: list[int], k: int = 3) -> list[list[int]]:
    """Of each query the first k clips of text->video+audio, as evaluate.py ranks them."""
    e = run.final.embeddings()
    if not {"text", "video", "audio"} <= e.keys():
        return []
    clips = torch.cat([torch.nan_to_num(e["video"]), torch.nan_to_num(e["audio"])], dim=1)
    scores = torch.cat([e["text"][queries]] * 2, dim=1).nan_to_num() @ clips.T
    nothing = (e["video"].isnan() & e["audio"].isnan()).all(dim=1)
    return scores.masked_fill(nothing, -torch.inf).topk(min(k, len(clips))).indices.tolist()


def pick(ranks: list[np.ndarray]) -> list[tuple[str, int | None]]:
    """The queries to show, of ranks (queries,) of each method: the one whose worst rank is best,
    the one on which they differ most, the one whose best rank is worst. "Find": among the first
    ten. None where there is none."""
    table = np.stack(ranks)
    best, worst = table.min(axis=0), table.max(axis=0)
    some = np.where((best <= 3) & (worst > 10), worst / best, 0)
    return [
        ("All find it", int(worst.argmin()) if worst.min() <= 10 else None),
        ("Only some find it", int(some.argmax()) if some.max() > 0 else None),
        ("None finds it", int(best.argmax()) if best.max() > 10 else None),
    ]


def add(page: Page, study: Study) -> None:
    """The section of the report."""
    page.heading("Examples")
    methods = study.by_order() + study.baselines()[:1]
    ids, captions = captions_of(study)
    runs = [study.of(m)[0] for m in methods]
    runs = [r for r in runs if len(r.final.ranks.get(MAIN, ())) == len(captions) > 0]
    if not runs:
        page.paragraph("The evaluation store or the saved ranks are not here.")
        return
    page.paragraph(
        f"A caption is the query; the first three of {len(ids)} clips each order finds, "
        "by video and audio together. Clips are shown by their captions, which the "
        "search does not see. ",
        Bold("✓"),
        " marks the right one.",
    )
    picked = pick([r.final.ranks[MAIN] for r in runs])
    queries = [q for _, q in picked if q is not None]
    found = {r.method: dict(zip(queries, top(r, queries), strict=False)) for r in runs}
    for title, query in picked:
        page.heading(title, level=3)
        if query is None:
            page.paragraph("There is no such query.")
            continue
        page.paragraph("Query: ", Bold(captions[query]), " (", Code(ids[query]), ")")
        rows = []
        for r in runs:
            clips = [_clip(ids[c], captions[c], c == query) for c in found[r.method].get(query, [])]
            rows.append(
                [
                    f"{r.label}, seed {r.seed}",
                    f"{r.final.ranks[MAIN][query]:g}",
                    *clips,
                    *[""] * (3 - len(clips)),
                ]
            )
        page.table(["method", "rank", "first", "second", "third"], rows, words=True)


def _clip(name: str, caption: str, right: bool) -> Text:
    return (Bold("✓ " + caption) if right else caption, " ", Code(name))
