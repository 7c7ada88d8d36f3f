"""Captions as people have them: subtitles, tables, pickles, folders; what is left out, counted."""

import json
import pickle
import sys

import numpy as np
import pytest

from mcn_ext.data.unpickle import UnsafePickle
from mcn_ext.prepare import Skipped
from mcn_ext.prepare.captions import Captions, as_text, read_cues

# ---------------------------------------------------------------------------------- subtitles

LINES = ["now we chop the onion", "and put it into the pan", "stir for two minutes", "and serve"]
HEAD = "WEBVTT\nKind: captions\nLanguage: en\n\n"


def srt(cues, point=",", numbered=True, blank="\n"):
    """SubRip of (start, end, text); with another point, the body of WebVTT."""

    def clock(t):
        return f"{t // 60 // 60:02.0f}:{t // 60 % 60:02.0f}:{t % 60:06.3f}".replace(".", point)

    return "".join(
        (f"{number}\n" if numbered else "") + f"{clock(a)} --> {clock(b)}\n{text}\n{blank}"
        for number, (a, b, text) in enumerate(cues, 1)
    )


def rolled():
    """LINES as YouTube shows them: each twice, and once more for 10 ms between."""
    cues, start = [], 0.5
    for before, line in zip(["", *LINES], LINES, strict=False):
        cues.append((start, start + 2, f"{before}\n{line}" if before else line))
        cues.append((start + 2, start + 2.01, f"{line}\n "))
        start += 2.01
    return cues


def each(change):
    return [(start, end, change(text)) for start, end, text in rolled()]


ROLLING = {
    "srt": srt(rolled()),
    "without the short cues": srt([cue for cue in rolled() if cue[1] - cue[0] > 1]),
    "lines joined": srt(each(lambda text: text.replace("\n", " "))),
    "three lines": srt([(i, i + 1, "\n".join(LINES[max(0, i - 2) : i + 1])) for i in range(4)]),
    "vtt": HEAD + srt(rolled(), "."),
    "vtt without numbers": HEAD + srt(rolled(), ".", numbered=False),
    "CRLF": srt(rolled()).replace("\n", "\r\n"),
    "fonts": srt(each(lambda text: f'<font color="#E5E5E5">{text}</font>')),
    "places": srt(each(lambda text: "{\\an8}" + text)),
    "no empty lines": srt(rolled(), blank=""),
    "spaces in empty lines": srt(rolled(), blank=" \n"),
}


@pytest.mark.parametrize("name", ROLLING)
def test_rolling_captions_are_not_doubled(name):
    cues = read_cues(ROLLING[name])
    assert [cue["text"] for cue in cues] == LINES
    assert all(cue["start"] < cue["end"] for cue in cues)


def test_rolling_captions_with_the_times_of_words():
    """As YouTube writes them; two times in a line of words are no cue's."""
    text = (
        HEAD + "00:00:00.000 --> 00:00:02.000 align:start position:0%\n \n"
        "<c.colorE5E5E5>now<00:00:00.500> we</c><c.colorCCCCCC><00:00:00.900> chop</c>\n\n"
        "00:00:02.000 --> 00:00:02.010\nnow we chop\n \n\n"
        "00:00:02.010 --> 00:00:04.000\nnow we chop\nthe<00:00:03.000><c> onion</c>\n"
    )
    assert [cue["text"] for cue in read_cues(text)] == ["now we chop", "the onion"]


def test_captions_that_grow_word_by_word():
    words = LINES[0].split()
    cues = [(i / 2, i / 2 + 0.5, " ".join(words[: i + 1])) for i in range(len(words))]
    assert [cue["text"] for cue in read_cues(srt(cues))] == words


