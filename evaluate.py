"""Zero-shot evaluation of a trained run: a table for each set, RUN/metrics.json, similarity.png.

    python evaluate.py --youcook2                 # the newest run, on data/youcook2.h5
    python evaluate.py --youcook2 my_clips.h5 --run runs/stage2-AV_T
    python evaluate.py --msrvtt --crosstask --miningyoutube --moments
    python evaluate.py --youcook2 --run runs/published-mcn   # of mcn_ext.prepare published
    python evaluate.py --youcook2 --fusion words             # by the words spoken, without a run

Retrieval (youcook2, msrvtt), ordered steps in time (crosstask, miningyoutube), the place in a video
(moments). A run on the demo data is evaluated on the demo data's evaluation clips.
It stops where less than a tenth of the clips have a modality, or a known word; MCN_ANYWAY=1 in the
environment goes on.
"""

import argparse
import json
import shlex
from pathlib import Path

from mcn_ext.console import printable
from mcn_ext.train import flags

RETRIEVAL, STEPS = ("youcook2", "msrvtt"), ("crosstask", "miningyoutube")
SETS = (*RETRIEVAL, *STEPS, "moments")


def parse(argv):
    parser = flags.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, what in {
        "youcook2": "retrieval over the clips of STORE (default data/youcook2.h5, or the "
        "demo's for a demo run)",
        "msrvtt": "the same over MSR-VTT's test clips; those without sound, and those that are "
        "not there, count as misses",
        "crosstask": "an ordered list of steps found in each video: recall by task, IoU, IoD",
        "miningyoutube": "the same, with a list of steps for each video",
        "moments": "for each sentence, the windows of its video ranked: R@1 at IoU 0.3, 0.5, "
        "0.7. Sentences: STORE's captions, or --annotations",
    }.items():
        parser.add_argument(
            f"--{name}",
            # Without STORE the value is "", so that None means that the set was not asked for.
            nargs="?",
            const="",
            metavar="STORE",
            help=what if name == "youcook2" else f"{what} (default {flags.STORES[name]})",
        )
    flags.add_run(parser)
    parser.add_argument(
        "--similarity",
        choices=("cosine", "dot"),
        help="default: what the run was trained with",
    )
    group = parser.add_argument_group("retrieval")
    group.add_argument(
        "--all_directions",
        action="store_true",
        help="every query and candidate, pairs of modalities too, not only the four customary ones",
    )
    group.add_argument(
        "--whole_videos",
        action="store_true",
        help="also of the videos that clips are from (youcook2): best clip, mean over captions",
    )
    group.add_argument(
        "--fusion",
        nargs="+",
        choices=("sum", "mean", "bank", "volume", "words", "words+sum", "words+mean", "words+bank"),
        default=["sum"],
        help="how several modalities and candidates compare (default sum); several may be given. "
        "sum: of cosines, as published; mean: cosine to the mean embedding; bank: sum, less what "
        "draws training clips' queries to a candidate (no evaluation data used); volume: of query "
        "and two modalities, small for a match (GRAM); words: BM25 of caption and words spoken, "
        "alone without a run; words+sum and so on: both, by reciprocal ranks (moments: always so)",
    )
    group.add_argument(
        "--bank_size",
        type=flags.positive(int),
        default=2000,
        metavar="N",
        help="training clips that --fusion bank embeds (default 2000)",
    )
    group.add_argument(
        "--msrvtt_clips",
        type=flags.positive(int),
        metavar="N",
        help="clips of the whole test set (default 1000), for the misses",
    )
    group.add_argument(
        "--only",
        type=Path,
        metavar="TXT",
        help="rank these clips alone, an id a line; what others have ranked can then be compared",
    )
    group.add_argument(
        "--missing",
        choices=("misses", "drop"),
        default="misses",
        help="clips of --only that the store lacks: misses (the default), or left out",
    )
    group.add_argument(
        "--export",
        type=Path,
        metavar="CSV",
        help="write the rank of every query in every direction there, and the ten best clips",
    )
    group.add_argument(
        "--export_mteb",
        type=Path,
        metavar="DIR",
        help="write DIR/FUSION/TASK.json as MTEB's result files are, to stand beside MVEB's",
    )
    group.add_argument(
        "--keep_embeddings",
        action="store_true",
        help="write RUN/SET.npz: every query's rank by direction, and all embeddings (fp16)",
    )
    group.add_argument(
        "--require_complete",
        action="store_true",
        help="an error, not a result, for a run that has not been trained to its end",
    )
    group = parser.add_argument_group("steps and moments")
    group.add_argument(
        "--background",
        type=flags.number,
        metavar="Z",
        help="a second belongs to no step if it scores less than Z standard deviations above the "
        "step's mean in its video (default 0.5; for IoU, IoD and frame accuracy)",
    )
    group.add_argument(
        "--annotations", type=Path, metavar="JSON", help="YouCook2's annotations, for --moments"
    )
    group.add_argument(
        "--subset",
        choices=("validation", "training", "all"),
        help="of the annotations (default validation)",
    )
    group.add_argument(
        "--windows",
        type=flags.window_seconds,
        nargs="+",
        metavar="S",
        help="lengths of the windows ranked, in seconds (default 5 10 20 40)",
    )
    group.add_argument(
        "--window_stride",
        type=flags.window_stride,
        metavar="X",
        help="between windows, as a part of their length (default 0.25)",
    )
    args = parser.parse_args(argv)
    args.sets = [name for name in SETS if getattr(args, name) is not None]
    if not args.sets:
        parser.error(
            "say what to evaluate on: --youcook2 [STORE], --msrvtt, --crosstask, "
            "--miningyoutube or --moments"
        )
    # A flag that has no effect is an error: the user would believe that it was applied.
    for flag, sets in {
        **dict.fromkeys(("only", "export", "export_mteb"), set(RETRIEVAL)),
        "whole_videos": {"youcook2"},
        "msrvtt_clips": {"msrvtt"},
        "background": set(STEPS),
        "annotations": {"moments"},
        "subset": {"moments"},
        "windows": {"moments"},
        "window_stride": {"moments"},
    }.items():
        if getattr(args, flag) != parser.get_default(flag) and not sets & set(args.sets):
            parser.error(f"--{flag} is for {' and '.join(f'--{name}' for name in sorted(sets))}")
    args.by_words = any("words" in fusion for fusion in args.fusion)
    if set(args.fusion) == {"words"} and set(STEPS) & set(args.sets):
        parser.error("--fusion words: --crosstask and --miningyoutube need a run's embeddings")
    if set(args.fusion) == {"words"} and (args.run or args.checkpoint):
        parser.error("--fusion words alone reads no run: leave out --run, or ask for words+sum")
    if args.only and args.msrvtt_clips:
        parser.error("--msrvtt_clips: --only says which clips there are")
    if args.missing != "misses" and not args.only:
        parser.error("--missing is of --only")
    if args.export and not args.export.absolute().parent.is_dir():
        parser.error(f"--export {args.export}: no such folder")
    if args.subset and not args.annotations:
        parser.error("--subset is of --annotations")
    return args


