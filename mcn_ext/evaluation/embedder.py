"""A trained run as an encoder: clips of a store, stretches of a video, sentences -> embeddings."""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from mcn_ext import distributed
from mcn_ext.console import printable
from mcn_ext.data.batch import fill_up
from mcn_ext.data.clips import ClipReader, collate, missing_inputs, to_device
from mcn_ext.data.shares import judge
from mcn_ext.data.store import Store, StoreError
from mcn_ext.data.store_file import same_encoder
from mcn_ext.data.words import WordVectors, tokenize, vectors_for
from mcn_ext.evaluation.retrieval import Clips
from mcn_ext.model import MCN
from mcn_ext.train import checkpoint, flags

AUDIO_FRAMES = 5120  # as published: up to 51 s of a clip are heard in evaluation


class Embedder:
    """The model of a checkpoint in eval mode, with all that its inputs are read by.

    ``run``, ``file``, ``content``: of the checkpoint that --run and --checkpoint name, else of the
    newest run (``chosen``: one of the demo data is not used on others). SystemExit if none is.

    Everything it returns is ({modality: (n, D) fp32}, {modality: (n,) bool}) on the CPU: the
    embeddings, not normalised, and which of them have content.
    """

    def __init__(self, args: argparse.Namespace):
        self.run, self.file = open_run(args.run, args.checkpoint)
        self.chosen = not (args.run or args.checkpoint)
        self.content = checkpoint.load(self.file)
        self.sizes, self.args = self.content["sizes"], self.content["args"]
        # Checkpoints of earlier versions do not say what audio and text read.
        self.text, self.encoder_at = self.sizes.get("text", "words"), args.encoder
        self.words = None  # that the text encoder was trained on, and that are learnt since
        if "T" in self.sizes["modalities"] and self.text == "words":
            try:
                self.words = WordVectors.load(self.run / checkpoint.WORDS)
            except Exception as error:  # damage makes zip and numpy raise a dozen types
                raise SystemExit(
                    f"--run {self.run}: {checkpoint.WORDS}, the words the text encoder was trained "
                    f"on, cannot be read from it ({error}); is it the run's own folder?"
                ) from error
        # Without a file, where vectors were trained on captions, no further words can be known.
        self.word2vec = self.words and self.args["word2vec"] and Path(self.args["word2vec"])
        if self.word2vec and not self.word2vec.exists():
            missing = printable(self.word2vec.absolute())
            print(f"{missing} is gone: only words of the training captions are known")
            self.word2vec = None
        self.device, self.batch_size = distributed.init(args.device), args.batch_size
        # In eval mode an embedding does not depend on the other clips of the batch.
        self.model = MCN(**self.sizes).to(self.device).eval()
        checkpoint.load_weights(self.run, self.model, self.content["model"])
        # Of published weights, to which whole clips and sentences are filled up.
        self.padding = self.content.get("padding")
        self.counts = defaultdict(lambda: np.zeros(2, int))

    def say_shares(self, where: object) -> None:
        """Print how much of what was embedded since the last time has content, by modality; a text
        has, if one of its words is known. Too little is a warning or a SystemExit, since numbers
        of a few say nothing of the rest: :func:`mcn_ext.data.shares.judge`."""
        shares = {f"with {name}": n / max(of, 1) for name, (n, of) in self.counts.items()}
        counts = ", ".join(
            f"{name} in {n} of {of} ({n / max(of, 1):.0%})" for name, (n, of) in self.counts.items()
        )
        # The next data set is counted by itself.
        self.counts.clear()
        print(printable(f"{where}: {counts}"))
        error, warnings = judge(shares)
        if error:
            raise SystemExit(f"{where}: {error}")
        for warning in warnings:
            print(f"WARNING: {warning}")

    @cached_property
    def encoder(self):
        """The sentence encoder whose features the run was trained on; SystemExit without it."""
        from mcn_ext.data.sentence import SentenceEncoder  # of libraries that few have

        wanted = self.args.get("text_sha256", "unknown")
        name = self.encoder_at or self.args.get("text_model", "unknown")
        if name == "unknown":
            raise SystemExit(
                f"--run {self.run}: it was trained on captions' features {self.text!r}, and which "
                "encoder made them is not known; name it with --encoder"
            )
        try:
            encoder = SentenceEncoder(name, self.device)
        except SystemExit as error:
            raise SystemExit(
                f"--run {self.run}: its texts go through {name} (--encoder: where it is now), "
                f"which cannot be loaded: {error}"
            ) from None
        if wanted == "unknown":
            print(f"WARNING: whether {printable(name)} is the encoder of training is not known")
        if wanted not in ("unknown", encoder.sha256) or encoder.dim != self.sizes["word_dim"]:
            raise SystemExit(
                f"--encoder {name}: not the encoder whose features the run was trained on "
                f"({self.args['text_model']}, SHA-256 {wanted[:12]}): it is {encoder.dim} wide, "
                f"SHA-256 {encoder.sha256[:12]}"
            )
        return encoder

    def check(self, store: Store, flag: str, captions: bool = True) -> None:
        """SystemExit if the model cannot read the store, named by ``flag`` and its path; without
        ``captions``, its texts are not read, but others asked for."""
        if self.chosen and self.args["demo"] and not is_demo(store):
            raise SystemExit(
                f"{flag} {store.path}: the newest run here is of the demo data, which says nothing "
                "about this store; name a run with --run"
            )
        read = self.sizes["modalities"].replace("T", "T" if captions else "")
        audio = self.sizes.get("audio_dims") or ()
        if lack := missing_inputs(store, read, audio, self.text, self.sizes):
            raise SystemExit(
                f"{flag} {store.path}: {lack}. Prepare it with the features the run was trained "
                "on, or use another run"
            )
        if self.text == "words" or "T" not in self.sizes["modalities"]:
            return
        if not captions:
            _ = self.encoder  # loaded now: an error after hours would be too late
            return
        made = store.text_model(self.text)
        trained = tuple(self.args.get(key, "unknown") for key in ("text_model", "text_sha256"))
        same = same_encoder(made, trained)
        if same is None:
            where = printable(f"{flag} {store.path}")
            print(f"WARNING: {where}: whether the run's encoder made its features is not known")
        if same is False:
            raise SystemExit(
                f"{flag} {store.path}: its caption features {self.text!r} are of other weights "
                f"({', '.join(made)}) than those the run was trained on ({', '.join(trained)}); "
                "make them again with python -m mcn_ext.prepare caption_features --overwrite"
            )

    def unknown_words(self, sentences: list[str]) -> list[str]:
        """Words of the sentences without a vector; an encoder of sentences knows all words."""
        if self.words is None:
            return []
        asked = {word for sentence in sentences for word in tokenize(sentence)}
        return sorted(word for word in asked if not self.words.find(word))

    def learn_words(self, store: Store, more: Iterable[str] = ()) -> None:
        """Also the words of a store's captions and of ``more`` texts, from the word2vec file; what
        was read is kept beside the store."""
        if self.word2vec is None:
            return
        cache = store.path.with_name(store.path.name + ".words.npz")
        words = vectors_for(store, self.word2vec, cache, more)
        # The text encoder has learnt the vectors of one file; others mean nothing to it.
        if not self.words.agrees(words):
            raise SystemExit(
                f"{self.word2vec} is not the file the run was trained with; put that "
                "back, or move this one away"
            )
        self.words = words

    def _reader(self, store: Store | None, words: bool, audio_frames: int = AUDIO_FRAMES):
        return ClipReader(
            store,
            self.sizes["modalities"],
            video_streams=self.sizes["video_dims"],
            audio_streams=self.sizes.get("audio_dims") or (),
            text=self.text,
            words=self.words if words else None,
            # Runs of the first edition could be trained with another number.
            max_words=self.args.get("max_words", 20),
            audio_frames=audio_frames,
        )

    def _slices(self, n: int) -> list[slice]:
        return [slice(lo, lo + self.batch_size) for lo in range(0, n, self.batch_size)]

    @torch.inference_mode()
    def _embed(
        self, batches: Iterable[list[dict]], names: Iterable[str], padding: dict | None = None
    ) -> Clips:
        """Batches of lists of what a reader returns."""
        table = None
        if "text" in names and self.words is not None:
            # Copied anew each time, since learn_words may have replaced the words.
            table = torch.from_numpy(self.words.vectors).to(self.device)
        embeddings, valid = {m: [] for m in names}, {m: [] for m in names}
        for items in batches:
            batch = to_device(collate(items), self.device, table)
            if padding:
                batch = fill_up(batch, **padding)
            for name in names:
                there = batch["valid"][name].cpu()
                # encode and not embed: the reconstruction is of training alone.
                embeddings[name].append(self.model.encode(name, batch)[1].float().cpu())
                valid[name].append(there)
                self.counts[name] += int(there.sum()), len(there)
        return (
            {m: torch.cat(e) for m, e in embeddings.items()},
            {m: torch.cat(v) for m, v in valid.items()},
        )

    def clips(
        self,
        store: Store,
        clips: Iterable[tuple[int, list[tuple[int, int]]]] | None = None,
        audio_frames: int = AUDIO_FRAMES,
    ) -> Clips:
        """Clips (video, spans) as :meth:`.ClipReader.read` takes them; by default the
        first caption's of every video, which is an evaluation store's only one."""
        clips = [(i, [(0, 0)]) for i in range(len(store))] if clips is None else list(clips)
        reader = self._reader(store, True, audio_frames)
        slices = tqdm(self._slices(len(clips)), desc="embed", unit="batch", mininterval=0.5)
        # Without the augmentation of training: read() gets no random numbers.
        batches = ([reader.read(*clip) for clip in clips[part]] for part in slices)
        return self._embed(batches, self.model.modalities, self.padding)

    def stretches(self, store: Store, video: int, begin: np.ndarray, stop: np.ndarray) -> Clips:
        """What is seen and heard of a video from ``begin`` to ``stop`` (n,) s, without text. Sound
        is never filled up: the published 51 s were for whole clips, and a window is seconds."""
        reader = self._reader(store, False)
        batches = ([reader.cut(video, begin[p], stop[p])] for p in self._slices(len(begin)))
        return self._embed(batches, [m for m in self.model.modalities if m != "text"])

    def texts(self, texts: list[str]) -> Clips:
        """Sentences; one without a known word is not valid."""
        reader, slices = self._reader(None, True), self._slices(len(texts))
        if self.words is None:
            # In fp16, as those of training lie in the store.
            rows = self.encoder.encode(texts).astype(np.float16)
            batches = ([reader.as_tokens(list(rows[part, None]))] for part in slices)
        else:
            batches = ([reader.look_up(texts[part])] for part in slices)
        return self._embed(batches, ["text"], self.padding)


