"""Draws and describes a run or a study: ``python -m mcn_ext.report RUN``."""

import sys

from mcn_ext.study.curves import main

if __name__ == "__main__":
    sys.exit(main())
