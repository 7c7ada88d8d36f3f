"""Captions by video, from what people have.

Of many videos: ``caption.pickle`` or a ``.json`` (id -> {"start", "end", "text"} in seconds, a list
of such, or either as a JSON string), YouCook2's annotations (``database`` -> id -> ``annotations``
[segment, sentence]), a ``.csv`` with a column ``id``, or a folder with a file per video, named by
its id as downloaders do: ``ID.vtt``, ``ID.en.vtt``, ``ID.mp4.SRT``. Of one video: subtitles,
``.csv`` (start,end,text), or a ``.json`` (equal lists, or a list of {"start", "end", "text"}, also
under "segments", as speech recognisers write it).
"""

from __future__ import annotations

import csv
import html
import io
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from functools import partial
from itertools import chain, pairwise
from pathlib import Path

import numpy as np

from mcn_ext.data.store_writer import mend
from mcn_ext.data.unpickle import load_pickle
from mcn_ext.prepare import Skipped, walk

KEYS = ("start", "end", "text")
LONGEST = 1e30  # seconds: a store has float32, which ends at 3e38
_CLOCK = r"((?:\d+:)?\d{1,2}:\d{1,2}(?:[.,]\d+)?)"
_CUE = re.compile(rf"^[ \t]*{_CLOCK}[ \t]*-->[ \t]*{_CLOCK}.*$", re.MULTILINE)
_MARKUP = re.compile(r"</?[a-zA-Z][^<>]*>|<[\d:.]+>|\{\\[^{}]*\}")
# What downloaders put between id and ending: a language, the ending of the media file.
_TAGS = re.compile(
    r"(\.([a-z]{2,3}([-_][\w-]*)?|mp[34]|m4[av]|webm|flac|opus|auto|default|forced))+$", re.I
)


def as_text(value) -> str:
    """A caption or an id; Skipped for NaN, and for containers, of which an unpickled one may be
    endless."""
    if isinstance(value, bytes):  # of a pickle of numpy's
        value = value.decode(errors="replace")
    if not isinstance(value, (str, int, float, np.number)) or value != value:
        raise Skipped(f"a {type(value).__name__} where a text is expected")
    return mend(str(value))


def _seconds(value) -> float:
    """A time in seconds, or a clock's (1:02:03.5)."""
    if not isinstance(value, str):
        return float(value)
    seconds = 0.0
    for part in value.replace(",", ".").split(":"):
        seconds = 60 * seconds + float(part)
    return seconds


# ---------------------------------------------------------------------------------- subtitles


def _n_shared(before: list[str], words: list[str]) -> int:
    """The length of the longest end of ``before`` that ``words`` begins with."""
    lengths = range(min(len(before), len(words), 100) + 1)  # three lines have some 30
    return max(n for n in lengths if before[len(before) - n :] == words[:n])


def _unroll(cues: Iterable[tuple[float, float, str]]) -> list[dict]:
    """Cues (start, end, text) as {"start", "end", "text"}, without words that a cue repeats.

    YouTube's automatic captions roll: a cue begins with the last words of the cue before, which are
    still shown. A file rolls if at least half of its cues do so, and one of them goes on.
    """
    said = [(start, end, text.split()) for start, end, text in cues if text.strip()]
    shared = [0, *(_n_shared(a[2], b[2]) for a, b in pairwise(said))]
    goes_on = any(0 < n < len(words) for n, (*_, words) in zip(shared, said, strict=False))
    if not goes_on or 2 * sum(map(bool, shared)) < len(said) - 1:
        shared = [0] * len(said)
    return [
        {"start": start, "end": end, "text": " ".join(words[n:])}
        for n, (start, end, words) in zip(shared, said, strict=False)
        if words[n:]
    ]


def read_cues(text: str) -> list[dict]:
    """Cues of SubRip or WebVTT as {"start", "end", "text"}, seconds, without mark-up."""
    # Not by pysubs2, which takes a line with the times of two words for a cue's, and WebVTT's
    # notes and names of cues for words of the cue before.
    text = "\n".join(text.splitlines())
    found = list(_CUE.finditer(text))
    is_numbered = bool(found) and text[: found[0].start()].rstrip()[-1:].isdigit()
    stops, cues = [*(cue.start() for cue in found), len(text)], []
    for cue, stop in zip(found, stops[1:], strict=True):
        block = between = text[cue.end() : stop]
        if text.startswith("WEBVTT"):  # between cues are notes, styles, and names of cues
            block = between.split("\n\n")[0]
        lines = block.strip().split("\n")
        # What was cut off had the number of the next cue in it: a number that is left is spoken.
        uncut = block == between and stop < len(text)
        if is_numbered and uncut and lines[-1].strip().isdigit():
            del lines[-1]  # the number of the next cue
        lines = [html.unescape(_MARKUP.sub("", line)) for line in lines]
        cues.append((_seconds(cue[1]), _seconds(cue[2]), " ".join(lines)))
    return _unroll(cues)


def _import_pysubs2():
    """pysubs2, or SystemExit that says how to get it."""
    try:
        import pysubs2
    except ImportError as error:
        raise SystemExit(
            "--captions: subtitles other than .srt and .vtt are read with pysubs2: pip install "
            f"pysubs2 (or pip install -e '.[video]'); {error}"
        ) from error
    return pysubs2


def _read_subtitles(text: str) -> list[dict]:
    """Cues of a file of a kind that pysubs2 finds out by its content."""
    events = _import_pysubs2().SSAFile.from_string(text).get_text_events()
    texts = [_MARKUP.sub("", e.plaintext.replace("[br]", " ")) for e in events]
    return _unroll((e.start / 1000, e.end / 1000, t) for e, t in zip(events, texts, strict=True))