def main(argv=None):
    args = parse(argv)  # torch is not loaded yet

    import numpy as np

    from mcn_ext.data.store import StoreError
    from mcn_ext.evaluation import gallery, localization, moments, retrieval
    from mcn_ext.evaluation.embedder import Embedder, NoRun, open_store, title_of
    from mcn_ext.evaluation.metrics import gain_rows, gains, keep, markdown, summarize, table_rows
    from mcn_ext.report import similarity_picture
    from mcn_ext.train.log import replace, write_text

    # ---------------------------------------------------------------------------------- inputs
    # All are opened and checked before the first clip is embedded.
    alone = set(args.fusion) == {"words"}
    embedder = NoRun() if alone else Embedder(args)
    run, file = embedder.run, embedder.file
    content, trained = embedder.content, embedder.args
    unfinished = "" if content["complete"] else f"step {content['step']}, not the run's end"
    if args.require_complete and unfinished:
        raise SystemExit(f"{file}: {unfinished}; the command that trains it goes on")
    modalities, similarity = embedder.model.modalities, args.similarity or trained["similarity"]
    directions = retrieval.asked(modalities, args.fusion, args.all_directions)

    stores, steps, sentences, videos, chosen, exported = {}, {}, {}, None, {}, []
    for name in args.sets:
        path, prepare = flags.STORES[name], f"{flags.PREPARE[name]} --out {flags.STORES[name]}"
        # The demo has evaluation clips of its own, in place of YouCook2's.
        if trained["demo"] and name == "youcook2":
            path, prepare = flags.DEMO / "eval.h5", f"demo --out {flags.DEMO}"
        path = Path(getattr(args, name) or path)
        store = stores[name] = open_store(path, f"--{name}", prepare)
        embedder.check(store, f"--{name}", captions=name in RETRIEVAL)
        if name in RETRIEVAL:
            retrieval.check_captions(store, f"--{name}")
            if args.by_words and store.speech() is None:
                raise SystemExit(
                    f"--fusion {' '.join(args.fusion)}: {path} does not hold the words spoken in "
                    f"its clips; python -m mcn_ext.prepare {name} PICKLE --speech JSON adds them"
                )
            chosen[name] = list(range(len(store))), None
            if args.only:
                chosen[name] = gallery.choose(args.only, store, args.missing == "drop")
            if not directions:
                joined = f"no direction of {', '.join(modalities)} joins several"
                raise SystemExit(f"--fusion {' '.join(args.fusion)}: {joined}; use --fusion sum")
        elif "text" not in modalities and not alone:
            raise SystemExit(f"--{name}: {file} has no text encoder to ask with")
        if name in STEPS:
            try:
                steps[name] = localization.load_steps(path)
            except StoreError as error:
                raise SystemExit(f"--{name} {error}") from None
        if name == "moments" and args.annotations:
            sentences = moments.read_annotations(args.annotations, args.subset or "validation")
        elif name == "moments" and args.by_words:
            raise SystemExit(
                "--fusion words --moments: the captions would be both asked for and searched; "
                "give --annotations JSON"
            )
        elif name == "moments":
            sentences = moments.captions_of(store)
        if name == "youcook2" and args.whole_videos:
            ids = store.ids()
            videos = retrieval.videos_of([ids[i] for i in chosen[name][0]])
    # Sentences and steps need not be captions of a store, so learn_words is given them.
    texts = [text for _, _, said in sentences.values() for text in said]
    n_sentences = len(texts)
    for task in steps.values():
        texts += [text for video in task["videos"].values() for text in video["steps"]]

    metrics_file = run / "metrics.json"
    try:
        metrics = json.loads(metrics_file.read_text()) if metrics_file.exists() else {}
    except ValueError as error:
        raise SystemExit(f"{metrics_file}: damaged ({error}); move it away") from None
    bank = None
    # Before words of other stores are learnt: training's captions are read as in training.
    if any("bank" in fusion for fusion in args.fusion) and stores.keys() & set(RETRIEVAL):
        bank = retrieval.make_bank(embedder, trained, args.bank_size)
        embedder.say_shares(f"--fusion bank, {trained['data']}")

    # ------------------------------------------------------------------------------- protocols
    # Each yields (name in metrics.json, numbers, notices, table in Markdown), one or several.

    def find_clips(name, store):
        numbers, only = chosen[name]
        clips = embedder.clips(store, [(i, [(0, 0)]) for i in numbers])
        strict = name == "msrvtt"  # a clip without sound is a miss there
        # Fewer candidates are easier, so clips of the test set that are missing are misses.
        absent = max((args.msrvtt_clips or 1000) - len(store), 0) if strict else 0
        if only:
            absent = len(only["missing"]) if args.missing == "misses" else 0
        captions = [store.caption_texts(i)[0] for i in numbers]
        embedder.say_shares(store.path)
        words, best = None, {} if args.export else None
        if args.by_words:
            speech = np.array(store.speech(), object)[numbers].tolist()
            words = retrieval.WordScores(captions, speech)
        ranks, video_ranks, corner = retrieval.evaluate(
            clips,
            directions,
            kind=similarity,
            bank=bank,
            temperature=trained["temperature"],
            strict=strict,
            absent=absent,
            # --whole_videos is for YouCook2 alone.
            videos=None if strict else videos,
            words=words,
            best=best,
        )
        without = {m: int((~valid).sum()) for m, valid in clips[1].items() if not valid.all()}
        notices = [f"{n} without {m}: misses, or out of sums" for m, n in without.items()]
        if words:
            n = sum(map(bool, speech))
            notices.append(f"words spoken in {n} of {len(numbers)}, used in evaluation only")
        if args.export:
            ids = np.array(store.ids(), object)[numbers].tolist()
            ids += only["missing"] if only else [""] * absent
            exported.extend(gallery.rows(name, ids, captions, ranks, best))
            write_text(args.export, gallery.table(exported))
        if args.export_mteb:
            notices.append(gallery.write_mteb(args.export_mteb, name, ranks, str(store.path)))
        direction, rank = next(iter(ranks.items()))
        if only:
            notices.append(gallery.notice(only))
        elif absent:
            notices.append(
                f"{absent} of {len(rank)} clips (--msrvtt_clips) are not in the store: misses"
            )
        for key, found, what in (
            (name, ranks, "direction"),
            (f"{name}_videos", video_ranks, "whole videos"),
        ):
            if found:
                n = len(next(iter(found.values())))
                rows = {d: summarize(r) for d, r in found.items()}
                result = {"n": n, "without": without, "absent": absent} | rows
                result |= {"gallery": only} if only else {}
                lines = markdown(*table_rows(rows, n, what))
                if more := gains(found, retrieval.WORDS):
                    result["gains"] = more
                    lines += "\n\n" + markdown(*gain_rows(more))
                yield key, result, notices, lines
        similarity_picture(corner.numpy(), f"{name} {direction}", rank, run / "similarity.png")
        if args.keep_embeddings:
            # Embeddings trained on dot products can be larger than fp16 holds, so they stay fp32.
            kept = retrieval.arrays(clips, ranks, half=similarity == "cosine")
            replace(run / f"{name}.npz", lambda stream: np.savez(stream, **kept))

    def find_steps(name, store):
        score = localization.scorer(embedder, store, similarity)
        level = localization.LEVEL if args.background is None else args.background
        result = localization.localize(steps[name], score, background=level)
        embedder.say_shares(f"seconds and steps of {store.path}")
        lines = markdown(*localization.table_rows(result))
        yield name, {"n": result["steps"]} | result, [localization.notice(result)], lines

    def find_moments(name, store):
        fusions = ["words"] if alone else ["words+sum"] if args.by_words else ["sum"]
        asked = retrieval.asked(modalities, fusions)
        result = moments.evaluate(
            None if alone else embedder,
            store,
            sentences,
            [row for row in asked if row[0].startswith("text->")],
            similarity,
            args.windows or moments.LENGTHS,
            args.window_stride or moments.STRIDE,
        )
        embedder.say_shares(f"windows and sentences of {store.path}")
        about = {
            "annotations": str(args.annotations or store.path),
            "subset": args.annotations and (args.subset or "validation"),
        }
        notices, lines = [moments.notice(result)], markdown(*moments.table_rows(result))
        if not args.annotations and (n := store.n_captions - n_sentences):
            notices.append(f"{n} captions of no length: left out")
        yield name, about | result, notices, lines

    # -------------------------------------------------------------------------------- the loop
    protocols = dict.fromkeys(RETRIEVAL, find_clips) | dict.fromkeys(STEPS, find_steps)
    protocols["moments"] = find_moments
    for name, store in stores.items():
        # The run keeps the words of its training captions only; an evaluation set may use others.
        embedder.learn_words(store, () if name in RETRIEVAL else texts)
        try:
            for key, result, notices, lines in protocols[name](name, store):
                title = f"{run.name}: {title_of(store)}, {similarity}"
                title = "; ".join(filter(None, [title, unfinished, *notices]))
                print(printable(title), lines, sep="\n")
                about = {
                    "n": result["n"],
                    "data": str(store.path),
                    "checkpoint": str(file),
                    "step": content["step"],
                    "complete": content["complete"],
                    "similarity": similarity,
                }
                # Written after every table, so that an error in a later set loses no result.
                keep(metrics, key, about | result)
                write_text(metrics_file, json.dumps(metrics, indent=1) + "\n")
        except (FloatingPointError, StoreError) as error:
            # Embeddings that are not finite are an error: their ranks would mean nothing.
            raise SystemExit(f"--{name} {store.path}, {file}: {error}") from None
    print(printable(f"written: {metrics_file}"))
    if not alone:
        page = f"python -m mcn_ext.report {shlex.quote(str(run))}"
        print(printable(f"Next, a page of it all: {page}"))


if __name__ == "__main__":
    flags.run(main)
