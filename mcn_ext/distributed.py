"""Process group from torchrun or SLURM, and gathers with exact gradients.

Everything works unchanged in a single process, where ``world()`` is 1 and a group is ``None``.
"""

from __future__ import annotations

import datetime
import os

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
    if "RANK" not in env and int(env.get("SLURM_NTASKS", 1)) > 1 and "SLURM_PROCID" in env:
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in env]
        if missing:
            raise SystemExit(
                f"srun with {env['SLURM_NTASKS']} tasks needs {' and '.join(missing)}: "
                "see README, SLURM")
        env.update(RANK=env["SLURM_PROCID"], WORLD_SIZE=env["SLURM_NTASKS"],
                   LOCAL_RANK=env.get("SLURM_LOCALID", "0"))
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
                f"--device {device}: torch {torch.__version__} sees no GPU; use --device cpu")
        if device == "cuda":
            device = f"cuda:{local % torch.cuda.device_count()}"
        torch.cuda.set_device(device)
    if int(env.get("WORLD_SIZE", 1)) > 1:
        timeout = datetime.timedelta(minutes=30)
        store, me, n_ranks = next(rendezvous("env://", timeout=timeout))
        if env.get("LOCAL_WORLD_SIZE") == env["WORLD_SIZE"]:
            # torchrun's store outlives a restart, and in it are the addresses of ranks that died.
            # (On several nodes the count is each node's own: see README, SLURM.)
            store = dist.PrefixStore(env.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", store=store,
                                rank=me, world_size=n_ranks, timeout=timeout)
    return torch.device(device)


def finish() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    if world() > 1:
        dist.barrier()


def first_rank_first(function):
    """Call ``function`` on rank 0 and then, done there, on the others, which find what it wrote."""
    if rank() == 0:
        result = function()
    barrier()
    if rank() != 0:
        result = function()
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


def broadcast(value: Tensor) -> None:
    """Overwrite a tensor, on every rank, with rank 0's."""
    if world() > 1:
        dist.broadcast(value, src=0)


def total(value: Tensor) -> Tensor:
    """Sum of a tensor without gradient over all ranks."""
    if world() > 1:
        value = value.clone()
        dist.all_reduce(value)
    return value


class _Gather(torch.autograd.Function):
    """Rows of all ranks, concatenated in rank order; ranks may hold different numbers of rows.

    Every rank computes the same global loss from the same rows, so each already holds the full
    gradient of every row: its own slice times the number of ranks is what, averaged over ranks by
    DDP, is the single-process gradient. (A gather that lets no gradient through, or does not
    multiply, shrinks gradients by 1/world.)
    """

    @staticmethod
    def forward(ctx, x: Tensor, group) -> Tensor:
        n_ranks, me = dist.get_world_size(group), dist.get_rank(group)
        n = torch.tensor([len(x)], device=x.device)
        sizes = [torch.empty_like(n) for _ in range(n_ranks)]
        dist.all_gather(sizes, n, group=group)
        sizes = [int(s) for s in sizes]
        longest = max(sizes)
        padded = x.detach().contiguous()
        if len(x) < longest:
            padded = torch.cat([padded, padded.new_zeros(longest - len(x), *x.shape[1:])])
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded, group=group)
        ctx.rows, ctx.world = slice(sum(sizes[:me]), sum(sizes[:me + 1])), n_ranks
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx, grad):
        return grad[ctx.rows] * ctx.world, None


def gather(x: Tensor | None, group) -> Tensor | None:
    """All ranks' rows of x (n_r, ...) -> (sum n_r, ...), differentiable; x itself for no group."""
    if x is None or group is None:
        return x
    if x.dtype == torch.bool:
        return _Gather.apply(x.to(torch.uint8), group).bool()
    return _Gather.apply(x, group)
