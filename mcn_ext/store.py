"""Validates and describes a store: ``python -m mcn_ext.store FILE``."""

import sys

from mcn_ext.data.store import main

if __name__ == "__main__":
    sys.exit(main())
