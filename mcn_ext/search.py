"""Finds places in videos for a sentence: ``python -m mcn_ext.search``."""

import sys

from mcn_ext.evaluation.search import main

if __name__ == "__main__":
    sys.exit(main())
