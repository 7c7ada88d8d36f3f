"""python -m mcn_ext.study"""

import sys

from mcn_ext.study.plan import main

sys.exit(main())
