"""Which pair first? Every order, the one-stage baseline, several seeds, side by side.

    python -m mcn_ext.study --data data/howto100m.h5 --youcook2 data/youcook2.h5 --out runs/study
    python -m mcn_ext.study --print              # the same as commands, a chain of them a line
    python -m mcn_ext.study --print slurm        # or as an sbatch script, one array task a chain
    python -m mcn_ext.study --noise 0.5 1 2      # demo data, video noise x audio noise

Orders: AV_T (audio and video first, then text), VT_A, AT_V; AVT trains all three in one stage, for
as many steps as an order (equal steps) and for as many as cost the same (equal compute, in FLOPs).
All other flags are train_stage1.py's, and the same for all. The same command again resumes; runs
that were made elsewhere from --print's list are taken as they are. Ends with report.html.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path

from mcn_ext.study import chains
from mcn_ext.train import flags

ROOT = Path(__file__).resolve().parents[2]
ORDERS = ("AV_T", "VT_A", "AT_V")
BASELINE = "AVT"
# Flags that make another objective: a variant with one of them has a baseline of its own, too.
OBJECTIVE = (
    "joint_pairs",
    "temperature",
    "margin",
    "similarity",
    "loss_impl",
    "cluster_weight",
    "recon_weight",
    "cluster_size",
    "queue_size",
    "refit_every",
)
STAGE1_ONLY = ("embd_dim", "recon_dim", "audio_width")
OURS = ("data", "out", "seed", "resume", "detect", "max_steps")  # of no use within a study


def parser() -> flags.Parser:
    p = flags.Parser(
        prog="python -m mcn_ext.study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument(
        "--data",
        type=Path,
        metavar="PATH",
        help=f"training store (default {flags.DATA}, else the demo data)",
    )
    p.add_argument(
        "--youcook2",
        type=Path,
        metavar="STORE",
        help=f"evaluation store (default {flags.STORES['youcook2']}, or the demo's)",
    )
    p.add_argument(
        "--out",
        type=Path,
        default=Path("runs/study"),
        metavar="DIR",
        help="where runs and report go (default runs/study)",
    )
    p.add_argument(
        "--orders",
        nargs="+",
        choices=(*ORDERS, BASELINE),
        default=[*ORDERS, BASELINE],
        help="default: all three, and the one-stage baseline AVT",
    )
    p.add_argument(
        "--seeds",
        nargs="+",
        type=flags.not_negative(int),
        default=[0, 1, 2],
        metavar="N",
        help="each gives every order another start (default 0 1 2)",
    )
    p.add_argument(
        "--stage1_encoders",
        nargs="+",
        choices=("frozen", "finetune"),
        default=["frozen", "finetune"],
        help="stage 2 with the first pair's encoders as they are, or trained on (default: both)",
    )
    p.add_argument(
        "--variant",
        action="append",
        default=[],
        metavar="NAME=FLAGS",
        help="one more "
        "kind of stage 2, by train_stage2.py's flags, such as gentle='--stage1_encoders "
        "finetune --lr 1e-5'; with flags of the objective there is one more baseline, "
        "too; may be repeated",
    )
    p.add_argument(
        "--baselines",
        nargs="+",
        choices=("steps", "compute"),
        default=["steps", "compute"],
        help="AVT for as many steps as an order, for the FLOPs of each order (default: both)",
    )
    p.add_argument(
        "--epochs",
        nargs=2,
        type=flags.positive(int),
        metavar=("FIRST", "SECOND"),
        default=[flags.EPOCHS[1], flags.EPOCHS[2]],
        help="of stage 1 and stage 2 (default 20 10)",
    )
    p.add_argument(
        "--noise",
        nargs="+",
        type=flags.not_negative(float),
        metavar="X",
        help="a grid "
        "on demo data instead of --data: each level of video noise with each of audio "
        "noise; 0 clean, 1 the demo's",
    )
    p.add_argument(
        "--videos",
        type=flags.positive(int),
        default=256,
        metavar="N",
        help="training videos of a grid's data sets (default 256)",
    )
    p.add_argument(
        "--jobs",
        type=flags.positive(int),
        default=1,
        metavar="N",
        help="chains of runs at a time (default 1); their threads share the cores",
    )
    p.add_argument(
        "--launch",
        default="",
        metavar="WORDS",
        help="before the training scripts, "
        "such as 'torchrun --nproc_per_node 4' (default: this Python)",
    )
    p.add_argument(
        "--print",
        nargs="?",
        const="lines",
        choices=("lines", "slurm"),
        dest="show",
        help="run nothing (but make --noise's data): print the commands, one "
        "independent chain a line, or an sbatch script for them",
    )
    return p


def training_flops(
    args: argparse.Namespace, dims: dict[str, int], modalities: str, frozen: str, word_dim: int
) -> float:
    """FLOPs (a multiply and an add count 2) of the encoders' forward and backward for one clip of
    full length. The losses' own are left out: small beside DAVEnet, but more with more pairs."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from mcn_ext.model import MCN, MODALITIES

    model = MCN(
        modalities,
        video_dims=dims,
        word_dim=word_dim,
        embd_dim=args.embd_dim,
        recon_dim=args.recon_dim if args.recon_weight else 0,
        audio_width=args.audio_width,
    )
    model.freeze(MODALITIES[m] for m in frozen)
    model.train()
    n = 2  # BatchNorm wants more than one row
    batch = {
        "video": {name: torch.rand(n, dim) for name, dim in dims.items()},
        "audio": torch.rand(n, 40, args.audio_frames),
        "n_frames": torch.full((n,), args.audio_frames),
        "text": torch.rand(n, args.max_words, word_dim),
        "text_mask": torch.ones(n, args.max_words, dtype=torch.bool),
    }
    with FlopCounterMode(display=False) as counter:
        embeddings, errors = model(batch)
        learning = [x for x in (*embeddings.values(), *errors.values()) if x.requires_grad]
        torch.stack([x.sum() for x in learning]).sum().backward()
    return counter.get_total_flops() / n


