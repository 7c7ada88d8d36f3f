"""Search in videos: a sentence -> the places that show or say it, with times, scores, a picture.

    python -m mcn_ext.search --store data/videos.h5 --run runs/stage2-AV_T "crack the eggs"
    python -m mcn_ext.search --store data/videos.h5 --by words "crack the eggs"  # without a run

Every video is cut into overlapping windows, and a sentence is compared with all of them: with the
words spoken there by BM25; with picture and sound by their embeddings, made once and kept in the
run folder, which takes a run with text. Their similarity is the sum over the modalities that a
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

# How windows are compared -> what ranks them.
SCORES = {"words": "BM25", "embeddings": "similarity", "both": "fused ranks"}


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
    p.add_argument(
        "--by",
        choices=SCORES,
        help="what is compared: the words spoken (captions), which needs no run; embeddings of "
        "picture and sound; or both, ranks fused by 1 / (60 + rank) (default both where the store "
        "has words)",
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
        help="where the picture goes (default RUN/search.png, by words alone ./search.png; of more "
        "sentences search-2.png, ...)",
    )
    p.add_argument("--json", type=Path, metavar="FILE", help="write the answers there, too")
    return p


def excerpt(text: str, sentence: str, n: int = 10) -> str:
    """The part of ``n`` words of a text that has the most terms of a sentence."""
    from mcn_ext.evaluation.words import terms

    words, asked = text.split(), set(terms(sentence))
    parts = [" ".join(words[i : i + n]) for i in range(max(1, len(words) - n + 1))]
    best = max(parts, key=lambda part: len(asked.intersection(terms(part))))
    return best if best == parts[0] else f"... {best}"


def table(found: list[dict], sentence: str) -> str:
    """:func:`.places.describe`'s windows in Markdown, the best first."""
    from mcn_ext.evaluation.metrics import markdown

    parts = list(found[0]["of"])
    score = f"score: {SCORES[found[0]['by']]}"
    header = ["", "video", "from s", "to s", score, *(f"of {m}" for m in parts), "words there"]
    rows = []
    for k, row in enumerate(found, 1):
        scores = ["none" if value is None else f"{value:.3f}" for value in row["of"].values()]
        times = [f"{row['start']:.1f}", f"{row['end']:.1f}", f"{row['score']:.4f}"]
        words = excerpt(row["words"], sentence) if "words" in parts else row["words"]
        words = textwrap.shorten(words, 60, placeholder=" ...")
        cells = [str(k), row["video"], *times, *scores, words]
        rows.append([printable(cell).replace("|", "/") for cell in cells])
    return markdown(header, rows)


def picture(path: Path, title: str, places: dict, scores: dict, found, chosen, media) -> bool:
    """Draw scores over time in the videos of the best windows, ``found`` as people read them and
    ``chosen`` by number, those shaded, and with ``media`` {id: files} a frame of the best one of
    each video. False without matplotlib."""
    import numpy as np

    from mcn_ext.prepare.decode import frame_at
    from mcn_ext.train.curves import COLOURS, _pyplot, _save

    if (plt := _pyplot()) is None:
        return False
    curves = {name: values for name, values in scores.items() if name != "total"}
    if len(curves) > 1 and "words" not in curves:
        curves["sum"] = scores["total"]
    number = {row["video"]: places["video"][i] for row, i in zip(found, chosen, strict=True)}
    videos = list(number)[:3]
    size = (9, 0.9 + 2.6 * len(videos))
    shape = len(videos), 2 if media else 1
    figure, axes = plt.subplots(*shape, figsize=size, squeeze=False, layout="constrained")
    for (axis, *side), video in zip(axes, videos, strict=True):
        rows = np.flatnonzero(places["video"] == number[video])
        begin, stop = places["begin"][rows], places["stop"][rows]
        axis.set(
            xlabel="seconds", ylabel="similarity of embeddings", xlim=(begin.min(), stop.max())
        )
        shown = []
        for name, values in curves.items():
            on, style = axis, {"label": name, "color": COLOURS.get(name, "black"), "marker": "."}
            if name == "words":  # BM25 has a scale of its own
                style |= {"color": "tab:purple", "linestyle": "--"}
                if len(curves) > 1:
                    on = axis.twinx()
                    on.grid(False)
                    on.spines["right"].set_visible(True)
                    on.tick_params(axis="y", colors=style["color"])
                    style["label"] = "words (right axis)"
                on.set_ylabel("BM25 of words", color=style["color"])
                on.set_ylim(0, 1.1 * np.nanmax(values))
            # Where there is no sound, its values are NaN, and there is no curve.
            shown += on.plot((begin + stop) / 2, values[rows], **style)
        places_here = [(k, row) for k, row in enumerate(found, 1) if row["video"] == video]
        for k, row in places_here:
            alpha = 0.3 if k == 1 else 0.1
            place = axis.axvspan(row["start"], row["end"], color="tab:green", alpha=alpha)
            at = ((row["start"] + row["end"]) / 2, 1)
            axis.annotate(str(k), at, xycoords=("data", "axes fraction"), va="bottom", ha="center")
        if media:
            k, row = places_here[0]
            middle = (row["start"] + row["end"]) / 2
            frame = frame_at(media.get(video, []), middle)
            side[0].axis("off")
            if frame is not None:
                side[0].imshow(frame)
                side[0].set_title(f"{k}, at {middle:.0f} s")
        axis.set_title(printable(video), loc="left", pad=16, parse_math=False)
    place.set_label(f"places found, 1 is best by {SCORES[found[0]['by']]}")
    figure.legend(handles=[*shown, place], loc="outside lower left", ncols=len(shown) + 1)
    figure.suptitle(textwrap.shorten(title, 120, placeholder=" ..."), parse_math=False)
    _save(figure, path)
    plt.close(figure)
    return True


