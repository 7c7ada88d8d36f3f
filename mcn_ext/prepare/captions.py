"""Captions by video, from what people have.

Of many videos: ``caption.pickle`` or a ``.json`` (id -> {"start", "end", "text"} in seconds, or a
list of such), YouCook2's annotations (``database`` -> id -> ``annotations`` [segment, sentence]), a
``.csv`` with a column ``id``, or a folder with one file per video, named by its id. Of one video:
``.srt``, ``.vtt``, ``.csv`` (start,end,text), or a ``.json`` (equal lists, or a list of {"start",
"end", "text"}, also under "segments", as speech recognisers write it).
"""

from __future__ import annotations

import csv
import html
import io
import json
import re
from pathlib import Path

import numpy as np

from mcn_ext.data.store_writer import mend
from mcn_ext.prepare import Skipped
from mcn_ext.prepare.unpickle import load_pickle

_KEYS = ("start", "end", "text")
_CLOCK = r"(?:(\d+):)?(\d{1,2}):(\d{1,2}(?:[.,]\d+)?)"
_CUE = re.compile(rf"\s*{_CLOCK}\s*-->\s*{_CLOCK}")
_MARKUP = re.compile(r"<[^<>]*>|\{\\[^{}]*\}")


def as_text(value) -> str:
    """A caption or id; ValueError for containers, which may be small and unfold to terabytes."""
    if not isinstance(value, (str, int, float, np.number)):
        raise ValueError(f"a {type(value).__name__} where a text is expected")
    return mend(str(value))


def _read(path: Path) -> str:
    raw = path.read_bytes()
    wide = raw[:2] in (b"\xff\xfe", b"\xfe\xff")
    return raw.decode("utf-16" if wide else "utf-8-sig", "replace")


def read_cues(text: str) -> list[dict]:
    """Cues of SubRip or WebVTT as {"start", "end", "text"}, seconds, without mark-up.

    YouTube's automatic captions roll: each cue repeats the line before. Those lines are dropped.
    """
    rolling, cues, shown = "<c>" in text, [], set()
    lines: list[str] | None = None  # of the cue that is open
    for line in text.splitlines():
        if match := _CUE.match(line):
            start, end = (
                60 * (60 * int(hours or 0) + int(minutes)) + float(seconds.replace(",", "."))
                for hours, minutes, seconds in (match.groups()[:3], match.groups()[3:])
            )
            lines = []
            cues.append((start, end, lines))
        elif not line:
            lines = None
        elif lines is not None and (words := html.unescape(_MARKUP.sub("", line)).strip()):
            lines.append(words)
    out = []
    for start, end, lines in cues:
        new = [line for line in lines if not (rolling and line in shown)]
        shown = set(lines)
        if new:
            out.append({"start": start, "end": end, "text": " ".join(new)})
    return out


def _columns(entry) -> dict:
    """Equal lists, from equal lists or a list of captions, or of one with "segments"."""
    if isinstance(entry, dict) and isinstance(entry.get("segments"), list):
        entry = entry["segments"]
    if isinstance(entry, list):
        return {key: [row[key] for row in entry] for key in _KEYS}
    return entry


def _is_of_one(table) -> bool:
    return isinstance(table, list) or any(
        isinstance(table.get(key), list) for key in ("segments", "start")
    )


class Captions:
    """Captions by video id; the module's first lines have the formats.

    ``single``: the file is about one video, whatever its id. SystemExit for a file that is none of
    them.
    """

    def __init__(self, path: Path):
        self.path, self.table, self.single = path, None, False
        if path.is_dir():
            return
        if path.suffix.lower() in _READERS:
            try:
                self.table = _READERS[path.suffix.lower()](path)
            except Skipped as reason:
                raise SystemExit(f"--captions {reason}") from reason
            self.single = isinstance(self.table, (dict, list)) and _is_of_one(self.table)
        else:
            self.table = load_pickle(path)
        if not isinstance(self.table, dict) and not self.single:
            raise SystemExit(
                f"--captions {path}: holds a {type(self.table).__name__}, expected a dictionary "
                "video id -> {'start': [..], 'end': [..], 'text': [..]}"
            )

    def of(self, name: str) -> tuple[list[float], list[float], list[str]]:
        """(start, end, text) sorted by start; rows without finite 0 <= start < end are dropped.

        Skipped where there is none, or it is damaged.
        """
        if self.single:
            entry = self.table
        elif self.table is not None:
            entry = self.table.get(name)
        else:
            entry = self._from_folder(name)
        if entry is None:
            raise Skipped(f"no captions in {self.path}")
        try:
            entry = _columns(entry)
            rows = [
                (float(s), float(e), as_text(t))
                for s, e, t in zip(entry["start"], entry["end"], entry["text"], strict=True)
            ]
        except (IndexError, KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
            raise Skipped(
                f"captions in {self.path} are not equal lists start, end, text ({error})"
            ) from error
        rows = sorted(row for row in rows if 0 <= row[0] < row[1] < 1e6)
        if not rows:
            raise Skipped(f"no caption with 0 <= start < end in {self.path}")
        return tuple(zip(*rows, strict=True))

    def _from_folder(self, name: str):
        for suffix, read in _READERS.items():
            try:
                if (path := self.path / f"{name}{suffix}").is_file():
                    return read(path)
            except OSError as error:  # a name no file can have
                raise Skipped(f"{name[:99]}: {error.strerror}") from error
        return None


def _csv(path: Path) -> dict:
    """Equal lists; by id, if there is a column ``id`` (or ``video_id``)."""
    try:
        rows = list(csv.DictReader(io.StringIO(_read(path), newline="")))
    except (OSError, csv.Error) as error:
        raise Skipped(f"{path}: {error}") from error
    name = next((key for key in ("id", "video_id") if rows and key in rows[0]), None)
    videos: dict = {}
    for row in rows:
        entry = videos.setdefault(row.get(name), {key: [] for key in _KEYS})
        for key in _KEYS:
            entry[key].append(row.get(key))
    return videos if name else videos.get(None, {key: [] for key in _KEYS})


def _json(path: Path):
    try:
        table = json.loads(_read(path))
        if isinstance(table, dict) and isinstance(table.get("database"), dict):  # YouCook2's
            return {
                name: [
                    {"start": row["segment"][0], "end": row["segment"][1], "text": row["sentence"]}
                    for row in video["annotations"]
                ]
                for name, video in table["database"].items()
            }
        return table
    except (KeyError, IndexError, TypeError) as error:
        raise Skipped(
            f'{path}: "database" is not as YouCook2 has it ({type(error).__name__}: {error})'
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise Skipped(f"{path}: not JSON ({error})") from error


def _cues(path: Path) -> list[dict]:
    try:
        return read_cues(_read(path))
    except OSError as error:
        raise Skipped(f"{path}: {error}") from error


_READERS = {".csv": _csv, ".srt": _cues, ".vtt": _cues, ".json": _json}
