"""Two-stage multimodal clustering: losses, model, data and evaluation for video, audio and text.

The three losses are the public interface; everything is imported on first use, so that
``import mcn_ext`` (and every ``--help``) does not wait for torch.
"""

import importlib

__version__ = "0.2.0"
__all__ = ["LossTerms", "cluster_loss", "contrastive_loss", "has_cuda", "mcn_loss", "__version__"]


def __getattr__(name):
    if name in __all__:
        return getattr(importlib.import_module("mcn_ext.ops"), name)
    if name == "reference":
        return importlib.import_module("mcn_ext.reference")
    raise AttributeError(f"module 'mcn_ext' has no attribute {name!r}")
