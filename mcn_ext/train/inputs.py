"""What a stage reads before it starts: store, word vectors; and the checks that need no model."""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mcn_ext import __version__, distributed
from mcn_ext.data.clips import TrainingClips, collate, missing_inputs
from mcn_ext.data.shares import ANYWAY, judge
from mcn_ext.data.store import Store, StoreError
from mcn_ext.data.store_file import same_encoder
from mcn_ext.data.words import (
    WordVectors,
    coverage,
    require_gensim,
    train_vectors,
    vectors_for,
)
from mcn_ext.modalities import MODALITIES, PAIRS
from mcn_ext.objective import Objective
from mcn_ext.train import flags
from mcn_ext.train.checkpoint import WORDS
from mcn_ext.train.log import say

DEMO_BANNER = "\n".join(
    [
        "=" * 78,
        "  DEMO DATA (made up): these numbers say that it runs, nothing about real data",
        "=" * 78,
    ]
)
SAMPLE = 256  # clips that are looked at before the first step

# Flags that ranks may differ in: places, which are each machine's own.
OWN_FLAGS = {"device", "workers", "data", "word2vec", "init"}


def check_ranks(args: argparse.Namespace) -> None:
    """SystemExit, on every rank, if they were started with unlike flags or versions: each would
    train a model of its own, or wait for the others in vain."""
    mine = {f"--{key}": value for key, value in flags.as_dict(args).items() if key not in OWN_FLAGS}
    mine |= {"torch": torch.__version__, "mcn_ext": __version__}
    # Where these differ, a rank would wait for what the others never send.
    mine |= {name: os.environ.get(name) for name in ("MCN_LOSS", ANYWAY)}
    distributed.check_equal("flags or versions", mine)


def audio_streams(args: argparse.Namespace) -> list[str]:
    """The streams that --audio names; none for DAVEnet, which reads the spectrogram."""
    return [] if args.audio == "davenet" else args.audio.split(",")


def open_store(args: argparse.Namespace, modalities: str, sizes: dict | None = None) -> Store:
    """The training store (the demo's is made first). SystemExit if it lacks what is read, or has
    another width than the model to start from (of ``sizes``)."""
    try:
        if args.demo:
            from mcn_ext.prepare import demo

            say(DEMO_BANNER)
            if not flags.DATA.exists():
                say(f"  (no data at {flags.DATA.absolute()}; --data names others)")
            # Rank 0 makes the data; the others open them when they are complete.
            distributed.wait_for_first(
                lambda: demo.is_there(flags.DEMO) or demo.prepare(flags.DEMO)
            )
        store = Store(args.data)
    except (StoreError, OSError) as error:
        raise SystemExit(f"--data {error}") from None
    if lack := missing_inputs(store, modalities, audio_streams(args), args.text, sizes):
        advice = ". Prepare it with the features the run was trained on" if sizes else ""
        raise SystemExit(f"--data {args.data}: {lack}{advice}")
    return store


def identify(
    args: argparse.Namespace, store: Store, modalities: str, start: dict | None = None
) -> None:
    """Note in ``args`` what tells the data from others: ``data_id``; of captions' features also
    ``text_id``, what made them (``text_model``), and its ``text_sha256``. SystemExit, on every
    rank, if ranks have opened unlike stores, or another model made the features that the run to
    start from (of the flags ``start``) has learnt with; a warning for other data than its."""
    args.data_id = store.fingerprint()
    there = {"videos": len(store), "captions": store.n_captions, "streams": store.dims}
    if "T" in modalities and args.text != "words":
        args.text_id = store.fingerprint(args.text)
        there["caption features"] = args.text_id
    distributed.check_equal(f"data ({store.path})", there | {"content": args.data_id})
    if "T" in modalities and args.text != "words":
        args.text_model, args.text_sha256 = made = store.text_model(args.text)
        before = [(start or {}).get(key, "unknown") for key in ("text_model", "text_sha256")]
        if same_encoder(made, before) is False:
            raise SystemExit(
                f"--data {args.data}: its caption features {args.text!r} were made by {made[0]}, "
                f"those that {args.init} was trained on by {before[0]}, which has other weights"
            )
    if start and start.get("data_id", args.data_id) != args.data_id:
        say(f"WARNING: {args.data} holds other data than those that {args.init} was trained on")


