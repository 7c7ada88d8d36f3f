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

from mcn_ext.prepare import SkipList, Skipped
from mcn_ext.prepare.captions import as_text
from mcn_ext.prepare.howto100m import Features, convert, load_array, read_table
from mcn_ext.train.log import write_text

LABELS = {"crosstask": "CrossTask", "miningyoutube": "MiningYouTube"}
ONE_TASK = "all"  # of MiningYouTube's videos, which have none
MAX_SECONDS = 1_000_000

# ------------------------------------------------------------------------------ steps of a task


def read_steps(path: Path) -> dict[str, list[str]]:
    """{task or video id: step texts in order} of a ``.json`` or of ``tasks_primary.txt``;
    SystemExit for another file."""
    try:
        text = path.read_text(encoding="utf-8-sig", errors="replace")
    except OSError as error:
        raise SystemExit(f"--steps {path}: {error.strerror}") from error
    if path.suffix.lower() != ".json":
        return _release_steps(path, text.splitlines())
    try:
        table = json.loads(text)
        if not isinstance(table, dict) or not all(isinstance(v, list) for v in table.values()):
            raise ValueError("not lists of texts by name")
        return {
            name.strip(): [as_text(step).strip() for step in steps] for name, steps in table.items()
        }
    except (ValueError, RecursionError) as error:
        raise SystemExit(
            f'--steps {path}: expected JSON like {{"23521": ["first step", '
            f'"second step"]}} ({error})'
        ) from error


def _release_steps(path: Path, lines: list[str]) -> dict[str, list[str]]:
    """CrossTask's blocks of six lines: task, title, URL, number of steps, the steps with commas
    between them, and an empty one."""
    tasks = {}
    while lines and not lines[-1].strip():
        lines.pop()
    for i in range(0, len(lines), 6):
        block = [line.strip() for line in lines[i : i + 6]]
        try:
            steps = [step.strip() for step in block[4].split(",")]
            fits = int(block[3]) == len(steps) and not any(block[5:])
        except (IndexError, ValueError):
            fits = False
        if not fits:
            raise SystemExit(
                f"--steps {path}: lines {i + 1} to {i + 6} are not a task as in tasks_primary.txt: "
                "id, title, URL, number of steps, as many steps with commas between them, an empty "
                "line; other files must end in .json"
            )
        tasks[block[0]] = steps
    if not tasks:
        raise SystemExit(f"--steps {path}: lists no task")
    return tasks


# ----------------------------------------------------------------------------------- annotations

Segments = list[list[int]]  # [step from 0, first second, second after the last]


def read_annotation(folder: Path, stem: str, n_steps: int) -> tuple[int | None, Segments]:
    """(seconds, or None where the file does not say, segments by their start) of a video.

    Skipped where there is none, it is damaged, or its steps are not ``n_steps``.
    """
    try:
        if (path := folder / f"{stem}.npy").is_file():
            return _from_matrix(path, n_steps)
        if (path := folder / f"{stem}.csv").is_file():
            return None, _from_rows(path, n_steps)
    except (OSError, csv.Error) as error:
        raise Skipped(f"{stem[:99]}: {error}") from error
    raise Skipped(f"no annotation {stem}.npy or .csv in {folder}")


def _from_matrix(path: Path, n_steps: int) -> tuple[int, Segments]:
    inside = load_array(path, kinds="biuf")
    if inside.shape[1] != n_steps:
        raise Skipped(f"{path}: {inside.shape[1]} columns, its steps are {n_steps}")
    if len(inside) >= MAX_SECONDS or not np.isin(inside, (0, 1)).all():
        raise Skipped(f"{path}: expected 0 and 1, a row a second")
    # +1 where a run of ones begins, -1 one past its end: of a column they alternate.
    edges = np.diff(inside.T.astype(np.int8), axis=1, prepend=0, append=0)
    starts, ends = np.argwhere(edges == 1), np.argwhere(edges == -1)
    return len(inside), _sorted(
        [[int(k), int(start), int(end)] for (k, start), (_, end) in zip(starts, ends, strict=True)]
    )


def _from_rows(path: Path, n_steps: int) -> Segments:
    """Second t is inside where floor(start) <= t < ceil(end), as in CrossTask's own reader."""
    segments = []
    with open(path, newline="", encoding="utf-8-sig", errors="replace") as file:
        for number, row in enumerate(csv.reader(file), 1):
            if not row or (number == 1 and row[0].strip() == "step"):
                continue
            try:
                step, start, end = int(row[0]), float(row[1]), float(row[2])
                if not max(abs(start), abs(end)) < MAX_SECONDS:
                    raise ValueError("no time in seconds")
            except (IndexError, ValueError, OverflowError) as error:
                raise Skipped(f"{path}: line {number} is not step,start,end ({error})") from error
            if not 1 <= step <= n_steps:
                raise Skipped(f"{path}: line {number}: step {step} of {n_steps}")
            first, last = max(math.floor(start), 0), math.ceil(end)
            if first < last:
                segments.append([step - 1, first, last])
    return _sorted(segments)


