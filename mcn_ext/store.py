"""Validates and describes a store: ``python -m mcn_ext.store FILE``."""

from mcn_ext.data.store import main
from mcn_ext.train import flags

if __name__ == "__main__":
    flags.run(main)