class Study:
    """The runs of a study and the commands that make them.

    ``cells``: data sets, one but for a noise grid. ``chains``: lists of (run folder, commands) in
    the order they depend on each other; chains are independent. ``runs``: what the report reads.
    """

    def __init__(self, args: argparse.Namespace, rest: list[str], words: list[str]):
        self.args, self.rest, self.words = args, rest, words
        args.seeds = list(dict.fromkeys(args.seeds))
        given = _checked(rest, 1, "python -m mcn_ext.study")
        self.variants = {"": "--stage1_encoders frozen"} if "frozen" in args.stage1_encoders else {}
        if "finetune" in args.stage1_encoders:
            self.variants["finetune"] = "--stage1_encoders finetune"
        for text in args.variant:
            name, equals, words = text.partition("=")
            if not name.isidentifier() or not equals:
                raise SystemExit(f"--variant {text}: write NAME=FLAGS, the name in letters")
            _checked(shlex.split(words), 2, f"--variant {name}")
            self.variants[name] = words
        self.cells = self._cells()
        given.data = self.cells[0]["data"]
        self.settings = flags.complete(given)
        self.runs, self.chains = [], []
        self._count()
        for cell in self.cells:
            for seed in args.seeds:
                for order in ORDERS:
                    if order in args.orders:
                        self._order(cell, seed, order)
                if BASELINE in args.orders:
                    self._baselines(cell, seed)

    def _cells(self) -> list[dict]:
        from mcn_ext.data.store import StoreError
        from mcn_ext.prepare import demo

        args, out = self.args, self.args.out
        if not args.noise:
            if args.data is None and not flags.DATA.exists():
                print(demo.prepare(flags.DEMO), file=sys.stderr)
                args.data = flags.DEMO / "train.h5"
            args.data = args.data or flags.DATA
            is_demo = args.data.resolve() == (flags.DEMO / "train.h5").resolve()
            args.youcook2 = args.youcook2 or (
                flags.DEMO / "eval.h5" if is_demo else flags.STORES["youcook2"]
            )
            for name in ("data", "youcook2"):
                if not getattr(args, name).exists():
                    raise SystemExit(
                        f"--{name} {getattr(args, name)}: no such store; prepare one "
                        "with python -m mcn_ext.prepare, or check the path"
                    )
            return [
                {
                    "name": "",
                    "data": args.data,
                    "youcook2": args.youcook2,
                    "video_noise": None,
                    "audio_noise": None,
                }
            ]
        if args.data or args.youcook2:
            raise SystemExit("--noise makes data of its own: leave out --data and --youcook2")
        cells = []
        for video in dict.fromkeys(args.noise):
            for audio in dict.fromkeys(args.noise):
                name = f"v{video:g}-a{audio:g}"
                folder = out / "data" / name
                try:
                    print(
                        demo.prepare(
                            folder, video_noise=video, audio_noise=audio, videos=args.videos
                        ),
                        file=sys.stderr,
                    )
                except StoreError as error:
                    raise SystemExit(f"--noise {video:g} {audio:g}: {error}") from None
                cells.append(
                    {
                        "name": name,
                        "data": folder / "train.h5",
                        "youcook2": folder / "eval.h5",
                        "video_noise": video,
                        "audio_noise": audio,
                    }
                )
        return cells

    def _count(self) -> None:
        """FLOPs of a clip by (modalities, frozen ones); the clips of an epoch."""
        from mcn_ext.data.store import Store, StoreError
        from mcn_ext.data.words import vectors_for
        from mcn_ext.train import training

        args, settings = self.args, self.settings
        try:
            store = Store(self.cells[0]["data"])
            Store(self.cells[0]["youcook2"])
        except StoreError as error:
            raise SystemExit(str(error)) from None
        videos = int((store.caption_counts() > 0).sum())
        if videos < settings.batch_size:
            raise SystemExit(
                f"--batch_size {settings.batch_size}: {store.path} has {videos} "
                f"videos with captions; use --batch_size {videos} or less"
            )
        self.clips = videos // settings.batch_size * settings.batch_size * settings.n_pair
        word_dim = 300
        if settings.word2vec:
            word_dim = vectors_for(
                store, settings.word2vec, store.path.with_name(store.path.name + ".words.npz")
            ).dim

        def flops(modalities, frozen=""):
            return training_flops(
                settings, training.video_dims(store), modalities, frozen, word_dim
            )

        first, joint = args.epochs[0], flops(BASELINE)
        self.flops, self.baselines = {}, {}
        for variant, words in self.variants.items():
            second, frozen, objective = self._second(words)
            for order in ORDERS:
                pair, third = order.split("_")
                self.flops[pair] = self.clips * first * flops(pair)
                cost = flops(pair + third, pair) if frozen else joint
                total = self.flops[order, variant] = self.flops[pair] + self.clips * second * cost
                if order not in args.orders:
                    continue
                same = max(1, round(total / (self.clips * joint)))
                if abs(same - first - second) <= 0.05 * same:
                    same = first + second  # one run more would say nothing new
                for equal, epochs in (("steps", first + second), ("compute", same)):
                    self.flops[BASELINE, epochs] = self.clips * epochs * joint
                    for name in ("", variant) if objective else ("",):
                        if equal in args.baselines:
                            self.baselines.setdefault(
                                (epochs, name),
                                {"flags": objective if name else [], "steps": [], "compute": []},
                            )[equal].append(_method(order, variant))

    def _second(self, words: str) -> tuple[int, bool, list[str]]:
        """A variant's epochs in stage 2, whether it freezes stage 1's encoders, and what of its
        flags is of the objective."""
        words = shlex.split(words)
        epochs, encoders = (_given(words, name)[1:] for name in ("epochs", "stage1_encoders"))
        return (
            int(epochs[0]) if epochs else self.args.epochs[1],
            encoders != ["finetune"],
            [word for name in OBJECTIVE for word in _given(words, name)],
        )

    def _command(self, *words) -> list[str]:
        launch = shlex.split(self.args.launch) or [sys.executable]
        return [*launch, str(ROOT / words[0]), *map(str, words[1:])]

    def _unit(self, folder: Path, cell: dict, *train) -> tuple[Path, list[list[str]]]:
        """A run: train it, evaluate it."""
        evaluate = [
            sys.executable,
            str(ROOT / "evaluate.py"),
            "--youcook2",
            cell["youcook2"],
            "--run",
            folder,
            "--all_directions",
            "--fusion",
            "sum",
            "mean",
            "bank",
            "--keep_embeddings",
            "--require_complete",
        ]
        if self.settings.device != "auto":
            evaluate += ["--device", self.settings.device]
        return folder, [
            self._command(*train, "--no-keep_epochs", "--out", folder),
            list(map(str, evaluate)),
        ]

    def _folder(self, cell: dict, seed: int) -> Path:
        return self.args.out / cell["name"] / f"seed{seed}"

    def _stage1(self, folder: Path, cell: dict, seed: int, pair: str, epochs: int, *more: str):
        return self._unit(
            folder,
            cell,
            "train_stage1.py",
            "--pair",
            pair,
            "--data",
            cell["data"],
            "--seed",
            seed,
            "--epochs",
            epochs,
            *self.rest,
            *more,
        )

    def _add(self, cell: dict, seed: int, method: str, order: str, folder: Path, **more) -> None:
        self.runs.append(
            {
                "cell": cell["name"],
                "method": method,
                "order": order,
                "seed": seed,
                "run": str(folder.relative_to(self.args.out)),
                **more,
            }
        )

    def _order(self, cell: dict, seed: int, order: str) -> None:
        (pair, third), at = order.split("_"), self._folder(cell, seed)
        first, start = self.args.epochs[0], at / f"stage1-{pair}"
        chain = [self._stage1(start, cell, seed, pair, first)]
        rest = [
            word for flag in _groups(self.rest) if _name(flag) not in STAGE1_ONLY for word in flag
        ]
        for variant, words in self.variants.items():
            method = _method(order, variant)
            folder = at / f"stage2-{method}"
            second, frozen, _ = self._second(words)
            chain.append(
                self._unit(
                    folder,
                    cell,
                    "train_stage2.py",
                    "--add",
                    third,
                    "--init",
                    start,
                    *rest,
                    "--epochs",
                    second,
                    *shlex.split(words),
                )
            )
            self._add(
                cell,
                seed,
                method,
                order,
                folder,
                epochs=[first, second],
                encoders="frozen" if frozen else "finetune",
                stage1=str(start.relative_to(self.args.out)),
                label=f"{pair} then {third}, {variant or 'frozen'}",
                flops=self.flops[order, variant],
            )
        self.chains.append(chain)

    def _baselines(self, cell: dict, seed: int) -> None:
        for (epochs, variant), made in self.baselines.items():
            method = _method(f"{BASELINE}-{epochs}", variant)
            folder = self._folder(cell, seed) / method
            self.chains.append([self._stage1(folder, cell, seed, BASELINE, epochs, *made["flags"])])
            self._add(
                cell,
                seed,
                method,
                BASELINE,
                folder,
                encoders=None,
                stage1=None,
                epochs=[epochs],
                steps_of=made["steps"],
                baseline_of=made["compute"],
                label=f"one stage, {epochs} epoch"
                + "s" * (epochs > 1)
                + (f", {variant}" if variant else ""),
                flops=self.flops[BASELINE, epochs],
            )

    def cost(self, folder: Path) -> float:
        """FLOPs of a run's own stage."""
        if folder.name.startswith("stage1-"):
            return self.flops[folder.name.removeprefix("stage1-")]
        run = next(r for r in self.runs if r["run"] == str(folder.relative_to(self.args.out)))
        return run["flops"] - (self.flops[run["order"].split("_")[0]] if run["stage1"] else 0)

    def write(self) -> None:
        """study.json; SystemExit if the folder holds another study."""
        from mcn_ext.train.checkpoint import FREE_FLAGS
        from mcn_ext.train.log import write_text

        free = FREE_FLAGS | {
            "seed",
            "seeds",
            "orders",
            "variant",
            "stage1_encoders",
            "baselines",
            "launch",
            "jobs",
            "show",
            "resume",
        }
        given = flags.as_dict(self.settings) | {
            key: [str(v) for v in value] if isinstance(value, list) else str(value)
            for key, value in vars(self.args).items()
        }
        given = {key: value for key, value in sorted(given.items()) if key not in free}
        content = {
            "format": "mcn-study",
            "version": 1,
            "flags": given,
            "variants": self.variants,
            "command": shlex.join(["python", "-m", "mcn_ext.study", *self.words]),
            "cells": [
                {k: str(v) if isinstance(v, Path) else v for k, v in cell.items()}
                for cell in self.cells
            ],
            "runs": self.runs,
        }
        file = self.args.out / "study.json"
        if file.exists():
            try:
                old = json.loads(file.read_text())
                before, kinds = old["flags"], old["variants"]
            except (ValueError, KeyError, TypeError):
                raise SystemExit(f"{file} is not a study's; give another --out") from None
            other = [
                f"--{key} {before.get(key)} (now {value})"
                for key, value in given.items()
                if before.get(key) != value
            ]
            other += [
                f"--variant {name}={kinds[name]} (now {words})"
                for name, words in self.variants.items()
                if kinds.get(name, words) != words
            ]
            if other:
                raise SystemExit(
                    f"{self.args.out} holds a study with {', '.join(other)}; give the "
                    "same flags, or another --out"
                )
        self.args.out.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(content, indent=1) + "\n")