def ask(args, store, sentences: list[str], by: str):
    """The run to search with, and each sentence as it embeds it, None without a known word."""
    from mcn_ext.evaluation.embedder import Embedder

    embedder = Embedder(args)
    run, trained_on = embedder.run, embedder.sizes["modalities"]
    if "T" not in trained_on or len(trained_on) < 2:
        raise SystemExit(
            f"--run {run}: trained on {trained_on}; search needs text to ask with, and"
            f" video or audio to find: python train_stage2.py --add T --init {run}"
        )
    embedder.check(store, "--store", captions=False)
    if embedder.unknown_words(sentences):
        embedder.learn_words(store, sentences)
    asked = [embedder.texts([sentence]) for sentence in sentences]
    asked = [clip if clip[1]["text"].all() else None for clip in asked]
    if by == "embeddings" and None in asked:
        known_words = embedder.word2vec or "its training captions"
        raise SystemExit(
            f'"{sentences[asked.index(None)]}": the run knows none of these words, only those of '
            f"{known_words}"
        )
    if unknown := embedder.unknown_words(args.sentences):
        print(f"words that the run does not know: {', '.join(unknown)}")
    return embedder, asked


def cut(args, store, embedder) -> dict:
    """The windows of the store, as the run has kept them, or embedded now, if there is a run."""
    from mcn_ext.evaluation import places

    if embedder is None:
        return places.embed(None, store, args.window, args.stride)
    stats = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in store.files]
    key, name = (
        hashlib.sha256(repr(facts).encode()).hexdigest()
        for facts in (
            (stats, embedder.content["run_id"], embedder.content["step"]),
            (args.store.resolve(), args.window, args.stride),
        )
    )
    kept = embedder.run / f"search-{name[:8]}.npz"
    return places.embed_once(kept, key, embedder, store, args.window, args.stride)


def main(argv=None) -> int:
    args = parser().parse_args(argv)

    import numpy as np

    from mcn_ext.data.store import StoreError
    from mcn_ext.evaluation import places as windows
    from mcn_ext.evaluation.embedder import open_store, title_of
    from mcn_ext.train.log import write_text

    # --------------------------------------- inputs, checked before the first video is embedded
    store = open_store(args.store, "--store", flags.PREPARE["moments"])
    speech = store.speech()
    spoken = bool(store.n_captions) if speech is None else any(speech)
    by = args.by or ("both" if spoken else "embeddings")
    if by != "embeddings" and not spoken:
        raise SystemExit(
            f"--by {by}: {args.store} does not hold the words spoken in its videos; prepare it with"
            " --captions, or use --by embeddings"
        )
    folders = {"picture": args.picture and args.picture.parent, "media": args.media}
    for flag, folder in (folders | {"json": args.json and args.json.parent}).items():
        if folder is not None and not folder.is_dir():
            raise SystemExit(f"--{flag}: {folder.absolute()}: no such folder")
    media = None
    if args.media:
        from mcn_ext.prepare.videos import find_media

        media = find_media(args.media)
    sentences = list(map(printable, args.sentences))  # as they go into titles and files
    embedder, asked = None, [None] * len(sentences)
    if by != "words":
        try:
            embedder, asked = ask(args, store, sentences, by)
        except SystemExit as error:
            hint = "; --by words needs no run" if by == "both" else ""
            raise SystemExit(f"{error}{hint}") from None

    # ---------------------------------------------------------------------------------- search
    try:
        places, by_words = cut(args, store, embedder), [None] * len(sentences)
        searched = f"{title_of(store)}, {len(places['video'])} windows of {len(store)} videos"
        if by != "embeddings":
            by_words = windows.word_scores(store, places, sentences)
            searched += f", words spoken in {np.isfinite(by_words[0]).sum()}"
    except (FloatingPointError, StoreError) as error:
        raise SystemExit(f"--store {args.store}: {error}") from None
    answers, kind = {}, embedder and embedder.args["similarity"]
    for k, (sentence, clip, words) in enumerate(zip(sentences, asked, by_words, strict=True)):
        print(title := printable(f'"{sentence}" in {searched}'))
        lacking = ["the run knows none of these words"] * (by != "words" and clip is None)
        if by != "embeddings" and not (words > 0).any():
            words = None
            lacking.append("none of these words is spoken in a window")
        how, found = by if not lacking else "words" if clip is None else "embeddings", []
        if clip or words is not None:
            if lacking:
                print(f"{lacking[0]}: ranked by {how} alone")
            scores = windows.score(places, clip, words, kind)
            chosen = windows.best(places, scores["total"], args.top)
            found = [{"by": how} | windows.describe(places, store, i, scores) for i in chosen]
        answers[sentence] = found
        if found:
            print(table(found, sentence))
            path = args.picture or (embedder.run if embedder else Path()) / "search.png"
            path = path.with_name(f"{path.stem}-{k + 1}{path.suffix}") if k else path
            if picture(path, title, places, scores, found, chosen, media):
                print(printable(path))
        else:
            nothing = lacking or ["no window has anything in it that the run can see or hear"]
            print(f"nothing found: {' and '.join(nothing)}")
    if args.json:
        write_text(args.json, json.dumps(answers, indent=1, ensure_ascii=False) + "\n")
    return 0
