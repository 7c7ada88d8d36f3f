"""Search in videos: a sentence -> the places that show or say it, with times, scores, a picture.

    python -m mcn_ext.search --store data/videos.h5 --run runs/stage2-AV_T "crack the eggs"

Every video is cut into overlapping windows, embedded once and kept in the run folder; a sentence is
compared with all of them. Needs a run with text. The score is the sum over the modalities that a
window has: one that is silent may stand above one whose sound says otherwise.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import textwrap
from pathlib import Path

from mcn_ext.console import printable
from mcn_ext.train import flags


def parser() -> flags.Parser:
    p = flags.Parser(
        prog="python -m mcn_ext.search",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("sentences", nargs="+", metavar="SENTENCE", help="what to look for")
    p.add_argument(
        "--store",
        type=Path,
        default=flags.STORES["moments"],
        metavar="PATH",
        help=f"videos to search (default {flags.STORES['moments']})",
    )
    flags.add_run(p)
    p.add_argument(
        "--top", type=flags.positive(int), default=5, metavar="N", help="places to show (default 5)"
    )
    p.add_argument(
        "--window",
        type=flags.window_seconds,
        default=10.0,
        metavar="S",
        help="length of a place, in seconds (default 10, as clips in training)",
    )
    p.add_argument(
        "--stride",
        type=flags.window_stride,
        default=0.5,
        metavar="X",
        help="between places, as a part of their length (default 0.5)",
    )
    p.add_argument(
        "--media",
        type=Path,
        metavar="DIR",
        help="folder of the videos themselves, found by their names as "
        "mcn_ext.prepare videos does, for a frame of each place in the picture (needs pip "
        "install av)",
    )
    p.add_argument(
        "--picture",
        type=Path,
        metavar="PNG",
        help="where the picture goes (default RUN/search.png; of more sentences search-2.png, ...)",
    )
    p.add_argument("--json", type=Path, metavar="FILE", help="write the answers there, too")
    return p


def table(found: list[dict]) -> str:
    """:func:`.places.describe`'s windows in Markdown, the best first."""
    from mcn_ext.evaluation.metrics import markdown

    parts = list(found[0]["of"])
    header = ["", "video", "from s", "to s", "score", *(f"of {m}" for m in parts), "words there"]
    rows = []
    for k, row in enumerate(found, 1):
        scores = ["none" if value is None else f"{value:.3f}" for value in row["of"].values()]
        times = [f"{row['start']:.1f}", f"{row['end']:.1f}", f"{row['score']:.3f}"]
        words = textwrap.shorten(row["words"], 60, placeholder=" ...")
        cells = [str(k), row["video"], *times, *scores, words]
        rows.append([printable(cell).replace("|", "/") for cell in cells])
    return markdown(header, rows)


def picture(path: Path, title: str, places: dict, scores: dict, chosen, names, media) -> bool:
    """Draw similarity over time in the videos of the best windows, those shaded, and with ``media``
    {id: files} a frame of the best one of each video. False without matplotlib."""
    import numpy as np

    from mcn_ext.prepare.decode import frame_at
    from mcn_ext.train.curves import COLOURS, _pyplot, _save

    if (plt := _pyplot()) is None:
        return False
    videos = list(dict.fromkeys(int(places["video"][i]) for i in chosen))[:3]
    size = (9, 0.6 + 2.6 * len(videos))
    shape = len(videos), 2 if media else 1
    figure, axes = plt.subplots(*shape, figsize=size, squeeze=False, layout="constrained")
    for (axis, *side), video in zip(axes, videos, strict=True):
        rows = np.flatnonzero(places["video"] == video)
        middle = (places["begin"] + places["stop"])[rows] / 2
        for name, values in scores.items():
            # Where there is no sound, there is no curve.
            there = True if name == "total" else places[f"valid:{name}"][rows]
            values = np.where(there, values[rows], np.nan)
            axis.plot(middle, values, marker=".", label=name, color=COLOURS.get(name, "black"))
        for k, i in enumerate(chosen, 1):
            if places["video"][i] == video:
                begin, stop = places["begin"][i], places["stop"][i]
                axis.axvspan(begin, stop, color="tab:green", alpha=0.3 if k == 1 else 0.1)
                at = ((begin + stop) / 2, 0.98)
                axis.annotate(str(k), at, xycoords=("data", "axes fraction"), va="top")
        if media:
            best = next(i for i in chosen if places["video"][i] == video)
            middle = (places["begin"][best] + places["stop"][best]) / 2
            frame = frame_at(media.get(names[video], []), middle)
            side[0].axis("off")
            if frame is not None:
                side[0].imshow(frame)
        axis.set(xlabel="seconds", ylabel="similarity")
        axis.set_title(printable(names[video]), loc="left", parse_math=False)
    axes[0, 0].legend()
    figure.suptitle(textwrap.shorten(title, 120, placeholder=" ..."), parse_math=False)
    _save(figure, path)
    plt.close(figure)
    return True