def _sorted(segments: Segments) -> Segments:
    return sorted(segments, key=lambda segment: (segment[1], segment[2], segment[0]))


# ------------------------------------------------------------------------------------------ store


def prepare(
    list_file: Path,
    features: Path,
    features_audio: Path | None,
    annotations: Path,
    steps_file: Path,
    out: Path,
    *,
    protocol: str,
    rates: dict[str, float],
    workers: int = 4,
    overwrite: bool = False,
    shard_mib: float = 512,
) -> str:
    """Convert; returns the summary that is printed. The module's first lines have the formats.

    Beside the store, ``out``'s name + ``.steps.json`` is written, complete or not at all::

        {"protocol": "crosstask", "source": "...", "videos": {id: {"task": "23521", "seconds": T,
         "steps": [text, ...], "segments": [[step, first second, second after the last], ...]}}}

    A video lasts as many seconds as its annotation has rows; release CSVs do not say, so there its
    2D rows do (its 3D rows where there are no 2D ones), and what is annotated beyond them is left
    out, as in CrossTask's code. Videos without an annotated second are skipped; those without
    usable features are not in the store, but in the table, where they count as misses.
    """
    for flag, path in (
        ("--list", list_file),
        ("--annotations", annotations),
        ("--steps", steps_file),
    ):
        if not path.exists():
            raise SystemExit(f"{flag} {path}: no such file or folder")
    folders = Features(
        features, features_audio, bare=["3d"], keys={"3d": ["features"], "mel": ["arr_0"]}
    )
    by_task = protocol == "crosstask"
    rows = (
        read_table(list_file, ["video_id", "task"], "GLd3aX16zBg,23521")
        if by_task
        else read_table(list_file, ["video_id"], "GLd3aX16zBg")
    )
    texts, skips = read_steps(steps_file), SkipList(out)
    videos: dict[str, tuple[str, int | None, Segments]] = {}
    for name, *task in rows:
        task, name = task[0] if by_task else ONE_TASK, name.rsplit("/", 1)[-1]
        key = task if by_task else name
        try:
            if name in videos:
                raise Skipped(f"twice in {list_file}")
            if not texts.get(key):
                raise Skipped(f"no steps of {'task ' * by_task}{key} in {steps_file}")
            stem = f"{task}_{name}" if by_task else name
            videos[name] = task, *read_annotation(annotations, stem, len(texts[key]))
        except Skipped as reason:
            skips.add(name, str(reason))
    if not videos:
        raise SystemExit(
            f"--annotations {annotations}: of none of {list_file}'s {len(rows)} "
            f"videos; {skips.close()}"
        )

    def annotated(name: str, n_rows: dict[str, int] | None) -> dict:
        task, seconds, segments = videos[name]
        if seconds is None and n_rows is None:
            seconds = max((last for _, _, last in segments), default=0)
        elif seconds is None:
            stream = "2d" if "2d" in n_rows else "3d"
            seconds = math.ceil(n_rows[stream] / rates[stream])
        return {
            "task": task,
            "seconds": seconds,
            "steps": texts[task if by_task else name],
            "segments": [
                [step, first, min(last, seconds)]
                for step, first, last in segments
                if first < seconds
            ],
        }

    def said(name: str, arrays: dict):
        video = annotated(name, {s: len(array) for s, array in arrays.items() if array is not None})
        if not video["segments"]:
            raise Skipped(f"no step is annotated in its {video['seconds']} s")
        return (
            [first for _, first, _ in video["segments"]],
            [last for _, _, last in video["segments"]],
            [video["steps"][step] for step, _, _ in video["segments"]],
        )

    table = out.with_name(out.name + ".steps.json")

    def write_table(n_rows: dict[str, dict[str, int]]) -> None:
        kept = {name: annotated(name, n_rows.get(name)) for name in videos}
        kept = {name: video for name, video in kept.items() if video["segments"]}
        write_text(
            table,
            json.dumps(
                {
                    "protocol": protocol,
                    "source": f"{LABELS[protocol]} steps from {annotations}",
                    "videos": kept,
                }
            )
            + "\n",
        )

    summary = convert(
        list(videos),
        folders,
        said,
        out,
        kind=protocol,
        label=LABELS[protocol],
        rates=rates,
        workers=workers,
        overwrite=overwrite,
        shard_mib=shard_mib,
        skips=skips,
        before_close=write_table,
        settings={
            "list": str(list_file),
            "annotations": str(annotations),
            "steps": str(steps_file),
        },
    )
    return f"{summary}; steps in {table}"
