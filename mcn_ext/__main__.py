"""python -m mcn_ext: what was built, for which device, with which torch. Put its output into bug
reports."""

import os
import platform
import sys

import torch

from mcn_ext import __version__, ops
from mcn_ext.train import flags


def main() -> int:
    if words := [word for word in sys.argv[1:] if word != "--"]:
        print(
            f"python -m mcn_ext {words[0]}: there is python -m mcn_ext.prepare, "
            "mcn_ext.store, mcn_ext.study, mcn_ext.report, mcn_ext.search",
            file=sys.stderr,
        )
        return 2
    built = ops.build_info()
    print(f"mcn_ext    {__version__} ({ops.__file__})")
    print(
        "extension  "
        + (
            f"not loaded: {built['error']}"
            if "error" in built
            else ", ".join(f"{key} {value}" for key, value in built.items())
        )
    )
    compiled = "plain PyTorch" if "error" in built else "compiled"
    print(
        f"losses     {compiled} on CPU, "
        f"{compiled if built.get('cuda') else 'plain PyTorch'} on CUDA; at most "
        f"{os.environ.get('MCN_LOSS_BUDGET', f'{2**31} (default)')} bytes of a similarity matrix "
        "(MCN_LOSS_BUDGET)"
    )
    print(
        f"torch      {torch.__version__}, CUDA {torch.version.cuda}, {torch.get_num_threads()} "
        "threads"
    )
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f"GPUs       {', '.join(names) or 'none'}")
    print(f"python     {platform.python_version()} on {platform.platform()}")
    return 0


if __name__ == "__main__":
    flags.run(main)
