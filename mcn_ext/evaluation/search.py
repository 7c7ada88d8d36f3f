"""Search in videos: a sentence -> the places that show or say it, with times, scores, a picture.

    python -m mcn_ext.search --store data/videos.h5 --run runs/stage2-AV_T "crack the eggs"

Every video is cut into overlapping windows, embedded once and kept in the run folder; a sentence is
compared with all of them. Needs a run with text. The score is the sum over the modalities that a
window has: one that is silent may stand above one whose sound says otherwise.
"""

from __future__ import annotations

import argparse
import glob
import hashlib
import json
from pathlib import Path

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
    p.add_argument(
        "--run",
        type=Path,
        metavar="DIR",
        help="run folder (default: the newest, stage 2 before stage 1)",
    )
    p.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help="a checkpoint of it (default: RUN/checkpoint.pt)",
    )
    p.add_argument(
        "--top", type=flags.positive(int), default=5, metavar="N", help="places to show (default 5)"
    )
    p.add_argument(
        "--window",
        type=flags.positive(float),
        default=10.0,
        metavar="S",
        help="length of a place, in seconds (default 10, as clips in training)",
    )
    p.add_argument(
        "--stride",
        type=flags.positive(float),
        default=0.5,
        metavar="X",
        help="between places, as a part of their length (default 0.5)",
    )
    p.add_argument(
        "--media",
        type=Path,
        metavar="DIR",
        help="folder of the videos themselves, for "
        "a frame of each place in the picture (needs pip install av)",
    )
    p.add_argument(
        "--picture",
        type=Path,
        metavar="PNG",
        help="where the picture goes (default RUN/search.png; of more sentences search-2.png, ...)",
    )
    p.add_argument("--json", type=Path, metavar="FILE", help="write the answers there, too")
    p.add_argument(
        "--batch_size",
        type=flags.positive(int),
        default=64,
        metavar="N",
        help="windows embedded at a time (default 64)",
    )
    p.add_argument(
        "--device", default="auto", metavar="DEV", help="auto, cpu, cuda or cuda:N (default auto)"
    )
    return p


def table(found: list[dict], parts: list[str]) -> str:
    """Markdown."""
    lines = [
        "| | video | from s | to s | score | "
        + " | ".join(f"of {m}" for m in parts)
        + " | words there |",
        "|---:|---|" + "---:|" * (3 + len(parts)) + "---|",
    ]
    for k, row in enumerate(found, 1):
        cells = [
            str(k),
            row["video"],
            f"{row['start']:.1f}",
            f"{row['end']:.1f}",
            f"{row['score']:.3f}",
            *("none" if row["of"][m] is None else f"{row['of'][m]:.3f}" for m in parts),
            _short(row["words"], 60),
        ]
        lines.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
    return "\n".join(lines)


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 4].rsplit(" ", 1)[0] + " ..."


def frame_at(folder: Path, video: str, seconds: float):
    """(h, w, 3) uint8 of a video's file in a folder, ``seconds`` after its start; None where there
    is none."""
    import av

    def first_from(container, at: float):
        last = None
        for frame in container.decode(video=0):
            # Before a key frame, what a seek has landed on decodes to grey.
            if frame.time is not None and (last is not None or frame.key_frame):
                last, now = frame, frame.time - (container.start_time or 0) / av.time_base
                if now >= at:
                    return last, now
        return last, at

    for file in sorted(folder.glob(f"{glob.escape(video)}.*")):
        try:
            with av.open(str(file)) as container:
                start = container.start_time or 0
                container.seek(start + int(seconds * av.time_base))
                frame, now = first_from(container, seconds)
            if frame is None or now > seconds + 0.1:  # the seek went past
                with av.open(str(file)) as container:
                    frame, now = first_from(container, seconds)
            if frame is not None:
                return frame.to_ndarray(format="rgb24")
        except (av.FFmpegError, IndexError, OSError):
            continue  # not this one's video: captions, sound
    return None


