"""``python -m fpn_d2.cli`` is ``fpn-d2``."""

import sys

from fpn_d2.cli import main

sys.exit(main())
