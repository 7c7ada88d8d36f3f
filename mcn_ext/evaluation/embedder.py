"""A trained run as an encoder: clips of a store, stretches of a video, sentences -> embeddings."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from mcn_ext.data.batch import fill_up
from mcn_ext.data.clips import ClipReader, collate, lacking_streams, to_device
from mcn_ext.data.store import Store, StoreError
from mcn_ext.data.words import WordVectors, vectors_for
from mcn_ext.evaluation.retrieval import Clips
from mcn_ext.model import MCN
from mcn_ext.train import checkpoint

WORDS = "words.npz"  # in a run folder
AUDIO_FRAMES = 5120  # as published: up to 51 s of a clip are heard in evaluation


class Embedder:
    """The model of a checkpoint in eval mode, with all that its inputs are read by.

    Args:
        content: as :func:`~mcn_ext.train.checkpoint.load` returns it: sizes, args, model; of
            published weights ``padding``, too, to which :func:`~mcn_ext.data.batch.fill_up` fills
            whole clips and sentences up.
        words: vectors the text encoder was trained on; None without text.
        batch_size: clips at a time.

    Everything it returns is ({modality: (n, D) fp32}, {modality: (n,) bool}) on the CPU: the
    embeddings, not normalised, and which of them have content.
    """

    def __init__(
        self, content: dict, words: WordVectors | None, device: torch.device, batch_size: int = 64
    ):
        self.sizes, self.args, self.device = content["sizes"], content["args"], device
        self.model = MCN(**self.sizes).to(device).eval()
        self.model.load_state_dict(content["model"])
        self.padding = content.get("padding")
        self.known = self.words = words
        self.batch_size = batch_size
        self.word2vec = Path(self.args["word2vec"]) if self.args["word2vec"] and words else None
        if self.word2vec is not None and not self.word2vec.exists():
            print(f"{self.word2vec} is gone: only words of the training captions are known")
            self.word2vec = None

    def check(self, store: Store, flag: str) -> None:
        """SystemExit if the model cannot read the store, named by ``flag`` and its path."""
        sizes = self.sizes
        if lack := lacking_streams(store.dims, sizes["modalities"], sizes["video_dims"]):
            raise SystemExit(
                f"{flag} {store.path}: {lack}. Prepare it with the features the run was trained "
                "on, or use another run"
            )

    def learn_words(self, store: Store, more: Iterable[str] = ()) -> None:
        """Also the words of a store's captions and of ``more`` texts, from the word2vec file; what
        was read is kept beside the store."""
        if self.word2vec is None:
            return
        self.words = vectors_for(
            store, self.word2vec, store.path.with_name(store.path.name + ".words.npz"), more
        )
        if not self.known.agrees(self.words):
            raise SystemExit(
                f"{self.word2vec} is not the file the run was trained with; put that "
                "back, or move this one away"
            )

    def _reader(
        self, store: Store | None, words: WordVectors | None, audio_frames: int = AUDIO_FRAMES
    ) -> ClipReader:
        return ClipReader(
            store,
            self.sizes["modalities"],
            video_streams=self.sizes["video_dims"],
            words=words,
            max_words=self.args.get("max_words", 20),
            audio_frames=audio_frames,
        )

    @torch.inference_mode()
    def _embed(
        self,
        batches: Iterable[list[dict]],
        names: list[str],
        words: WordVectors | None = None,
        padding: dict | None = None,
    ) -> Clips:
        """Batches of lists of what a reader returns."""
        table = None if words is None else torch.from_numpy(words.vectors).to(self.device)
        embeddings, valid = {m: [] for m in names}, {m: [] for m in names}
        for items in batches:
            batch = to_device(collate(items), self.device, table)
            if padding:
                batch = fill_up(batch, **padding)
            for name in names:
                embeddings[name].append(self.model.encode(name, batch)[1].float().cpu())
                valid[name].append(batch["valid"][name].cpu())
        return (
            {m: torch.cat(e) for m, e in embeddings.items()},
            {m: torch.cat(v) for m, v in valid.items()},
        )

    def clips(
        self,
        store: Store,
        clips: Iterable[tuple[int, list[tuple[int, int]]]] | None = None,
        *,
        audio_frames: int = AUDIO_FRAMES,
        known_words: bool = False,
    ) -> Clips:
        """Clips (video, spans) as :meth:`.ClipReader.read` takes them; by default the
        first caption's of every video, which is an evaluation store's only one. ``known_words``:
        read with the words of training alone, whatever has been learnt since."""
        clips = [(i, [(0, 0)]) for i in range(len(store))] if clips is None else list(clips)
        words = self.known if known_words else self.words
        reader = self._reader(store, words, audio_frames)
        starts = tqdm(
            range(0, len(clips), self.batch_size), desc="embed", unit="batch", mininterval=0.5
        )
        embeddings, valid = self._embed(
            ([reader.read(*clip) for clip in clips[b : b + self.batch_size]] for b in starts),
            self.model.modalities,
            words,
            self.padding,
        )
        if clips and "text" in valid and not valid["text"].any():
            print(
                f"{store.path}: not one caption has a word that the run knows, so every text "
                f"query is a miss; it knows those of {self.word2vec or 'its training captions'}"
            )
        return embeddings, valid

    def stretches(self, store: Store, video: int, begin: np.ndarray, stop: np.ndarray) -> Clips:
        """What is seen and heard of a video from ``begin`` to ``stop`` (n,) s, without text. Sound
        is never filled up: the published 51 s were for whole clips, and a window is seconds."""
        reader = self._reader(store, None)
        return self._embed(
            (
                [reader.cut(video, begin[b : b + self.batch_size], stop[b : b + self.batch_size])]
                for b in range(0, len(begin), self.batch_size)
            ),
            [m for m in self.model.modalities if m != "text"],
        )

    def texts(self, texts: list[str]) -> Clips:
        """Sentences; one without a known word is not valid."""
        reader = self._reader(None, self.words)
        return self._embed(
            (
                [reader.look_up(texts[b : b + self.batch_size])]
                for b in range(0, len(texts), self.batch_size)
            ),
            ["text"],
            self.words,
            self.padding,
        )


def open_store(path: Path, flag: str, prepare: str) -> Store:
    """The store that a flag names; SystemExit says how to make one (``prepare``: arguments)."""
    if not path.exists():
        raise SystemExit(
            f"{flag} {path}: no such store; make it with: python -m mcn_ext.prepare {prepare} "
            f"--out {path}"
        )
    try:
        return Store(path)
    except StoreError as error:
        raise SystemExit(f"{flag} {error}") from None


def open_run(run: Path | None, file: Path | None) -> tuple[Path, Path, dict]:
    """(run folder, file, its content) of --run and --checkpoint, or of the newest run."""
    if run and file and run.resolve() != file.parent.resolve():
        raise SystemExit(
            f"--checkpoint {file} does not lie in --run {run}, whose results it would "
            "replace; leave out one of them"
        )
    if not run and not file:
        run = checkpoint.find_run(Path("runs"))
        if run is None:
            raise SystemExit(
                "no run in runs/; train one (python train_stage1.py --pair AV) or "
                "name one with --run"
            )
        print(f"the newest run, {run} (--run for another)")
    run = run or file.parent
    file = file or run / checkpoint.LATEST
    return run, file, checkpoint.load(file)


def words_of(run: Path, content: dict) -> WordVectors | None:
    """The word vectors that lie in a run folder; None for a run without text."""
    if "T" not in content["sizes"]["modalities"]:
        return None
    if not (run / WORDS).exists():
        raise SystemExit(
            f"--run {run}: no {WORDS} in it, the words the text encoder was "
            "trained on; is it the run's own folder?"
        )
    return WordVectors.load(run / WORDS)
