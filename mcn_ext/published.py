"""Describes and converts published weights: ``python -m mcn_ext.published FILE``."""

import sys

from mcn_ext.prepare.published import main

if __name__ == "__main__":
    sys.exit(main())