class NoRun:
    """In the place of an :class:`Embedder` where clips are compared by words alone."""

    run, file, content = Path("runs/words"), "no run", {"step": None, "complete": True}
    args = {"demo": False, "similarity": "BM25", "temperature": 1.0}
    model = argparse.Namespace(modalities=())

    def check(self, *args, **kwargs) -> None:
        self.run.mkdir(parents=True, exist_ok=True)

    def say_shares(self, where: object) -> None:
        pass

    def learn_words(self, *args) -> None:
        pass

    def clips(self, *args) -> Clips:
        return {}, {}


def is_demo(store: Store) -> bool:
    return store.source.startswith("demo data")


def title_of(store: Store) -> str:
    return f"{store.path}{' (DEMO DATA, made up)' if is_demo(store) else ''}"


def open_store(path: Path, flag: str, prepare: str) -> Store:
    """The store that a flag names; SystemExit says how to make one (``prepare``: arguments)."""
    if not path.exists():
        raise SystemExit(
            f"{flag} {path}: no such store ({path.absolute()}); correct the path or the folder you "
            f"are in, or make it: python -m mcn_ext.prepare {prepare}"
        )
    try:
        return Store(path)
    except StoreError as error:
        raise SystemExit(f"{flag} {error}") from None


def open_run(run: Path | None, file: Path | None) -> tuple[Path, Path]:
    """(run folder, checkpoint) of --run and --checkpoint, or of the newest run. One of the demo
    data is named, unless there is neither another run nor other data."""
    # Resolved: the same folder may be written in two ways.
    if run and file and run.resolve() != file.parent.resolve():
        raise SystemExit(
            f"--checkpoint {file} does not lie in --run {run}, whose results it would "
            "replace; leave out one of them"
        )
    if not run and not file:
        runs = Path("runs")
        data = flags.real_data() or next(filter(Path.exists, flags.STORES.values()), None)
        run = checkpoint.find_run(runs, demo=data is None)
        if run is None:
            demo = data and checkpoint.find_run(runs)
            raise SystemExit(
                f"no run in {runs.absolute()}"
                + (f" but {demo.name}, of the demo data, and there is {data}" if demo else "")
                + "; train one (python train_stage1.py --pair AV) or name one with --run"
            )
        print(f"the newest run, {printable(run.absolute())} (--run for another)")
    run = run or file.parent
    return run, file or run / checkpoint.LATEST
