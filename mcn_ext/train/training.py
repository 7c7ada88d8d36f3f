"""One training run: all but its loop, which the scripts show."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from mcn_ext import distributed
from mcn_ext.data.clips import (
    ClipReader,
    Loader,
    TrainingClips,
    default_workers,
    lack_of_shared_memory,
    to_device,
)
from mcn_ext.data.store import Store, StoreError
from mcn_ext.data.words import WordVectors, is_kept, require_gensim, train_vectors, vectors_for
from mcn_ext.microbatch import MicroBatched
from mcn_ext.model import MCN, MODALITIES
from mcn_ext.objective import Objective
from mcn_ext.train import checkpoint, dry_run, flags
from mcn_ext.train.diagnostics import diagnose, signs_of_collapse
from mcn_ext.train.guard import Guard
from mcn_ext.train.heartbeat import Heartbeat
from mcn_ext.train.interrupt import StopRequest
from mcn_ext.train.log import RunLog, say
from mcn_ext.train.replay import replay

DEMO_BANNER = "\n".join(
    [
        "=" * 78,
        "  DEMO DATA (made up): these numbers say that it runs, nothing about real data",
        "=" * 78,
    ]
)
WORDS = "words.npz"


def open_store(args: argparse.Namespace, modalities: str) -> Store:
    """The training store (the demo's is made first), with all that the modalities need."""
    try:
        if args.demo:
            from mcn_ext.prepare import demo

            say(DEMO_BANNER)
            # Dials of noise that a user has turned stay: what is there is used as it is.
            distributed.first_rank_first(
                lambda: demo.is_there(flags.DEMO) or demo.prepare(flags.DEMO)
            )
        store = Store(args.data)
    except (StoreError, OSError) as error:
        raise SystemExit(f"--data {error}") from None
    if "A" in modalities and "mel" not in store.dims:
        raise SystemExit(
            f"--data {args.data}: no stream 'mel' for audio in it, only {', '.join(store.dims)}"
        )
    if "V" in modalities and not video_dims(store):
        raise SystemExit(f"--data {args.data}: no video stream in it, only {', '.join(store.dims)}")
    return store


def video_dims(store: Store) -> dict[str, int]:
    """Streams a video is embedded from, with their widths: all but the spectrogram."""
    return {name: dim for name, dim in store.dims.items() if name != "mel"}


def check_widths(store: Store, sizes: dict, flag: str) -> None:
    """SystemExit if a model of ``sizes`` cannot read the store's video streams."""
    if "V" not in sizes["modalities"]:
        return
    wrong = [
        f"{name} is {store.dims.get(name, 'missing')}, the model was trained on {dim}"
        for name, dim in sizes["video_dims"].items()
        if store.dims.get(name) != dim
    ]
    if wrong:
        raise SystemExit(
            f"{flag} {store.path}: {'; '.join(wrong)}. Prepare it with the features "
            "the run was trained on, or use another run"
        )


def check_gensim(args: argparse.Namespace, init: Path | None, folder: Path) -> None:
    """SystemExit if :func:`open_words` will need gensim and it is not installed, before a store or
    a run folder is made or moved."""
    kept = [run / WORDS for run in (init, folder if args.resume else None) if run is not None]
    if not any(path.exists() for path in kept) and not (
        args.word2vec and is_kept(args.word2vec, _words_beside(args.data))
    ):
        require_gensim(args.word2vec)


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
        words.save(kept)
        return words

    words = find() if distributed.rank() == 0 else None
    distributed.barrier()
    return words or WordVectors.load(kept)


def objective_of(
    args: argparse.Namespace, modalities: str, trained: str, first: str | None = None
) -> Objective:
    """``first``: the first stage's pair, for --clean_first."""
    names = (
        "temperature",
        "margin",
        "similarity",
        "loss_impl",
        "cluster_weight",
        "recon_weight",
        "cluster_size",
        "queue_size",
        "refit_every",
        "seed",
        "joint_pairs",
    )
    return Objective(
        [MODALITIES[m] for m in modalities],
        [MODALITIES[m] for m in trained],
        clean_first=args.clean_first if first else 0.0,
        first=first and tuple(MODALITIES[m] for m in first),
        **{name: getattr(args, name) for name in names},
    )


class Training:
    """Data, optimiser, schedule, precision, checkpoints and log around a model and an objective.

    Attributes: ``net`` (the model, wrapped for several ranks), ``step`` (steps done), ``done``.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        folder: Path,
        store: Store,
        words: WordVectors | None,
        model: MCN,
        objective: Objective,
        device: torch.device,
        resumed: dict | None,
    ):
        self.args, self.folder, self.device = args, folder, device
        self.model, self.objective = model, objective
        world = distributed.world()
        self.reader = reader = ClipReader(
            store,
            video_streams=tuple(model.sizes["video_dims"]) if "video" in model.modalities else (),
            audio="audio" in model.modalities,
            words=words,
            audio_frames=args.audio_frames,
            max_words=args.max_words,
            audio_augment=args.audio_augment,
        )
        clips = TrainingClips(reader, n_pair=args.n_pair, min_time=args.min_time, seed=args.seed)
        if args.batch_size > len(clips):
            raise SystemExit(
                f"--batch_size {args.batch_size}: {args.data} has {len(clips)} videos "
                f"with captions; use --batch_size {len(clips)} or less"
            )
        if args.batch_size % world:
            fitting = args.batch_size // world * world or world
            raise SystemExit(
                f"--batch_size {args.batch_size} videos do not divide by {world} "
                f"ranks; use --batch_size {fitting}"
            )
        workers = default_workers(device) if args.workers is None else args.workers
        # A run begun before there was first_epoch goes on with the clips it had.
        begun = (resumed or {}).get("args", {"first_epoch": getattr(args, "first_epoch", 0)})
        self.loader = Loader(clips, args.batch_size, workers, device, begun.get("first_epoch", 0))
        self.total_steps = args.epochs * self.loader.steps_per_epoch
        self.last_step = min(self.total_steps, args.max_steps or self.total_steps)
        self.warmup = args.warmup_steps
        if self.warmup is None:
            self.warmup = min(1000, math.ceil(self.total_steps / 10))
        self.table = torch.from_numpy(words.vectors).to(device) if words is not None else None

        trained = [p for p in model.parameters() if p.requires_grad]
        # One pass over each parameter. (A run begun without goes on without: its checkpoint says.)
        self.optimizer = torch.optim.Adam(trained, lr=args.lr, fused=True)
        has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = args.precision or ("bf16" if has_bf16 else "fp32")
        self.amp_dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self.guard = Guard(
            model,
            objective,
            self.optimizer,
            self.scaler,
            folder,
            max_bad_steps=args.max_bad_steps,
            outliers=args.grad_outliers,
            factor=args.grad_factor,
            describe=reader.describe,
        )
        self.warned: set[str] = set()
        self.step, self.run_id = 0, checkpoint.new_run_id()
        torch.manual_seed(args.seed + distributed.rank())  # where models draw, ranks differ
        if resumed is not None:
            self._resume(resumed)
        self.saved = self.step
        if len(set(distributed.gather_objects(self.step))) > 1:
            raise SystemExit(
                f"ranks see different checkpoints in {folder}: put --out on a disk "
                "that all of them share"
            )
        self.net = model
        if args.micro_batch:
            self.net = MicroBatched(model, args.micro_batch, self.autocast)
        elif world > 1:
            self.net = DistributedDataParallel(model)
            if device.type == "cpu":
                self.net.register_comm_hook(None, distributed.mean_in_rank_order)
        self.done = self.step >= self.last_step and args.detect is None
        if self.done or args.detect is not None:
            return
        n_clips, dropped = args.batch_size * args.n_pair, clips.n_without_captions
        fixed = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in trained)
        say(
            f"{folder}: {f'going on at step {self.step}' if self.step else 'new run'} of "
            f"{self.total_steps} ({args.epochs} epochs x {self.loader.steps_per_epoch} steps), "
            f"{len(clips)} videos of {args.data}"
            + (f" ({dropped} without captions left out)" if dropped else "")
        )
        say(
            f"  a step: {args.batch_size} videos x {args.n_pair} clips = {n_clips} clips on "
            f"{world} rank(s), {n_clips // world} each; {precision}, {device}; "
            f"{sum(p.numel() for p in trained) / 1e6:.1f} M parameters learn, {fixed / 1e6:.1f} M "
            "are fixed"
        )
        if lack := lack_of_shared_memory(reader, n_clips // world, workers):
            say(f"  WARNING: {lack}")
        clusters = objective.clusters
        if clusters and n_clips * clusters.queue_size < clusters.k:
            say(
                f"  NO clustering will take place: --queue_size {clusters.queue_size} steps of "
                f"{n_clips} clips are fewer clips than --cluster_size {clusters.k}; use "
                f"--cluster_size {n_clips * clusters.queue_size // 4 or 1} or less"
            )
        elif clusters and clusters.first_fit >= self.total_steps:
            say(
                f"  NO clustering will take place: with --queue_size {clusters.queue_size} and "
                f"--refit_every {clusters.refit_every} the first fit is at step "
                f"{clusters.first_fit}, the run has {self.total_steps}; lower both, or raise "
                "--epochs"
            )
        self.log_ = RunLog(
            folder,
            flags.as_dict(args),
            device,
            step=self.step,
            total_steps=self.total_steps,
            last_step=self.last_step,
        )
        self.stop, self.heartbeat = StopRequest(), Heartbeat(args.hang_minutes)

    def _resume(self, content: dict) -> None:
        if content["args"].get("n_ranks") != distributed.world():
            say(
                f"resuming on {distributed.world()} rank(s) what ran on "
                f"{content['args'].get('n_ranks')}: the same batches and losses, but sums round "
                "differently, and random numbers are drawn anew"
            )
        self.model.load_state_dict(content["model"])
        state = content["training"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if "guard" in state:
            self.guard.load_state_dict(state["guard"])
        if self.objective.clusters is not None:
            self.objective.clusters.load_state_dict(state["clusters"], self.device)
        self.step, self.run_id = content["step"], content["run_id"]
        if len(state.get("rng", ())) == distributed.world():
            rng = state["rng"][distributed.rank()]
            torch.set_rng_state(rng["cpu"])
            if "cuda" in rng and self.device.type == "cuda":
                torch.cuda.set_rng_state(rng["cuda"], self.device)

    def epochs(self) -> Iterator[int]:
        """Epochs left, from 1."""
        first = self.step // self.loader.steps_per_epoch
        for epoch in range(first, self.args.epochs):
            if self.step < self.last_step:
                yield epoch + 1

    def batches(self, epoch: int) -> Iterator[dict]:
        """Batches of an epoch on the device, from where a resumed run stood."""
        start = self.step - (epoch - 1) * self.loader.steps_per_epoch
        self.heartbeat.at(self.step + 1, "reading")
        for batch in self.log_.timed(self.loader.epoch(epoch, start)):
            self.heartbeat.at(self.step + 1, "computing")
            self.guard.before()
            self.objective.progress = self.step / self.total_steps
            yield to_device(batch, self.device, self.table)
            if self.step >= self.last_step:
                return
            self.heartbeat.at(self.step + 1, "reading")

    def autocast(self):
        """The encoders' precision; losses and clustering leave it again."""
        enabled = self.amp_dtype is not None
        return torch.autocast(self.device.type, dtype=self.amp_dtype, enabled=enabled)

    def learning_rate(self) -> float:
        """Linear warm-up, then half a cosine to 0 at the last step; skipped steps do not count."""
        step = self.step - self.guard.skipped
        if step < self.warmup:
            return self.args.lr * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.total_steps - self.warmup)
        return self.args.lr * 0.5 * (1 + math.cos(math.pi * progress))

    def update(self, total: torch.Tensor) -> None:
        """Backward and one Adam step; none, and a report, when the loss or a gradient is bad."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(total).backward()
        if self.args.micro_batch:
            self.net.backward()  # on from the embeddings' gradients to the encoders'
        self.step += 1
        why, self.skip_row = self.guard.check(total, bool(self.stop.came)), None
        if why:
            self.skip_row = self.guard.skip(
                self.step, why, flags.as_dict(self.args), self.model.sizes
            )
            return
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.objective.enqueue()

    def log(self, epoch: int, terms: dict[str, torch.Tensor]) -> None:
        """Record the step; save within the epoch when --save_every says so, or a signal, which
        also ends the run: SystemExit 0, of Ctrl-C 130."""
        n_clips = self.args.batch_size * self.args.n_pair
        if self.skip_row:
            self.log_.skipped(self.step, epoch, n_clips, self.skip_row)
            self.guard.give_up(self.step)
        else:
            self.log_.step(
                self.step,
                epoch,
                self.optimizer.param_groups[0]["lr"],
                {name: value.detach() for name, value in terms.items()},
                n_clips,
                self.args.log_every,
                self._diagnostics,
            )
        stop = self.guard.stop and self.step < self.last_step
        if stop or self.step % self.args.save_every == 0:
            self.save(epoch)
        if stop:
            self.stop.close(ending=True)
            self.log_.close()
            say(
                f"{' and '.join(self.stop.came) or 'a signal to another rank'}: {self.folder} is "
                f"saved at step {self.step} of {self.total_steps}; the same command goes on"
            )
            self.heartbeat.close()
            distributed.barrier()
            distributed.finish()
            raise SystemExit(130 if "SIGINT" in self.stop.came else 0)  # Ctrl-C ends `a && b`

    def _diagnostics(self) -> dict[str, float]:
        clusters = self.objective.clusters
        values = {
            "grad_norm": self.guard.norm,
            "skipped_steps": self.guard.skipped,
            "clipped_steps": self.guard.clipped,
            **(clusters.statistics if clusters is not None else {}),
            **diagnose(self.objective),
        }
        if self.step > self.warmup:  # new encoders map everything to much the same
            for sign in signs_of_collapse(values):
                if sign not in self.warned:
                    self.warned.add(sign)
                    say(f"step {self.step}: collapse? {sign}; see curves.png and docs/nan.md")
        return values

    def detect(self) -> None:
        """Replay a kept bad step and print where it first goes wrong (--detect)."""
        if distributed.world() > 1:
            raise SystemExit(
                "--detect runs in one process, which reads all ranks' batches; leave out torchrun"
            )
        say(
            replay(
                self.args.detect,
                self.folder,
                self.model,
                self.objective,
                self.autocast(),
                self.device,
                self.reader.describe,
            )
        )

    def save(self, epoch: int) -> None:
        """Write checkpoint.pt, and the epoch's weights if ``epoch`` (from 1) is complete; nothing
        if the step is saved already. All ranks call this."""
        if self.saved == self.step or self.args.dry_run:
            return
        self.heartbeat.at(self.step, "saving")
        state = self.model.state_dict()
        if not torch.stack([torch.isfinite(value).all() for value in state.values()]).all():
            raise SystemExit(
                f"step {self.step}: the weights are not finite and are not saved; "
                f"what is in {self.folder} is from before. Train anew (--no-resume) "
                "with a lower --lr, --precision fp32 or --similarity cosine"
            )
        self.saved = self.step
        rng = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        rng, why = distributed.gather_objects(rng), None
        if distributed.rank() == 0:
            try:
                self._write(epoch, state, rng)
            except SystemExit as error:
                why = str(error)
        if why := distributed.broadcast_object(why):  # ranks wait for the file, and end together
            raise SystemExit(why)

    def _write(self, epoch: int, state: dict, rng: list[dict]) -> None:
        ended = self.step == epoch * self.loader.steps_per_epoch
        clusters = self.objective.clusters
        training = {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "clusters": clusters.state_dict() if clusters is not None else None,
            "guard": self.guard.state_dict(),
            "rng": rng,
        }
        checkpoint.save(
            self.folder,
            args=flags.as_dict(self.args),
            sizes=self.model.sizes,
            step=self.step,
            epoch_done=epoch if ended and self.args.keep_epochs else None,
            complete=self.step >= self.total_steps,
            run_id=self.run_id,
            model=state,
            training=training,
        )

    def say_done(self, hint: str) -> None:
        """Of a run that has no step left to take."""
        more = self.step < self.total_steps
        steps = f"{self.step} of {self.total_steps} steps"
        say(
            f"{self.folder} is "
            + (
                f"at {steps}, where --max_steps ends it; without, it goes on"
                if more
                else f"done ({steps})"
            )
            + f". {hint}"
        )

    def finish(self, hint: str) -> None:
        """Close the log, draw curves.png, say what comes next."""
        self.heartbeat.close()
        self.log_.close()
        if self.args.dry_run:
            dry_run.finish(self)
        elif distributed.rank() == 0:
            from mcn_ext.train.curves import curves

            picture = curves(self.folder)
            say(
                f"{self.folder}: step {self.step} of {self.total_steps}"
                + (f", curves in {picture}" if picture else "")
                + f". {hint}"
            )
        distributed.barrier()
        self.stop.close()