STAY = {
    "a word again and again": (srt([(i, i + 1, "stir") for i in range(4)]), ["stir"] * 4),
    "two people": (
        srt([(0, 1, "No."), (1, 2, "No."), (2, 3, "Yes, chop."), (3, 4, "Oh."), (4, 5, "So.")]),
        ["No.", "No.", "Yes, chop.", "Oh.", "So."],
    ),
    "a word at an end and a start": (
        srt(
            [(0, 1, "cut the"), (1, 2, "the egg"), (3, 4, "and fry"), (4, 5, "it"), (5, 6, "well")]
        ),
        ["cut the", "the egg", "and fry", "it", "well"],
    ),
    "numbers": (srt([(0, 1, "3"), (1, 2, "2"), (2, 3, "1")]), ["3", "2", "1"]),
    "numbers, cues without": ("00:01 --> 00:02\n5\n\n00:03 --> 00:04\n4\n", ["5", "4"]),
    "an empty line in a cue": (
        "1\n00:00:01,000 --> 00:00:02,000\nchop\n\nit\n\n2\n00:00:02,000 --> 00:00:03,000\nfry\n",
        ["chop it", "fry"],
    ),
    "notes and names of cues": (
        HEAD + "a-1\n00:01.000 --> 00:02.000\n<v Ann Lee>chop</v>\n\nNOTE not\nsaid\n\na-2\n"
        "00:02.000 --> 00:03.000\nfry\n",
        ["chop", "fry"],
    ),
    "signs": ("1\n0:00:01,0 --> 0:00:02,0\nx < 3 &amp; y > 2, {so}\n", ["x < 3 & y > 2, {so}"]),
}


@pytest.mark.parametrize("name", STAY)
def test_words_of_subtitles_stay(name):
    text, wanted = STAY[name]
    assert [cue["text"] for cue in read_cues(text)] == wanted