def main(argv=None) -> int:
    args = parser().parse_args(argv)

    from mcn_ext.data.store import StoreError
    from mcn_ext.evaluation import places as windows
    from mcn_ext.evaluation.embedder import Embedder, open_store, title_of
    from mcn_ext.train.log import write_text

    # --------------------------------------- inputs, checked before the first video is embedded
    store = open_store(args.store, "--store", flags.PREPARE["moments"])
    embedder = Embedder(args)
    run, trained_on = embedder.run, embedder.sizes["modalities"]
    if "T" not in trained_on or len(trained_on) < 2:
        raise SystemExit(
            f"--run {run}: trained on {trained_on}; search needs text to ask with, and"
            f" video or audio to find: python train_stage2.py --add T --init {run}"
        )
    embedder.check(store, "--store", captions=False)
    picture_file = args.picture or run / "search.png"
    folders = {"picture": picture_file.parent, "json": args.json and args.json.parent}
    for flag, folder in (folders | {"media": args.media}).items():
        if folder is not None and not folder.is_dir():
            raise SystemExit(f"--{flag}: {folder.absolute()}: no such folder")
    media = None
    if args.media:
        from mcn_ext.prepare.videos import find_media

        media = find_media(args.media)
    sentences = list(map(printable, args.sentences))  # as they go into titles and files
    if embedder.unknown_words(sentences):
        embedder.learn_words(store, sentences)
    embeddings, known = embedder.texts(sentences)
    for sentence, valid in zip(sentences, known["text"].tolist(), strict=True):
        if not valid:
            known_words = embedder.word2vec or "its training captions"
            raise SystemExit(
                f'"{sentence}": the run knows none of these words, only those of {known_words}'
            )

    # ---------------------------------------------------------------------------------- search
    if unknown := embedder.unknown_words(args.sentences):
        print(f"unknown words, which are left out: {', '.join(unknown)}")
    stats = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in store.files]
    key, name = (
        hashlib.sha256(repr(facts).encode()).hexdigest()
        for facts in (
            (stats, embedder.content["run_id"], embedder.content["step"]),
            (args.store.resolve(), args.window, args.stride),
        )
    )
    kept = run / f"search-{name[:8]}.npz"
    try:
        places = windows.embed_once(kept, key, embedder, store, args.window, args.stride)
    except (FloatingPointError, StoreError) as error:
        raise SystemExit(f"--store {args.store}: {error}") from None
    answers, ids = {}, store.ids()
    searched = f"{title_of(store)}, {len(places['video'])} windows of {len(store)} videos"
    for k, sentence in enumerate(sentences):
        one = tuple({"text": part["text"][k : k + 1]} for part in (embeddings, known))
        scores = windows.score(places, one, embedder.args["similarity"])
        chosen = windows.best(places, scores["total"], args.top)
        found = [windows.describe(places, store, i, scores) for i in chosen]
        answers[sentence] = found
        title = printable(f'"{sentence}" in {searched}')
        print(title)
        if not found:
            print("nothing found: no window has anything in it that the run can see or hear")
            continue
        print(table(found))
        path = picture_file
        path = path.with_name(f"{path.stem}-{k + 1}{path.suffix}") if k else path
        if picture(path, title, places, scores, chosen, ids, media):
            print(printable(path))
    if args.json:
        write_text(args.json, json.dumps(answers, indent=1, ensure_ascii=False) + "\n")
    return 0