def _checked(words: list[str], stage: int, prog: str) -> argparse.Namespace:
    """Words for the training script of a stage, parsed: an error names the flag, before any work
    is done."""
    training = flags.Parser(prog=prog, usage="%(prog)s [...], and the training scripts' flags")
    flags.add_training_flags(training, stage)
    if stage == 2:
        training.add_argument("--stage1_encoders", choices=("frozen", "finetune"))
    training.also = tuple(parser()._option_string_actions) if stage == 1 else ()
    given = training.parse_args(words)
    for name in OURS + ("epochs",) * (stage == 1):
        if getattr(given, name) != training.get_default(name):
            training.error(f"--{name}: the study sets it for each of its runs")
    return given


def _method(order: str, variant: str) -> str:
    return order + (f"-{variant}" if variant else "")


def _groups(words: list[str]) -> list[list[str]]:
    """Words of a command line as flags with their values."""
    out: list[list[str]] = []
    for word in words:
        if word.startswith("--") or not out:
            out.append(word.split("=", 1))
        else:
            out[-1].append(word)
    return out


def _name(flag: list[str]) -> str:
    return flag[0].lstrip("-").replace("-", "_").removeprefix("no_")


def _given(words: list[str], name: str) -> list[str]:
    """The last flag of that name, with its values; nothing if it is not there."""
    return next((flag for flag in reversed(_groups(words)) if _name(flag) == name), [])


def main(argv=None) -> int:
    words = sys.argv[1:] if argv is None else list(argv)
    args, rest = parser().parse_known_args(words)
    if args.noise and not _given(rest, "preset"):
        rest += ["--preset", "demo"]
    study = Study(args, rest, words)
    if args.show:
        lines = [
            " && ".join(shlex.join(command) for _, commands in chain for command in commands)
            for chain in study.chains
        ]
        if args.show == "slurm":
            gpus = int((_given(shlex.split(args.launch), "nproc_per_node") or ["", 1])[1])
            print(
                chains.SLURM.format(
                    n=len(lines), gpus=gpus, cpus=8 * gpus, chains="\n".join(lines)
                ),
                end="",
            )
        else:
            print("\n".join(lines))
        return 0
    with chains.only_one(args.out) as lock:
        study.write()
        print(
            f"{args.out}: {len(study.runs)} runs to compare, {len(args.seeds)} seed(s)", flush=True
        )
        failed = chains.run(study.chains, study.cost, args.out, args.jobs, lock)
    from mcn_ext.study import report as study_report

    print(study_report.write(args.out))
    for why in failed:
        print(f"FAILED: {why}", file=sys.stderr)
    return int(bool(failed))