ASS = """[Script Info]
ScriptType: v4.00+

[V4+ Styles]
Format: Name, Fontname, Fontsize
Style: Default,Arial,20

[Events]
Format: Layer, Start, End, Style, Name, MarginL, MarginR, MarginV, Effect, Text
Comment: 0,0:00:00.00,0:00:09.00,Default,,0,0,0,,not said
Dialogue: 0,0:00:01.00,0:00:02.50,Default,,0,0,0,,{\\i1}chop{\\i0} the\\Nonion, now
Dialogue: 0,0:00:03.00,0:00:04.00,Default,,0,0,0,,{\\p1}m 0 0 l 100 0{\\p0}
Dialogue: 0,0:00:05.00,0:00:06.00,Default,,0,0,0,,fry
"""
OTHERS = {
    "a.ass": ASS,
    "b.ASS": "\ufeff" + ASS.replace("\n", "\r\n"),
    "c.ssa": ASS.replace("V4+", "V4").replace("Layer", "Marked").replace("e: 0", "e: Marked=0"),
    "d.sub": "{1}{1}10\n{10}{25}chop the|onion, now\n{50}{60}{y:i}fry\n",
    "e.sub": "00:00:01.00,00:00:02.50\nchop the[br]onion, now\n\n00:00:05.00,00:00:06.00\nfry\n",
    "f.ttml": '<tt xmlns="http://www.w3.org/ns/ttml"><body><div><p begin="00:00:01.000" '
    'end="00:00:02.500">chop the<br/>onion, now</p><p begin="00:00:05.000" end="00:00:06.000">fry'
    "</p></div></body></tt>",
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # pysubs2's, of fields it lacks
@pytest.mark.parametrize("name", OTHERS)
def test_other_subtitles(tmp_path, name):
    pytest.importorskip("pysubs2")
    (tmp_path / name).write_text(OTHERS[name])
    wanted = ((1.0, 5.0), (2.5, 6.0), ("chop the onion, now", "fry"))
    assert Captions(tmp_path / name).of("any") == Captions(tmp_path).of(name[0]) == wanted


def test_other_subtitles_need_pysubs2_and_say_so_at_once(tmp_path, monkeypatch):
    (tmp_path / "a.ass").write_text(ASS)
    monkeypatch.setitem(sys.modules, "pysubs2", None)
    for path in (tmp_path, tmp_path / "a.ass"):
        with pytest.raises(SystemExit, match=r"pip install pysubs2 .*\[video\]"):
            Captions(path)


# -------------------------------------------------------------------------- tables and pickles

ROWS = [{"start": 0.5, "end": 2, "text": "chop"}, {"start": 3, "end": 4, "text": "fry"}]
COLUMNS = {key: [row[key] for row in ROWS] for key in ROWS[0]}
WANTED = ((0.5, 3.0), (2.0, 4.0), ("chop", "fry"))


def test_tables(tmp_path):
    youcook2 = {
        "annotations": [
            {"segment": [row["start"], row["end"]], "sentence": row["text"]} for row in ROWS
        ]
    }
    files = {
        "one.json": json.dumps(ROWS),
        "two.JSON": json.dumps({"segments": ROWS, "text": ""}),
        "three.json": json.dumps(COLUMNS),
        "four.csv": "\ufeffstart,end,text\n0.5,2,chop\n3,4,fry\n",
        "clock.csv": "start,end,text\n0:00.5,0:00:02,chop\n3,4,fry\n",
        "many.json": json.dumps({"a": COLUMNS}),
        "many-lists.json": json.dumps({"a": ROWS, "b": 3}),
        "many-strings.json": json.dumps({"a": json.dumps(COLUMNS)}),
        "many-youcook2.json": json.dumps({"database": {"a": youcook2, "b": {"annotations": [3]}}}),
        "many.csv": "id,start,end,text\na,0.5,2,chop\nb,1,2,x\na,3,4,fry\n",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.write_text(text)
        assert Captions(path).of("a") == WANTED
        assert Captions(path).single == ("many" not in name)
        if "many" not in name:
            with pytest.raises(SystemExit, match=f"{path}: captions of one video, but there are 2"):
                Captions(path, n_videos=2)
    with pytest.raises(Skipped, match="many-youcook2.json are not equal lists"):
        Captions(tmp_path / "many-youcook2.json").of("b")
    (tmp_path / "bad.json").write_text("3")
    with pytest.raises(SystemExit, match="expected a dictionary"):
        Captions(tmp_path / "bad.json")


def objects(values):
    return np.array(values, dtype=object)


PICKLES = {
    "lists": COLUMNS,
    "object arrays": {key: objects(values) for key, values in COLUMNS.items()},
    "objects of numpy": {
        "start": objects([np.float64(0.5), np.int32(3)]),
        "end": objects([np.float32(2), np.int64(4)]),
        "text": objects([np.str_("chop"), np.str_("fry")]),
    },
    "numpy strings": COLUMNS | {"text": [np.str_("chop"), np.str_("fry")]},
    "arrays": {key: np.array(values) for key, values in COLUMNS.items()},
    "big-endian": {
        "start": np.array([0.5, 3], ">f4"),
        "end": np.array([2, 4], ">i8"),
        "text": np.array(["chop", "fry"]).astype(">U9"),
    },
    "bytes": COLUMNS | {"text": np.array([b"chop", b"fry"])},
    "tuples": {key: tuple(values) for key, values in COLUMNS.items()},
    "a list": ROWS,
    "JSON": json.dumps(COLUMNS),
    "JSON as numpy's": np.str_(json.dumps(COLUMNS)),
    "tables beside": COLUMNS | {"n": objects([[1, "a"], [2, None]]), "id": np.str_("")},
}


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("name", PICKLES)
def test_pickles(tmp_path, name, protocol):
    path = tmp_path / "caption.pickle"
    path.write_bytes(pickle.dumps({"a": PICKLES[name], np.str_("b"): 3}, protocol=protocol))
    captions = Captions(path, n_videos=2)
    assert captions.of("a") == WANTED and captions.summary() == ""
    assert {type(text) for text in captions.of("a")[2]} == {str}
    with pytest.raises(Skipped, match="caption.pickle are not equal lists"):
        captions.of("b")


def test_objects_in_arrays_run_nothing(tmp_path):
    class Runs:
        def __reduce__(self):
            return print, ("run",)

    path = tmp_path / "caption.pickle"
    path.write_bytes(pickle.dumps({"a": COLUMNS | {"text": objects([Runs(), "fry"])}}))
    with pytest.raises(UnsafePickle, match="caption.pickle: refused.* asks for builtins.print"):
        Captions(path)


# ------------------------------------------------------------------------ what is left out


@pytest.mark.parametrize(
    "start, end, text, why",
    [
        (5, 6, float("nan"), "without a text"),
        (5, 6, None, "without a text"),
        (5, 6, np.float32("nan"), "without a text"),
        (5, 5, "x", "without 0 <= start < end"),
        (6, 5, "x", "without 0 <= start < end"),
        (-1, 5, "x", "without 0 <= start < end"),
        (float("nan"), 5, "x", "without 0 <= start < end"),
        (5, float("inf"), "x", "without 0 <= start < end"),
        ("nan", "5", "x", "without 0 <= start < end"),
    ],
)
def test_captions_without_text_or_time_are_counted(tmp_path, start, end, text, why):
    path = tmp_path / "caption.pickle"
    bad = {"start": start, "end": end, "text": text}
    path.write_bytes(pickle.dumps({"a": [*ROWS, bad], "b": [bad], "c": ROWS}))
    captions = Captions(path, n_videos=3)
    assert captions.of("a") == captions.of("c") == WANTED
    with pytest.raises(Skipped, match="no caption with a text and 0 <= start < end in .*pickle"):
        captions.of("b")
    assert captions.summary() == f"\n2 captions left out: 2 {why}"


def test_texts():
    assert as_text(3) == "3" and as_text(np.float32(0.5)) == "0.5" and as_text(b"\xc3\xa9") == "é"
    for value in (float("nan"), np.float64("nan"), None, ["x"], {}):
        with pytest.raises(Skipped, match="where a text is expected"):
            as_text(value)


# ---------------------------------------------------------------------------------- folders

CUE = "1\n00:00:01,000 --> 00:00:03,000\n{}\n"


def test_files_as_downloaders_name_them(tmp_path):
    names = """one.vtt two.en.vtt three.SRT four.en-US.srt five.mp4.srt six.en-orig.vtt
        seven.zh-Hans.vtt eight.webm.en.vtt nine.en-j3PyPqV-e1s.vtt ten.de.forced.srt""".split()
    for name in names:
        text = CUE.format(name)
        (tmp_path / name).write_text(HEAD + text.replace(",", ".") if "vtt" in name else text)
    captions = Captions(tmp_path, n_videos=99)
    for name in names:
        assert captions.of(name.split(".")[0])[2] == (name,)


def test_the_best_of_several_files(tmp_path):
    others = ["a.de.srt", "a.en.srt", "a.en.vtt", "a.b.srt", "a.info.json", "a.live_chat.json"]
    for name in (*others, "a.srt", "a.csv"):
        (tmp_path / name).write_text(CUE.format(name))
    (tmp_path / "a.csv").write_text("start,end,text\n1,3,a.csv\n")

    def best():
        return Captions(tmp_path).of("a")[2]

    for name in ("a.csv", "a.srt", "a.en.srt", "a.en.vtt", "a.de.srt"):
        assert best() == (name,)
        (tmp_path / name).unlink()
    with pytest.raises(Skipped, match=f"no captions in {tmp_path}"):  # a.b is another video
        best()
    assert Captions(tmp_path).of("a.b")[2] == ("a.b.srt",)


def test_folders_in_folders_and_links(tmp_path):
    (tmp_path / "in/more").mkdir(parents=True)
    (tmp_path / "disk").mkdir()
    (tmp_path / "in/more/a.srt").write_text(CUE.format("chop"))
    (tmp_path / "disk/b.srt").write_text(CUE.format("fry"))
    (tmp_path / "in/linked").symlink_to(tmp_path / "disk")
    (tmp_path / "disk/round").symlink_to(tmp_path / "in")
    captions = Captions(tmp_path / "in", n_videos=2)
    assert captions.of("a")[2] + captions.of("b")[2] == ("chop", "fry")


DAMAGED = {
    "a.json": "[[[",
    "b.json": "[" * 100_000,
    "c.json": '{"start": 1}',
    "d.json": "3",
    "e.json": '{"annotations": 3}',
    "f.json": '[{"start": "x", "end": 2, "text": "y"}]',
    "g.json": '[{"start": 1, "end": 2, "text": ["y"]}]',
    "h.json": '[{"start": 1, "end": 2}]',
    "i.json": '{"start": [1], "end": [2, 3], "text": ["x"]}',
    "j.csv": "\0\0,\0",
    "k.csv": "",
    "l.csv": "start,end\n1,2\n",
    "m.srt": "\xff\xd8\xff\xe0JFIF",
    "n.vtt": "WEBVTT\n",
    "o.srt": "99:99 --> x\n",
    "p.ass": "",
    "q.sub": "{25}{62}no frames per second\n",
    "r.ttml": "<tt",
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_encodings(tmp_path, encoding):
    (tmp_path / "a.srt").write_bytes(CUE.format("crème").encode(encoding))
    assert Captions(tmp_path).of("a")[2] == ("crème",)


def test_a_damaged_file_among_many_is_named(tmp_path):
    pytest.importorskip("pysubs2")
    for name, text in DAMAGED.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "good.srt").write_text(CUE.format("chop"))
    captions = Captions(tmp_path, n_videos=99)
    for name in DAMAGED:
        with pytest.raises(Skipped, match=f"{tmp_path}/{name}"):
            captions.of(name[0])
    assert captions.of("good")[2] == ("chop",)
    for name in ("none", "x" * 999):
        with pytest.raises(Skipped, match=f"no captions in {tmp_path}"):
            captions.of(name)


def test_names_of_caption_files_are_matched_in_no_time_and_to_their_own_video(tmp_path):
    """Long names with many "_" once took for ever; ".v1" is no language."""
    folder = tmp_path / "subs"
    folder.mkdir()
    cue = "1\n00:00:01,000 --> 00:00:02,000\n{}\n"
    for name in (
        "01.how" + "_to" * 40 + " (1)",
        "intro.v1",
        "cake.en-US",
        "pie.mp4",
        "tea.zh-Hans",
    ):
        (folder / f"{name}.srt").write_text(cue.format(name))
    captions = Captions(folder)
    for video in ("intro.v1", "cake", "pie", "tea"):
        assert captions.of(video)[2][0].startswith(video)
    with pytest.raises(Skipped, match="no captions"):
        captions.of("intro")


def test_numbers_that_are_spoken_stay_in_webvtt():
    cues = ["WEBVTT", "1\n00:01.000 --> 00:02.000\ncounting\n3", "2\n00:02.000 --> 00:03.000\n2"]
    cues.append("3\n00:03.000 --> 00:04.000\ngo")
    assert [cue["text"] for cue in read_cues("\n\n".join(cues))] == ["counting 3", "2", "go"]


def test_one_bad_row_costs_one_caption(tmp_path):
    table = tmp_path / "c.csv"
    table.write_text("start,end,text\n1,2,fry\n,4,boil\n5,6,\n7,1e39,peel\n8,9,chop\n")
    captions = Captions(table)
    assert captions.of("any")[2] == ("fry", "chop")
    assert "2 without 0 <= start < end" in captions.summary()
    assert "1 without a text" in captions.summary()
    table.write_bytes("start,end,text\n1,2,sauté\n".encode("cp1252"))
    assert Captions(table).of("any")[2] == ("sauté",)


def test_a_table_whose_texts_have_commas_and_no_quotes(tmp_path):
    (tmp_path / "a.csv").write_text("start,end,text\n1,2,salt, pepper\n")
    assert Captions(tmp_path / "a.csv").of("any")[2] == ("salt, pepper",)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "x.csv").write_text("id,start,end,text\nx,1,2,fry, boil\n")
    assert Captions(folder).of("x")[2] == ("fry, boil",)
