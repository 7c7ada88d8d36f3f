"""CrossTask and MiningYouTube, videos with an ordered list of steps -> store and OUT.steps.json.

List: CSV with header ``video_id,task`` (MiningYouTube: ``video_id``). Features: ``<id>_2d.npy``,
``<id>_3d.npy`` (T, dim), 3D also as ``features`` in ``<id>.npz``; audio: ``arr_0`` (40, frames) dB
in ``<id>.npz``. Annotation: ``<task>_<id>.npy`` (T, K) of 0 and 1, a row a second (MiningYouTube:
``<id>.npy``), or CrossTask's release, ``.csv`` with rows ``step,start,end`` (step from 1, s).
Steps: JSON {task: [texts in order]} (MiningYouTube: by video id), or CrossTask's
``tasks_primary.txt``.
"""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import numpy as np

from mcn_ext.data.files import write_text
from mcn_ext.prepare import SkipList, Skipped, in_order, require, skipped
from mcn_ext.prepare.captions import as_text
from mcn_ext.prepare.features import feature_files, load_array
from mcn_ext.prepare.howto100m import LABELS, convert_features, read_table

ONE_TASK = "all"  # of MiningYouTube's videos, which have none
MAX_SECONDS = 1_000_000

Segments = list[list[int]]  # [step from 0, first second, second after the last]


def read_steps(path: Path) -> dict[str, list[str]]:
    """{task or video id: step texts in order} of a ``.json`` or of ``tasks_primary.txt``;
    SystemExit for another file."""
    try:
        text = path.read_text(encoding="utf-8-sig", errors="replace")
        if path.suffix.lower() != ".json":
            return _release_steps(text)
        return {
            name.strip(): [as_text(step).strip() for step in steps]
            for name, steps in json.loads(text).items()
        }
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise SystemExit(
            f'--steps {path}: expected JSON like {{"23521": ["first step", "second step"]}}, in a '
            f"file ending in .json, or CrossTask's tasks_primary.txt ({error})"
        ) from error


def _release_steps(text: str) -> dict[str, list[str]]:
    """CrossTask's blocks: task, title, URL, number of steps, the steps with commas between them;
    an empty line between blocks."""
    tasks = {}
    for block in text.strip().replace("\r", "").split("\n\n"):
        lines = block.strip().split("\n")
        if len(lines) != 5:
            raise ValueError(f"{len(lines)} lines where a task has 5: {lines[0]!r}")
        task, _, _, count, steps = lines
        tasks[task.strip()] = [step.strip() for step in steps.split(",")]
        if int(count) != len(tasks[task.strip()]):
            raise ValueError(f"task {task} has {count} steps, not {steps!r}")
    return tasks


def read_annotation(folder: Path, stem: str, n_steps: int) -> tuple[int | None, Segments]:
    """(seconds, or None where the file does not say, segments by their start) of a video.

    Skipped where there is none, it is damaged, or its steps are not ``n_steps``.
    """
    matrix, rows = folder / f"{stem}.npy", folder / f"{stem}.csv"
    try:
        if matrix.is_file():
            seconds, segments = _from_matrix(matrix, n_steps)
        elif rows.is_file():
            seconds, segments = None, _from_rows(rows, n_steps)
        else:
            raise Skipped(f"no annotation {stem}.npy or .csv in {folder}")
    except (OSError, csv.Error) as error:
        raise skipped(stem[:99], error) from error
    return seconds, sorted(segments, key=lambda segment: (*segment[1:], segment[0]))


def _from_matrix(path: Path, n_steps: int) -> tuple[int, Segments]:
    inside = load_array(path, kinds="biuf")
    if inside.shape[1] != n_steps:
        raise Skipped(f"{path}: {inside.shape[1]} columns, its steps are {n_steps}")
    if len(inside) >= MAX_SECONDS or not np.isin(inside, (0, 1)).all():
        raise Skipped(f"{path}: expected 0 and 1, a row a second")
    # +1 where a run of ones begins, -1 one past its end: of a column they alternate.
    edges = np.diff(inside.T.astype(np.int8), axis=1, prepend=0, append=0)
    starts, ends = np.argwhere(edges == 1), np.argwhere(edges == -1)
    return len(inside), np.column_stack([starts, ends[:, 1]]).tolist()


