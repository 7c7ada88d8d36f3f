"""A GPU that is not there: tensors on "cuda" have shapes, types and devices, and no numbers.

Code for a GPU runs on it as it stands. What would wait for the device, or mixes devices, is an
error; what lives on it is counted. Nothing is computed, and nothing timed. Two things differ: norms
of many tensors are taken one by one, and the device's guard stays for the process.
"""

from __future__ import annotations

import ctypes
import heapq
import os
import subprocess
import tempfile
import weakref
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

# Without a device's guard torch asks CUDA's runtime for its current device, before any operator;
# a torch with CUDA has one, which fails where there is no GPU.
GUARD = """#include <c10/core/impl/DeviceGuardImplInterface.h>
C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>)
"""
_guarded = torch.cuda.is_available()


def _guard() -> None:
    global _guarded
    if _guarded:
        return
    root = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "guard.cpp"), Path(folder, "guard.so")
        source.write_text(GUARD)
        subprocess.run(
            [
                os.environ.get("CXX", "g++"),
                "-std=c++20",
                "-shared",
                "-fPIC",
                f"-I{root}/include",
                source,
                "-o",
                library,
                f"-L{root}/lib",
                "-lc10",
            ],
            check=True,
        )
        ctypes.CDLL(str(library))
    _guarded = True


aten = torch.ops.aten
CONVOLUTIONS = {aten.convolution.default, aten.convolution_backward.default}
ONLY_WRITE = {aten.zeros_like.default, aten.new_zeros.default, aten.ones_like.default}
NOTHING = {
    aten._unsafe_view.default,
    *(  # a view, but by its name, and memory alone
        getattr(getattr(aten, name), overload)
        for name in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
        for overload in getattr(aten, name).overloads()
    ),
}


def _from_host(func, args, kwargs) -> bool:
    """Whether numbers of the host's are copied while it waits: not pinned, or not non_blocking."""
    x = args[1] if func is aten.copy_.default else args[0] if args else None
    if func not in (aten.copy_.default, aten._to_copy.default) or not isinstance(x, Tensor):
        return False
    if isinstance(x, FakeTensor):
        return False
    free = kwargs.get("non_blocking", len(args) > 2 and args[2])
    return not (free and getattr(x, "pinned", False))


def _as_cudnn(x):
    """In the layout of a channels_last input, which a torch without cuDNN does not expect."""
    return x.contiguous(memory_format=torch.channels_last) if x is not None and x.dim() == 4 else x


class Waits(RuntimeError):
    """The host asked for what is on the device."""


