"""The losses as users call them: compiled where an implementation is compiled in, the reference
otherwise.

So far the extension only says how it was built; the losses are :mod:`mcn_ext.reference`'s. A
compiled loss takes the reference's place here, and nothing else in the project changes.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import torch

from mcn_ext.reference import LossTerms, cluster_loss, contrastive_loss, mcn_loss

__all__ = ["LossTerms", "build_info", "cluster_loss", "contrastive_loss", "has_cuda", "mcn_loss"]


def _load() -> str | None:
    """Load the compiled library; None when it loaded, else one sentence that says why not and what
    to do."""
    libraries = sorted(Path(__file__).parent.glob("_C*.so"))
    if not libraries:
        return "the extension is not built; run `pip install -e . --no-build-isolation`"
    try:
        torch.ops.load_library(str(libraries[0]))
    except OSError as error:
        return (f"{libraries[0].name} does not load in torch {torch.__version__} "
                f"({error.__cause__ or error}); rebuild it")
    return None


_unavailable = _load()
if _unavailable:
    warnings.warn(f"mcn_ext: {_unavailable}. The plain PyTorch losses run instead.", stacklevel=2)


def build_info() -> dict:
    """How the extension was built (compiler, torch, cuda), or {"error": why it is not there}."""
    return {"error": _unavailable} if _unavailable else json.loads(torch.ops.mcn.build_info())


def has_cuda() -> bool:
    """True when the extension was built with CUDA kernels and loaded."""
    return bool(build_info().get("cuda"))