# ------------------------------------------------------------------------------------- tables


def _from_json(text: str):
    table = json.loads(text)
    return table.get("database", table) if isinstance(table, dict) else table  # YouCook2's


def _from_csv(text: str) -> dict | list:
    """A list of captions; by id, if there is a column ``id`` (or ``video_id``)."""
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    name = next((key for key in ("id", "video_id") if rows and key in rows[0]), None)
    videos = defaultdict(list)
    for row in rows:
        surplus = row.pop(None, None)  # a text with commas and without quotes
        if surplus and list(row)[-1] == "text":
            row["text"] = ",".join([row["text"], *surplus])
        videos[row.get(name)].append(row)
    return dict(videos) if name else rows


_READERS = {".csv": _from_csv, ".srt": read_cues, ".vtt": read_cues, ".json": _from_json}
_READERS |= dict.fromkeys((".ass", ".ssa", ".sub", ".smi", ".sami", ".ttml"), _read_subtitles)


def _read(path: Path):
    """What a file of captions holds; Skipped if it cannot be read."""
    try:
        raw = path.read_bytes()
        wide = raw[:2] in (b"\xff\xfe", b"\xfe\xff")
        try:
            text = raw.decode("utf-16" if wide else "utf-8-sig")
        except UnicodeDecodeError:  # of old players: Western Europe's
            text = raw.decode("cp1252", "replace")
        return _READERS[path.suffix.lower()](text)
    except Exception as error:  # damage makes json, csv and pysubs2 raise a dozen types
        raise Skipped(
            f"{path}: not captions as {path.suffix} has them ({type(error).__name__}: {error})"
        ) from error


def _columns(entry) -> tuple:
    """(start, end, text), equal lists, of one video, from any of its forms."""
    if isinstance(entry, (str, bytes)):
        entry = json.loads(entry)
    if isinstance(entry, dict) and "annotations" in entry:
        rows = entry["annotations"]
        return tuple(zip(*((*row["segment"], row["sentence"]) for row in rows), strict=True))
    if isinstance(entry, dict) and isinstance(entry.get("segments"), list):
        entry = entry["segments"]
    if isinstance(entry, list):
        return tuple([row.get(key) for row in entry] for key in KEYS)
    return tuple(entry[key] for key in KEYS)


def _find_files(folder: Path) -> dict[str, list[Path]]:
    """{video id: its files of captions} below a folder."""
    found = defaultdict(list)
    for place, names in walk(folder):
        for path in (Path(place, name) for name in names):
            if path.suffix.lower() in _READERS:
                for name in {path.stem, _TAGS.sub("", path.stem)}:
                    found[name].append(path)
    return found


def _rank(name: str, path: Path) -> tuple:
    """Of several files of a video, the least: its name alone, then English, then by kind."""
    stem, kind = path.stem, list(_READERS).index(path.suffix.lower())
    return stem != name, ".en" not in stem.lower(), kind, path


class Captions:
    """Captions by video id; the module's first lines have the formats.

    ``single``: the file is about one video, whatever its id. SystemExit for a file that is none of
    them, or is about one of ``n_videos``.
    """

    def __init__(self, path: Path, n_videos: int = 1):
        self.path, self.table = path, {}
        self.left_out: list[str] = []  # why, of each caption
        self.files = _find_files(path) if path.is_dir() else {}
        if any(_READERS[f.suffix.lower()] is _read_subtitles for f in chain(*self.files.values())):
            _import_pysubs2()  # now, and not after hours
        self.single = False
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
            isinstance(self.table.get(key), (list, np.ndarray)) for key in ("segments", "start")
        )
        if self.single and n_videos > 1:
            raise SystemExit(
                f"--captions {path}: captions of one video, but there are {n_videos}; give a "
                f"folder of files named by id, as ID{path.suffix}"
            )

    def of(self, name: str) -> tuple[tuple, tuple, tuple]:
        """(start, end, text) of a video, sorted by start.

        Captions without a text or without 0 <= start < end are left out and counted for
        :meth:`summary`. Skipped where none is left, or they are damaged.
        """
        path, entry = self.path, self.table if self.single else self.table.get(name)
        if name in self.files:
            path = min(self.files[name], key=partial(_rank, name))
            entry = _read(path)
            if isinstance(entry, dict) and name in entry:  # a table with a column of ids
                entry = entry[name]
        if entry is None:
            raise Skipped(f"no captions in {path}")
        kept, left_out = [], []
        try:
            for start, end, text in zip(*_columns(entry), strict=True):
                try:
                    start, end = _seconds(start), _seconds(end)
                except (TypeError, ValueError):
                    start = end = np.nan
                if text is None or text != text or not as_text(text).strip():  # None, NaN, empty
                    left_out.append("without a text")
                elif 0 <= start < end < LONGEST:
                    kept.append((start, end, as_text(text)))
                else:
                    left_out.append("without 0 <= start < end")
        except Exception as error:  # an entry is anything that a pickle or JSON may hold
            raise Skipped(
                f"captions in {path} are not equal lists start, end, text "
                f"({type(error).__name__}: {error})"
            ) from error
        self.left_out += left_out
        if not kept:
            raise Skipped(f"no caption with a text and 0 <= start < end in {path}")
        return tuple(zip(*sorted(kept), strict=True))

    def summary(self) -> str:
        """A line about captions that were left out, for the end of a summary; empty if none."""
        counts = ", ".join(f"{n:,} {why}" for why, n in Counter(self.left_out).items())
        return f"\n{len(self.left_out):,} captions left out: {counts}" if counts else ""