def picture(
    path: Path,
    sentence: str,
    places,
    scores: dict,
    chosen: list[int],
    store,
    names: list[str],
    media: Path | None,
) -> Path | None:
    """Similarity over time in the videos of the best places, those shaded, with words (and a frame
    of each, from ``media``)."""
    import numpy as np

    from mcn_ext.evaluation.places import spoken
    from mcn_ext.study.curves import _pyplot, _save

    if (plt := _pyplot()) is None:
        return None
    videos = list(dict.fromkeys(int(places.video[i]) for i in chosen))[:3]
    frames = (
        {
            i: frame_at(media, names[places.video[i]], (places.begin[i] + places.stop[i]) / 2)
            for i in chosen
        }
        if media
        else {}
    )
    figure, axes = plt.subplots(
        len(videos),
        2,
        figsize=(11, 0.6 + 3.0 * len(videos)),
        squeeze=False,
        layout="constrained",
        width_ratios=[2.2, 1],
    )
    colours = {"total": "black", "video": "tab:blue", "audio": "tab:orange"}
    low, high = (f(scores["total"]) for f in (np.min, np.max))
    for (curve, side), video in zip(axes, videos, strict=True):
        rows = np.flatnonzero(places.video == video)
        middle = (places.begin[rows] + places.stop[rows]) / 2
        for name, values in scores.items():
            if name != "total":  # where there is no sound, there is no curve
                values = np.where(places.clips[1][name].numpy(), values, np.nan)
            if len(scores) > 2 or name == "total":
                curve.plot(
                    middle,
                    values[rows],
                    color=colours[name],
                    marker=".",
                    markersize=4,
                    linewidth=1.8 if name == "total" else 1,
                    label=name,
                )
                low, high = np.nanmin([low, *values[rows]]), np.nanmax([high, *values[rows]])
        best = [i for i in chosen if places.video[i] == video]
        for i in best:
            first = i == chosen[0]
            curve.axvspan(
                places.begin[i],
                places.stop[i],
                color="tab:green",
                zorder=0,
                alpha=0.3 if first else 0.1,
            )
            curve.annotate(
                str(chosen.index(i) + 1),
                ((places.begin[i] + places.stop[i]) / 2, 0.98),
                xycoords=("data", "axes fraction"),
                ha="center",
                va="top",
                fontsize=10,
                weight="bold" if first else "normal",
                color="tab:green",
            )
        curve.set(xlim=(0, store.seconds(video)), ylabel="similarity")
        curve.set_title(names[video], loc="left", fontsize=10, parse_math=False)
        curve.set_xlabel("seconds")
        side.axis("off")
        lines = []
        for i in best[:3]:
            said = [
                f"  {lo:.0f} s: {_short(text, 38)}"
                for lo, _, text in spoken(store, video, places.begin[i], places.stop[i])[:3]
            ]
            lines += [
                f"{chosen.index(i) + 1}: {places.begin[i]:.1f} to {places.stop[i]:.1f} s, "
                f"{scores['total'][i]:.3f}",
                *(said or ["  (nothing said)"]),
            ]
        shown = [frames[i] for i in best[:2] if frames.get(i) is not None]
        side.text(
            0,
            1.0,
            "\n".join(lines),
            va="top",
            fontsize=8.5,
            family="monospace",
            transform=side.transAxes,
            parse_math=False,
        )
        for k, image in enumerate(shown):
            inset = side.inset_axes([0.5 * k, 0.0, 0.48, 0.42])
            inset.imshow(image)
            inset.set_title(str(chosen.index(best[k]) + 1), fontsize=8, loc="left", pad=2)
            inset.set(xticks=[], yticks=[])
    pad = 0.12 * (high - low) or 0.1  # the numbers of places stand above the curves
    for curve in axes[:, 0]:
        curve.set_ylim(low - pad, high + pad)
    axes[0, 0].legend(loc="best", fontsize=8)
    figure.suptitle(
        f'"{_short(sentence, 90)}": the best of {len(places)} windows of {len(store)} videos',
        fontsize=11,
        parse_math=False,
    )
    _save(figure, path)
    plt.close(figure)
    return path