def check_batch_size(args: argparse.Namespace, store: Store) -> None:
    """SystemExit if a batch does not fit the data or the ranks."""
    n_videos = int((store.caption_counts() > 0).sum())
    if not n_videos:
        raise SystemExit(
            f"--data {args.data}: no video in it has captions, which tell where clips begin and "
            "end; prepare it with captions"
        )
    n_ranks = args.n_ranks
    if n_videos < n_ranks:
        raise SystemExit(f"--data {args.data}: {n_videos} videos with captions for {n_ranks} ranks")
    # The largest batch that fits both; at least one video for each rank.
    fitting = min(args.batch_size, n_videos) // n_ranks * n_ranks or n_ranks
    # A video is at most once in a batch: an epoch of a larger one would have no step.
    if args.batch_size > n_videos:
        raise SystemExit(
            f"--batch_size {args.batch_size}: {args.data} has {n_videos} videos with captions; use "
            f"--batch_size {fitting} or less"
        )
    # The sampler cuts the global batch into equal parts.
    if args.batch_size % n_ranks:
        raise SystemExit(
            f"--batch_size {args.batch_size} videos do not divide by {n_ranks} ranks; use "
            f"--batch_size {fitting}"
        )


def check_added(added: str, pair: str, init: Path) -> None:
    """SystemExit if the modality ``added`` cannot be added to the run ``init`` of ``pair``."""
    if added in pair:
        fits = [f"--add {letter}" for letter in MODALITIES if letter not in pair]
        raise SystemExit(
            f"--add {added}: {init} was trained on {pair}, it has that modality already; use "
            + " or ".join([*fits, "another --init"])
        )


def check_inputs(args: argparse.Namespace, start: dict, pair: str) -> None:
    """SystemExit if stage 2 is given other inputs than stage 1's encoders learnt with."""
    word2vec = start.get("word2vec") or "vectors of its own"
    for letter, flag, before in (
        # Runs of earlier versions do not have the first two.
        ("A", "audio", start.get("audio") or "davenet"),
        ("T", "text", start.get("text") or "words"),
        ("T", "word2vec", word2vec if args.word2vec is not None else "None"),
    ):
        given = getattr(args, flag)
        if letter in pair and str(given) != str(before):
            raise SystemExit(
                f"--{flag} {given}: the {MODALITIES[letter].name} encoder of {args.init} was "
                f"trained on {before}; leave it out"
            )


def no_start(added: str) -> SystemExit:
    """The error of a stage 2 that finds no run to start from."""
    pair = next(pair for pair in PAIRS if added not in pair)
    demo = f" (demo runs are not taken, there is {data})" if (data := flags.real_data()) else ""
    return SystemExit(
        f"no stage-1 run without {added} in {Path('runs').absolute()}{demo}; train one (python "
        f"train_stage1.py --pair {pair}) or name one with --init"
    )


def check_gensim(args: argparse.Namespace, init: Path | None, folder: Path) -> None:
    """SystemExit if :func:`open_words` will need gensim and it is not installed, before a store or
    a run folder is made or moved."""
    # --no-resume moves the folder aside, and its words with it.
    kept = [run / WORDS for run in (init, folder if args.resume else None) if run is not None]
    # Vectors are trained on the captions only where neither a file nor a run has some.
    if args.word2vec is None and not any(path.exists() for path in kept):
        require_gensim()


def _words_beside(store: Path) -> Path:
    """Where the words of a store's captions are kept, as --word2vec has them."""
    return store.with_name(store.name + ".words.npz")