def _from_rows(path: Path, n_steps: int) -> Segments:
    """Second t is inside where floor(start) <= t < ceil(end), as in CrossTask's own reader."""
    segments = []
    with open(path, newline="", encoding="utf-8-sig", errors="replace") as file:
        for number, row in enumerate(csv.reader(file), 1):
            if not row or (number == 1 and row[0].strip() == "step"):
                continue
            try:
                step, start, end = int(row[0]), float(row[1]), float(row[2])
                first, last = max(math.floor(start), 0), math.ceil(end)
            except (IndexError, ValueError, OverflowError) as error:
                raise Skipped(f"{path}: line {number} is not step,start,end ({error})") from error
            if not 1 <= step <= n_steps or last > MAX_SECONDS:
                raise Skipped(f"{path}: line {number}: step {step} of {n_steps}, to {last} s")
            if first < last:
                segments.append([step - 1, first, last])
    return segments


def prepare(
    list_file: Path,
    features: Path | None,
    features_audio: Path | None,
    annotations: Path,
    steps: Path,
    out: Path,
    *,
    kind: str,
    rate_2d: float,
    rate_3d: float,
    streams: list[str] = (),
    workers: int = 4,
    **options,
) -> str:
    """Convert; returns the summary that is printed. The module's first lines have the formats.

    Beside the store, ``out``'s name + ``.steps.json`` is written, complete or not at all::

        {"protocol": "crosstask", "source": "...", "videos": {id: {"task": "23521", "seconds": T,
         "steps": [text, ...], "segments": [[step, first second, second after the last], ...]}}}

    A video lasts as many seconds as its annotation has rows; release CSVs do not say, so there its
    2D rows do (without, its 3D rows, then those of ``streams``), and what is annotated beyond them
    is left out, as in CrossTask's code. Videos without an annotated second are skipped; those
    without usable features are not in the store, but in the table, where they count as misses.

    options: overwrite, shard_mib.
    """
    require("--annotations", annotations)
    # In one folder, <id>.npz is the sound.
    together = features and features_audio and features_audio.resolve() == features.resolve()
    bare = None if together else "3d"
    files = feature_files(features, features_audio, rate_2d, rate_3d, bare, streams)
    columns, skips = ["video_id", "task"] if kind == "crosstask" else ["video_id"], SkipList(out)
    example = ",".join(["GLd3aX16zBg", "23521"][: len(columns)])
    rows = read_table(list_file, columns, example, skips)
    texts, videos = read_steps(steps), {}

    def last_second(name: str, segments: Segments) -> int:
        for stream in files.values():
            try:
                if stream.modality == "video" and (found := stream.load(name)):
                    return math.ceil(len(found[1]) / stream.rate_hz)
            except Skipped:
                break  # reported when the features' turn comes
        return max((last for _, _, last in segments), default=0)

    def read(item: tuple[str, list[str]]) -> dict:
        name, (_, *task) = item
        key, stem = (task[0], f"{task[0]}_{name}") if task else (name, name)
        if not texts.get(key):
            raise Skipped(f"no steps of {'task ' if task else ''}{key} in {steps}")
        seconds, segments = read_annotation(annotations, stem, len(texts[key]))
        if seconds is None:
            seconds = last_second(name, segments)
        kept = [[k, first, min(last, seconds)] for k, first, last in segments if first < seconds]
        if not kept:
            raise Skipped(f"no step is annotated in its {seconds} s")
        task = task[0] if task else ONE_TASK
        return {"task": task, "seconds": seconds, "steps": texts[key], "segments": kept}

    for (name, _), video in in_order(read, rows, workers):
        if isinstance(video, Skipped):
            skips.add(name, video)
        else:
            videos[name] = video
    if not videos:
        raise SystemExit(
            f"--annotations {annotations}: of none of {list_file}'s {len(rows)} "
            f"videos; {skips.close()}"
        )

    def captions_of(name: str):
        video = videos[name]
        which, start, end = zip(*video["segments"], strict=True)
        return start, end, [video["steps"][step] for step in which]

    table = out.with_name(out.name + ".steps.json")
    source = f"{LABELS[kind]} steps from {annotations}"
    content = {"protocol": kind, "source": source, "videos": videos}
    summary = convert_features(
        {name: name for name in videos},
        files,
        captions_of,
        out,
        skips,
        kind=kind,
        settings={
            "list": str(list_file),
            "annotations": str(annotations),
            "steps": str(steps),
        },
        workers=workers,
        before_close=lambda: write_text(table, json.dumps(content) + "\n"),
        **options,
    )
    return f"{summary}; steps in {table}"