class Held:
    """Bytes of the storages that are shown to it: ``live`` now, and their ``peak``."""

    def __init__(self):
        self.live = self.peak = 0
        self.known = {}

    def show(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        key = storage._cdata
        if key not in self.known:
            n_bytes = -(-storage.nbytes() // 512) * 512  # as the caching allocator rounds
            self.live += n_bytes
            self.peak = max(self.peak, self.live)
            self.known[key] = weakref.finalize(storage, self._drop, key, n_bytes)

    def _drop(self, key: int, n_bytes: int) -> None:
        self.live -= n_bytes
        del self.known[key]


class Gpu(TorchDispatchMode):
    """Within :func:`pretend`: what the device has ``held``; ``operators`` that it was given, less
    views, and the bytes that they ``moved``, inputs and outputs; ``waits``, how often the host
    asked for a number. Up to ``allowed_waits`` get 1.0, the next is an error."""

    def __init__(self, allowed_waits: int = 0):
        super().__init__()
        self.fake, self.held = FakeTensorMode(allow_non_fake_inputs=True), Held()
        self.allowed, self.waits, self.operators, self.moved = allowed_waits, 0, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        there = any(isinstance(x, FakeTensor) for x in inputs)
        target = kwargs.get("device")
        to_host = target is not None and torch.device(target).type == "cpu"
        if not there and (target is None or to_host):
            return func(*args, **kwargs)
        if there and (to_host or func is aten._local_scalar_dense.default):
            return self._wait(func, inputs[0])
        if _from_host(func, args, kwargs):
            self._wait(func, inputs[0])
        with self.fake:
            args, kwargs = tree_map(self._shape_of, (args, kwargs))
            try:
                out = func(*args, **kwargs)
            except (DynamicOutputShapeException, DataDependentOutputException) as error:
                raise Waits(
                    f"{func} waits for the device: what it returns depends on numbers"
                ) from error
            if func in CONVOLUTIONS:
                out = tree_map(_as_cudnn, out)
        outputs = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        for x in outputs:
            self.held.show(x)
        if not func.is_view and func not in NOTHING and func.namespace not in ("prim", "profiler"):
            self.operators += 1
            read = {id(x): x for x in inputs} if func not in ONLY_WRITE else {}
            self.moved += sum(
                x.numel() * x.element_size() for x in (read | {id(x): x for x in outputs}).values()
            )
        if func is torch.ops.mcn.loss.default:
            self.held.peak = max(self.held.peak, self.held.live + _scratch(*args))
        return out

    def _shape_of(self, x):
        there = not isinstance(x, Tensor) or isinstance(x, FakeTensor)
        return x if there else self.fake.from_tensor(x)

    def _wait(self, func, x: Tensor):
        self.waits += 1
        if self.waits > self.allowed:
            raise Waits(f"{func} waits for the device")
        if func is aten._local_scalar_dense.default:
            return 1.0
        return torch.ones(x.shape, dtype=x.dtype)


def _scratch(rows, pairs, ids, valid, columns, centroids, *rest) -> int:
    """Bytes that the compiled losses take beside inputs and outputs: the similarity matrix or a
    tile of it, and scaled copies of the rows."""
    n, dim = rows[0].shape
    keep, wide = rest[-5], 8 if rows[0].dtype == torch.float64 else 4
    columns = max(n, 0 if centroids is None else len(centroids))
    tile = 8192 if dim > 1024 else 4096
    matrix = n * columns if keep else min(n, tile) * min(columns, tile)
    narrow = 0 if rows[0].itemsize == wide else matrix * rows[0].itemsize
    return matrix * wide + narrow + sum(x.nbytes for x in rows)


class _Saved:
    """What nodes of the graph keep for backward, until they have run."""

    def __init__(self):
        self.kept, self.used, self.last = {}, [], 0

    def pack(self, x: Tensor) -> int:
        self.last += 1
        self.kept[self.last] = x
        return self.last

    def unpack(self, key: int) -> Tensor:
        self.used.append(key)
        return self.kept[key]

    def release(self) -> None:
        for key in self.used:
            self.kept.pop(key, None)
        self.used.clear()


def _backward(saved: _Saved):
    """torch.autograd.backward in Python: the engine would ask CUDA's runtime for streams."""

    @torch.no_grad()
    def backward(tensors, grad_tensors=None, *_, **__):
        tensors = [tensors] if isinstance(tensors, Tensor) else list(tensors)
        if grad_tensors is None:
            grad_tensors = [torch.ones_like(x) for x in tensors]
        elif isinstance(grad_tensors, Tensor):
            grad_tensors = [grad_tensors]
        waiting, stack, seen, grads = {}, [], set(), {}
        for x, grad in zip(tensors, grad_tensors, strict=True):
            if x.grad_fn is None:
                x.grad = grad if x.grad is None else x.grad + grad
            else:
                _add(grads, x.grad_fn, x.output_nr, grad)
                stack.append(x.grad_fn)
        roots = dict.fromkeys(stack)
        while stack:
            node = stack.pop()
            if node not in seen:
                seen.add(node)
                for following, _ in node.next_functions:
                    if following is not None:
                        waiting[following] = waiting.get(following, 0) + 1
                        stack.append(following)
        ready = [(-node._sequence_nr(), id(node), node) for node in roots if not waiting.get(node)]
        heapq.heapify(ready)  # the engine's order: what came last in forward comes first
        while ready:
            node = heapq.heappop(ready)[2]
            given = grads.pop(node, {})
            out = _run(node, given)
            saved.release()
            for i, (following, number) in enumerate(node.next_functions):
                if following is None:
                    continue
                if out[i] is not None:
                    _add(grads, following, number, out[i])
                waiting[following] -= 1
                if not waiting[following]:
                    heapq.heappush(ready, (-following._sequence_nr(), id(following), following))
            del out, given

    return backward


def _add(grads: dict, node, number: int, grad: Tensor) -> None:
    like = node._input_metadata[number]
    if grad.device != like.device:
        raise RuntimeError(f"{node.name()}: a gradient on {grad.device}, expected {like.device}")
    if grad.shape != like.shape:
        grad = grad.sum_to_size(like.shape)
    mine = grads.setdefault(node, {})
    grad = grad.to(like.dtype)
    mine[number] = mine[number] + grad if number in mine else grad


def _run(node, given: dict) -> tuple:
    """A node's gradients of its inputs, from those of its outputs by number."""
    if not given:
        return (None,) * len(node.next_functions)
    if hasattr(node, "variable"):
        leaf, grad = node.variable, given[0]
        leaf.grad = grad.detach() if leaf.grad is None else leaf.grad + grad
        return ()
    grads = [given.get(i) for i in range(len(node._input_metadata))]
    if not hasattr(node, "apply"):
        out = node(*grads)
    else:  # a torch.autograd.Function
        out = node.apply(
            *(
                torch.zeros(like.shape, dtype=like.dtype, device=like.device)
                if grad is None
                else grad
                for grad, like in zip(grads, node._input_metadata, strict=True)
            )
        )
    return out if isinstance(out, tuple) else (out,)


def _pin(x: Tensor, *_) -> Tensor:
    x.pinned = True
    return x


@contextmanager
def pretend(allowed_waits: int = 0):
    """Tensors on "cuda" without a GPU; yields the :class:`Gpu`."""
    from mcn_ext import ops

    _guard()
    gpu, saved = Gpu(allowed_waits), _Saved()
    backward = _backward(saved)
    with ExitStack() as stack:
        for target, name, value in (
            (torch.cuda, "_lazy_init", lambda: None),
            (torch.cuda, "is_bf16_supported", lambda *_, **__: True),
            (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
            (torch.Tensor, "pin_memory", _pin),
            (FakeTensor, "tolist", lambda self: self.cpu().tolist()),  # not one by one
            (torch.autograd, "backward", backward),
            (
                torch.Tensor,
                "backward",
                lambda self, gradient=None, *_, **__: backward(self, gradient),
            ),
            (ops, "_cuda", True),
            (torch._C, "_current_graph_task_id", lambda: 0),  # checkpoint: one backward at a time
        ):
            stack.enter_context(patch.object(target, name, value))
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack))
        stack.enter_context(gpu)
        yield gpu
