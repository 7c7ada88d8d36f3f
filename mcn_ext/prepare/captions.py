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

KEYS = ("start", "end", "text")
_CLOCK = r"(?:(\d+):)?(\d{1,2}):(\d{1,2}(?:[.,]\d+)?)"
_CUE = re.compile(rf"\s*{_CLOCK}\s*-->\s*{_CLOCK}")
_MARKUP = re.compile(r"<[^<>]*>|\{\\[^{}]*\}")


def as_text(value) -> str:
    """A caption or an id; Skipped for containers, of which an unpickled one may be endless."""
    if not isinstance(value, (str, int, float, np.number)):
        raise Skipped(f"a {type(value).__name__} where a text is expected")
    return mend(str(value))


def _seconds(hours: str | None, minutes: str, seconds: str) -> float:
    return 60 * (60 * int(hours or 0) + int(minutes)) + float(seconds.replace(",", "."))


def read_cues(text: str) -> list[dict]:
    """Cues of SubRip or WebVTT as {"start", "end", "text"}, seconds, without mark-up.

    YouTube's automatic captions roll: each cue repeats the line before. Those lines are dropped.
    """
    cues: list[tuple[float, float, list[str]]] = []
    is_open = False  # an empty line ends a cue
    for line in text.splitlines():
        if match := _CUE.match(line):
            cues.append((_seconds(*match.groups()[:3]), _seconds(*match.groups()[3:]), []))
            is_open = True
        elif not line:
            is_open = False
        elif is_open and (words := html.unescape(_MARKUP.sub("", line)).strip()):
            cues[-1][2].append(words)
    rolling, shown, out = "<c>" in text, [], []
    for start, end, lines in cues:
        new = [line for line in lines if not (rolling and line in shown)]
        shown = lines
        if new:
            out.append({"start": start, "end": end, "text": " ".join(new)})
    return out


def _from_json(text: str):
    table = json.loads(text)
    if not isinstance(table, dict) or not isinstance(table.get("database"), dict):
        return table
    return {  # YouCook2's
        name: [
            {"start": row["segment"][0], "end": row["segment"][1], "text": row["sentence"]}
            for row in video["annotations"]
        ]
        for name, video in table["database"].items()
    }


def _from_csv(text: str) -> dict | list:
    """A list of captions; by id, if there is a column ``id`` (or ``video_id``)."""
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    name = next((key for key in ("id", "video_id") if rows and key in rows[0]), None)
    videos: dict = {}
    for row in rows:
        videos.setdefault(row.get(name), []).append({key: row.get(key) for key in KEYS})
    return videos if name else rows


_READERS = {".csv": _from_csv, ".srt": read_cues, ".vtt": read_cues, ".json": _from_json}


def _read(path: Path):
    """What a file of captions holds; Skipped if it cannot be read."""
    try:
        raw = path.read_bytes()
        wide = raw[:2] in (b"\xff\xfe", b"\xfe\xff")
        text = raw.decode("utf-16" if wide else "utf-8-sig", "replace")
        return _READERS[path.suffix.lower()](text)
    except (OSError, ValueError, RecursionError, LookupError, TypeError, csv.Error) as error:
        raise Skipped(
            f"{path}: not captions as {path.suffix} has them ({type(error).__name__}: {error})"
        ) from error


def _columns(entry) -> tuple:
    """(start, end, text), equal lists, from those or a list of captions, or of one with
    "segments"."""
    if isinstance(entry, dict) and isinstance(entry.get("segments"), list):
        entry = entry["segments"]
    if isinstance(entry, list):
        return tuple([row[key] for row in entry] for key in KEYS)
    return tuple(entry[key] for key in KEYS)


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
                self.table = _read(path)
            except Skipped as reason:
                raise SystemExit(f"--captions {reason}") from reason
        else:
            self.table = load_pickle(path)
        if not isinstance(self.table, (dict, list)):
            raise SystemExit(
                f"--captions {path}: holds a {type(self.table).__name__}, expected a dictionary "
                "video id -> {'start': [..], 'end': [..], 'text': [..]}"
            )
        self.single = isinstance(self.table, list) or any(
            isinstance(self.table.get(key), list) for key in ("segments", "start")
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
            rows = [
                (float(start), float(end), as_text(text))
                for start, end, text in zip(*_columns(entry), strict=True)
            ]
        except (LookupError, TypeError, ValueError, OverflowError, RuntimeError) as error:
            raise Skipped(
                f"captions in {self.path} are not equal lists start, end, text ({error})"
            ) from error
        rows = sorted(row for row in rows if 0 <= row[0] < row[1] < 1e6)
        if not rows:
            raise Skipped(f"no caption with 0 <= start < end in {self.path}")
        return tuple(zip(*rows, strict=True))

    def _from_folder(self, name: str):
        try:
            files = [self.path / f"{name}{suffix}" for suffix in _READERS]
            return next((_read(file) for file in files if file.is_file()), None)
        except OSError as error:  # a name no file can have
            raise Skipped(f"{name[:99]}: {error.strerror}") from error
