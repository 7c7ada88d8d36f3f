"""HowTo100M feature folders, as the field has them -> store.

List: CSV with header ``path``, rows ``topic/subtopic/VIDEOID``. Features: ``<path>/<id>_2d.npz``
and its variants, key ``features`` or ``arr_0``, (T, dim). Audio: ``<path>/<id>_spec.npz``, key
``arr_0``, (40, frames) dB. Captions: :mod:`mcn_ext.prepare.captions`.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path

from mcn_ext.console import printable
from mcn_ext.data.store_writer import StoreWriter, mend
from mcn_ext.prepare import SkipList, convert, require
from mcn_ext.prepare.captions import Captions
from mcn_ext.prepare.features import Files, feature_files, find_specs, ids, load_rows

LABELS = {"howto100m": "HowTo100M", "crosstask": "CrossTask", "miningyoutube": "MiningYouTube"}


def read_table(
    path: Path, columns: Sequence[str], example: str, skips: SkipList
) -> list[tuple[str, list[str]]]:
    """(video id, values of ``columns``) of a --list's rows. Rows without an id are put on
    ``skips``, as are those whose id was there. SystemExit for a file without these columns."""
    try:
        with open(path, newline="", encoding="utf-8-sig", errors="replace") as file:
            reader = csv.DictReader(file)
            if not set(columns) <= set(reader.fieldnames or []):
                raise SystemExit(
                    f"--list {path}: its first line {str(reader.fieldnames)[:200]} has no column "
                    f"{' or '.join(columns)}; expected a CSV with the header "
                    f"'{','.join(columns)}' and rows like {example}"
                )
            rows = [[mend(row[c] or "").strip() for c in columns] for row in reader]
    except (OSError, csv.Error) as error:
        raise SystemExit(f"--list {path}: not a CSV file ({error})") from error
    videos = {}
    for number, row in enumerate(rows, 1):
        row[0] = row[0].removeprefix("None/").strip("/")
        name = row[0].rsplit("/", 1)[-1]
        if not name:
            skips.add("", f"no {columns[0]} in row {number} of {path}")
        elif name in videos:
            skips.add(name, f"twice in {path}")
        else:
            videos[name] = row
    if not videos:
        raise SystemExit(f"--list {path}: lists no video")
    return list(videos.items())


def convert_features(
    paths: dict[str, str],
    streams: dict[str, Files],
    captions_of: Callable,
    out: Path,
    skips: SkipList,
    *,
    kind: str,
    settings: dict,
    workers: int = 4,
    before_close: Callable = lambda: None,
    **options,
) -> str:
    """Features {id: path as in the list} and captions -> store; returns the summary.

    captions_of: id -> (start, end, text), or raises Skipped. kind: the command's name. skips: what
    was left out so far. before_close: see :func:`.convert`. options: overwrite, shard_mib.
    """
    specs = find_specs(streams, list(paths.values()), kind)
    folders = {name: str(files.folder) for name, files in streams.items()}
    if not specs.keys() - {"mel"}:
        name = next(iter(paths.values())).rsplit("/", 1)[-1]
        raise SystemExit(
            f"--features {folders.get('2d')}: no _2d.npz, _3d.npz or .npy of the first videos of "
            f"--list; looked for names like {name}_2d.npz"
        )
    source = f"{LABELS[kind]} features from {', '.join(dict.fromkeys(folders.values()))}"
    settings = settings | {"folders": folders}
    writer = StoreWriter(out, specs, source, settings=settings, **options)

    def read(name: str, path: str):
        return load_rows(streams, specs, path), captions_of(name)

    return convert(writer, skips, paths, read, workers=workers, before_close=before_close)


def prepare(
    list_file: Path | None,
    features: Path | None,
    features_audio: Path | None,
    captions: Path,
    out: Path,
    *,
    rate_2d: float,
    rate_3d: float,
    streams: list[str] = (),
    **options,
) -> str:
    """Convert; returns the summary that is printed. The module's first lines have the formats.

    options: workers, overwrite, shard_mib.
    """
    require("--captions", captions)
    if not list_file and not streams:
        raise SystemExit("--list: give the table of videos, or --streams, whose files name them")
    files = feature_files(features, features_audio, rate_2d, rate_3d, "2d", streams)
    skips = SkipList(out)
    if list_file:
        rows = read_table(list_file, ["path"], "topic/subtopic/VIDEOID", skips)
        paths = {name: path for name, (path,) in rows}
    else:
        names = ids({name: file for name, file in files.items() if file.required})
        paths = {printable(name): name for name in names}
    said = Captions(captions, len(paths))
    summary = convert_features(
        paths,
        files,
        said.of,
        out,
        skips,
        kind="howto100m",
        settings={"list": str(list_file), "captions": str(captions)},
        **options,
    )
    return summary + said.summary()
