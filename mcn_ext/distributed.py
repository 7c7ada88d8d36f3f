"""Process group from torchrun or SLURM, and gathers with exact gradients.

Everything works unchanged in a single process, where ``world()`` is 1 and a group is ``None``.
"""

from __future__ import annotations

import datetime
import hashlib
import os
import time
from collections.abc import Iterable, Mapping
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def default_group():
    """The group losses reduce over: all ranks, or None in a single process."""
    return dist.group.WORLD if world() > 1 else None


def init(device: str) -> torch.device:
    """Join the process group torchrun or srun (SLURM_PROCID) started; returns this rank's device.

    ``device`` is auto (a GPU when there is one), cpu, cuda or cuda:N. nccl on GPUs, gloo on CPU.
    """
    env = os.environ
    # With RANK set, torchrun has started this process: SLURM's tasks are then torchruns, not ranks.
    if "RANK" not in env and int(env.get("SLURM_NTASKS", 1)) > 1 and "SLURM_PROCID" in env:
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in env]
        if missing:
            raise SystemExit(
                f"srun with {env['SLURM_NTASKS']} tasks needs {' and '.join(missing)}: "
                "see README, On 4 GPUs, on a cluster"
            )
        env.update(
            RANK=env["SLURM_PROCID"],
            WORLD_SIZE=env["SLURM_NTASKS"],
            LOCAL_RANK=env.get("SLURM_LOCALID", "0"),
        )
    local = int(env.get("LOCAL_RANK", 0))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.device(device)
    except RuntimeError:
        raise SystemExit(f"--device {device}: use auto, cpu, cuda or cuda:N") from None
    if device.startswith("cuda"):
        if not torch.cuda.is_available():
            raise SystemExit(
                f"--device {device}: torch {torch.__version__} sees no GPU; use --device cpu"
            )
        if device == "cuda":
            # Modulo, since a launcher may show each process one GPU only, which is number 0 for it.
            device = f"cuda:{local % torch.cuda.device_count()}"
        torch.cuda.set_device(device)
    if int(env.get("WORLD_SIZE", 1)) > 1:
        # A rank that waits so long for the others (one has died, or hangs) ends the job.
        timeout = datetime.timedelta(minutes=10)
        store, me, n_ranks = next(rendezvous("env://", timeout=timeout))
        if env.get("LOCAL_WORLD_SIZE") == env["WORLD_SIZE"]:
            # torchrun's store outlives a restart, and in it are the addresses of ranks that died.
            # (On several nodes the count is each node's own: see README, On 4 GPUs.)
            store = dist.PrefixStore(env.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group(
            "nccl" if device.startswith("cuda") else "gloo",
            store=store,
            rank=me,
            world_size=n_ranks,
            timeout=timeout,
        )
    return torch.device(device)


def finish() -> None:
    """Leave the process group. Ranks may still be computing when this one returns."""
    if dist.is_initialized():
        # gloo's threads drop finished work, for which they need the interpreter's lock, while
        # whoever destroys the group holds it and waits for them: a deadlock at the very end. Asleep
        # this thread does not hold it.
        time.sleep(0.5)
        dist.destroy_process_group()


def barrier() -> None:
    if world() > 1:
        dist.barrier()


def wait_for_first(function):
    """Call ``function`` on rank 0 alone, and return its result there; the others wait, for hours
    if need be (a pass over all captions of HowTo100M), and get None."""
    if world() == 1:
        return function()
    # The default group would give up after 10 minutes, see init().
    group = dist.new_group(backend="gloo", timeout=datetime.timedelta(hours=12))
    result = function() if rank() == 0 else None
    dist.barrier(group)
    dist.destroy_process_group(group)
    return result


def broadcast_object(value):
    """Rank 0's plain Python value on every rank."""
    if world() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather_objects(value) -> list:
    """Every rank's plain Python value, in rank order, on every rank."""
    values = [value]
    if world() > 1:
        values = [None] * world()
        dist.all_gather_object(values, value)
    return values


def fail(message: str) -> NoReturn:
    """SystemExit on all ranks, which call this together. They leave the group first: a rank whose
    peers have gone would be aborted."""
    finish()
    raise SystemExit(message)


def check_equal(what: str, mine: Mapping[str, object]) -> None:
    """SystemExit, on every rank, that names the entries of ``mine`` in which ranks differ."""
    everyone = gather_objects(dict(mine))
    differences = []
    for key in everyone[0]:
        ranks: dict[str, list[int]] = {}
        for number, entries in enumerate(everyone):
            ranks.setdefault(str(entries.get(key)), []).append(number)
        if len(ranks) > 1:
            values = (f"{value} (rank {', '.join(map(str, n))})" for value, n in ranks.items())
            differences.append(f"{key} {' / '.join(values)}")
    if differences:
        fail(
            f"ranks were started with unlike {what}: {'; '.join(differences)}. Start all of them "
            "with the same"
        )


def broadcast(value: Tensor) -> None:
    """Overwrite a tensor, on every rank, with rank 0's."""
    if world() > 1:
        dist.broadcast(value, src=0)


# torch 2.13 has renamed it, 2.11 has the old name only.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def stack(value: Tensor) -> Tensor:
    """Every rank's tensor without gradient, of one shape: (world, ...), the same on every rank."""
    everything = value.new_empty(world(), *value.shape)
    if world() == 1:
        return everything.copy_(value)
    # flatten() of a new tensor is a view of it, so that the message lands in ``everything``.
    _all_gather(everything.flatten(), value.detach().contiguous().flatten())
    return everything


def total(value: Tensor) -> Tensor:
    """Sum of a tensor without gradient over all ranks."""
    if world() > 1:
        # all_reduce overwrites its argument.
        value = value.clone()
        dist.all_reduce(value)
    return value


def _mean_in_rank_order(flat: Tensor) -> Tensor:
    """Overwrite a vector with its mean over ranks, added up in their order."""
    n = world()
    size = -(-len(flat) // n)
    # Rank r adds up part r of all vectors, then sends it to all. Zeros make the parts equal.
    send = torch.cat([flat, flat.new_zeros(n * size - len(flat))])
    parts = torch.empty_like(send)
    dist.all_to_all_single(parts, send)
    first, *others = parts.split(size)
    for part in others:
        first.add_(part)
    _all_gather(send, first.div_(n))
    return flat.copy_(send[: len(flat)])


def mean_in_rank_order(_, bucket):
    """DistributedDataParallel's hook: the mean over ranks, added up in their order. gloo's own adds
    in one that depends on where in its bucket a gradient lies, and buckets change after the first
    step: a resumed run would not be equal to the bit."""
    future = torch.futures.Future()
    future.set_result(_mean_in_rank_order(bucket.buffer()))
    return future


def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Set each gradient to its mean over ranks, for parameters that DistributedDataParallel does
    not hold. All ranks must have gradients of the same ones."""
    for parameter in parameters:
        if parameter.grad is not None and world() > 1:
            # Divided before the sum, as a mean of finite gradients must not overflow.
            dist.all_reduce(parameter.grad.div_(world()))


class Ranks:
    """A process group's ranks and how many rows each of them holds.

    Attributes: ``rank`` of this process, ``sizes`` [rows of each], ``name`` of the group.
    """

    def __init__(self, group):
        self.group, self.name = group, group.group_name
        self.rank, self.n = dist.get_rank(group), dist.get_world_size(group)
        self.sizes: list[int] = []

    @classmethod
    def of(cls, group) -> Ranks | None:
        """None for no group, or one of a single process."""
        return None if group is None or dist.get_world_size(group) == 1 else cls(group)

    def share_sizes(self, x: Tensor, common: Mapping | None = None) -> None:
        """Learn how many rows (of x here) each rank holds. ValueError, on every rank, if they
        disagree about ``common``. Waits for the device."""
        # 7 bytes, which an int64 holds without touching its sign. One message carries both numbers.
        digest = hashlib.blake2b(repr(common).encode(), digest_size=7).digest()
        mine = torch.tensor([len(x), int.from_bytes(digest, "big")], device=x.device)
        table = mine.new_empty(self.n * 2)
        _all_gather(table, mine, group=self.group)
        table = table.view(self.n, 2).tolist()
        self.sizes = [size for size, _ in table]
        others = [rank for rank, (_, code) in enumerate(table) if code != table[0][1]]
        if others:
            raise ValueError(
                f"ranks disagree about what to compute: {others} and rank 0; this one has {common}"
            )

    def gather(self, x: Tensor) -> Tensor:
        """Rows of all ranks (sum of sizes, ...), in rank order, without gradient."""
        # Messages of an all-gather have one size: short ranks send padding, which is cut off below.
        longest = max(self.sizes)
        mine = x.detach().contiguous()
        if len(mine) < longest:
            mine = torch.cat([mine, mine.new_zeros(longest - len(mine), *mine.shape[1:])])
        everything = mine.new_empty(self.n * longest, *mine.shape[1:])
        _all_gather(everything, mine, group=self.group)
        if min(self.sizes) == longest:
            return everything
        return torch.cat(
            [part[:size] for part, size in zip(everything.split(longest), self.sizes, strict=True)]
        )

    def gather_vectors(self, vectors: list[Tensor]) -> list[Tensor]:
        """Integer or bool vectors (n,) of all ranks' rows, int64, in one message."""
        if not vectors:
            return []
        table = self.gather(torch.stack([v.long() for v in vectors], dim=1))
        return [column.contiguous() for column in table.unbind(dim=1)]


class _Gather(torch.autograd.Function):
    """Rows of all ranks, concatenated in rank order; ranks may hold different numbers of rows.

    Every rank computes the same global loss from the same rows, so each already holds the full
    gradient of every row: its own slice times the number of ranks is what, averaged over ranks by
    DDP, is the single-process gradient. (A gather that lets no gradient through, or does not
    multiply, shrinks gradients by 1/world.)
    """

    @staticmethod
    def forward(ctx, x: Tensor, ranks: Ranks) -> Tensor:
        # Rows are in rank order, so this rank's begin behind those of the ranks before it.
        begin = sum(ranks.sizes[: ranks.rank])
        ctx.rows, ctx.n_ranks = slice(begin, begin + len(x)), ranks.n
        return ranks.gather(x)

    @staticmethod
    def backward(ctx, grad):
        return grad[ctx.rows] * ctx.n_ranks, None


def gather(x: Tensor | None, group) -> Tensor | None:
    """All ranks' rows of x (n_r, ...) -> (sum n_r, ...), differentiable; x itself for no group."""
    ranks = Ranks.of(group)
    if x is None or ranks is None:
        return x
    ranks.share_sizes(x)
    if x.dtype == torch.bool:
        return ranks.gather(x.to(torch.uint8)).bool()
    return _Gather.apply(x, ranks)