def main(argv=None) -> int:
    args = parser().parse_args(argv)

    from mcn_ext import distributed
    from mcn_ext.data.store import Store, StoreError
    from mcn_ext.data.words import tokenize
    from mcn_ext.evaluation.embedder import Embedder, open_run, words_of
    from mcn_ext.evaluation.places import Places
    from mcn_ext.train.log import write_text

    # ------------------------------------------------- all that can be wrong, before the embedding
    try:
        store = Store(args.store)
    except StoreError as error:
        raise SystemExit(f"--store {error}") from None
    run, _, content = open_run(args.run, args.checkpoint)
    words = words_of(run, content)
    trained_on = content["sizes"]["modalities"]
    if "T" not in trained_on or len(trained_on) < 2:
        raise SystemExit(
            f"--run {run}: trained on {trained_on}; search needs text to ask with, and"
            f" video or audio to find: python train_stage2.py --add T --init {run}"
        )
    picture_file = args.picture or run / "search.png"
    for flag, folder in (
        ("media", args.media),
        ("picture", picture_file.parent),
        ("json", args.json and args.json.parent),
    ):
        if folder is not None and not folder.is_dir():
            raise SystemExit(f"--{flag}: {folder}: no such folder")
    if args.media:
        from mcn_ext.prepare.decode import import_av

        import_av()
    embedder = Embedder(content, words, distributed.init(args.device), args.batch_size)
    embedder.check(store, "--store")
    if any(word not in embedder.words.index for s in args.sentences for word in tokenize(s)):
        embedder.learn_words(store, args.sentences)
    asked = embedder.texts(args.sentences)
    for sentence, known in zip(args.sentences, asked[1]["text"].tolist(), strict=True):
        if not known:
            raise SystemExit(
                f'"{sentence}": the run knows none of these words (case counts); '
                + (
                    f"nor does {embedder.word2vec}"
                    if embedder.word2vec
                    else "it was trained without a --word2vec file, on the words of its "
                    "captions alone"
                )
            )

    # ---------------------------------------------------------------------------------- search
    stats = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in store.files]
    key, name = (
        hashlib.sha256(repr(facts).encode()).hexdigest()
        for facts in (
            (stats, content["run_id"], content["step"]),
            (args.store.resolve(), args.window, args.stride),
        )
    )
    try:
        places = Places.of(
            embedder, store, args.window, args.stride, run / f"search-{name[:8]}.npz", key
        )
    except (FloatingPointError, StoreError) as error:
        raise SystemExit(f"--store {args.store}: {error}") from None
    kind, names, answers = content["args"]["similarity"], store.ids(), {}
    demo = " (DEMO DATA, made up)" if store.source.startswith("demo data") else ""
    for k, sentence in enumerate(args.sentences):
        one = tuple({"text": part["text"][k : k + 1]} for part in asked)
        scores = places.score(one, kind)
        chosen = places.best(scores["total"], args.top)
        found = answers[sentence] = places.describe(store, names, chosen, scores)
        print(f'"{sentence}" in {args.store}{demo}, {len(places)} windows of {len(store)} videos')
        if not found:
            print("nothing found: no window has anything in it that the run can see or hear")
            continue
        print(table(found, list(places.clips[0])))
        path = picture_file
        path = path.with_name(f"{path.stem}-{k + 1}{path.suffix}") if k else path
        if picture(path, sentence, places, scores, chosen, store, names, args.media):
            print(path)
    if args.json:
        write_text(args.json, json.dumps(answers, indent=1, ensure_ascii=False) + "\n")
    return 0
