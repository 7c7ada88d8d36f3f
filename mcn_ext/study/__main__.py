"""python -m mcn_ext.study"""

from mcn_ext.study.plan import main
from mcn_ext.train import flags

flags.run(main)
