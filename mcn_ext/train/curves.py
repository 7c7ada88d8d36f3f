"""Draws a run's curves; see :mod:`mcn_ext.study.curves`."""

from mcn_ext.study.curves import curves  # noqa: F401