def open_words(
    args: argparse.Namespace, store: Store, init: Path | None, folder: Path, resumed: bool
) -> WordVectors:
    """Word vectors, kept in the run folder: the start run's, or --word2vec's, or trained here."""
    kept = folder / WORDS

    def find() -> WordVectors:
        if resumed and kept.exists():
            return WordVectors.load(kept)
        if init is not None and (init / WORDS).exists():
            words = WordVectors.load(init / WORDS)
        elif args.word2vec is not None:
            words = vectors_for(store, args.word2vec, _words_beside(store.path))
        else:
            say(f"no --word2vec: training word vectors on {store.n_captions} captions")
            words = train_vectors(store, seed=args.seed)
        folder.mkdir(parents=True, exist_ok=True)
        # Evaluation and stage 2 need the same vectors, wherever --word2vec lies by then.
        words.save(kept)
        return words

    # None on all ranks but the first: they read what it has saved.
    return distributed.wait_for_first(find) or WordVectors.load(kept)


def read_sample(clips: TrainingClips) -> dict[str, Tensor]:
    """About SAMPLE clips of videos drawn at random, the same on every rank, as one batch: what the
    checks before the first step look at."""
    # One clip of each of many videos says more of the data than many clips of one.
    n = min(SAMPLE, len(clips))
    videos = np.random.default_rng(0).choice(len(clips), n, replace=False)
    few = TrainingClips(
        clips.reader,
        n_pair=min(clips.n_pair, math.ceil(SAMPLE / n)),
        min_time=clips.min_time,
        seed=clips.seed,
    )
    return collate([few[0, int(video)] for video in sorted(videos)])


def check_content(
    sample: dict[str, Tensor], store: Store, words: WordVectors | None, refuse: bool
) -> None:
    """Say how many clips have each modality, and how many words of the captions are known; warn
    where it is less than half. SystemExit, if ``refuse``, where it is less than a tenth."""
    shares = {
        f"clips with {key.removeprefix('valid.')}": float(valid.float().mean())
        for key, valid in sample.items()
        if key.startswith("valid.")
    }
    say(
        f"  of {len(sample['clip_id'])} clips looked at: "
        + ", ".join(f"{share:.0%} {name.removeprefix('clips ')}" for name, share in shares.items())
    )
    # A pass over up to 200,000 captions, which one rank makes.
    known = words and distributed.broadcast_object(
        coverage(store, words) if distributed.rank() == 0 else None
    )
    if known:
        shares["captions with a known word"] = 1 - known.n_without / max(1, known.n_captions)
        source = words.source.partition(" #")[0]  # what follows tells versions of the file apart
        say(
            f"  words: {known.n_known:,} of {known.n_words:,} known ({source}), captions without "
            f"any: {known.n_without:,} of {known.n_captions:,}"
        )
    error, warnings = judge(shares, refuse)
    if error:
        distributed.fail(f"--data {store.path}: {error}")
    for warning in warnings:
        say(f"WARNING: {warning}")


def warn_of_clusters(objective: Objective, n_clips: int, total_steps: int) -> None:
    """Say if a run of ``total_steps`` steps of ``n_clips`` clips will never cluster."""
    clusters = objective.clusters
    if clusters is None:
        return
    n_steps, n_rows = clusters.queue_size, clusters.queue_size * n_clips
    if n_rows < clusters.k:
        say(
            f"  NO clustering will take place: --queue_size {n_steps} steps of {n_clips} clips are "
            f"fewer clips than --cluster_size {clusters.k}; use --cluster_size {n_rows // 4 or 1} "
            "or less"
        )
    # The first fit comes after step n_steps and is used from the next step on.
    elif n_steps >= total_steps:
        say(
            f"  NO clustering will take place: with --queue_size {n_steps} the first fit is at "
            f"step {n_steps}, the run has {total_steps}; lower it, or raise --epochs"
        )
