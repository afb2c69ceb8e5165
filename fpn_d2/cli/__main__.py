"""``python -m fpn_d2.cli`` is ``fpn-d2``."""

import sys

from fpn_d2.cli import main

if __name__ == "__main__":
    sys.exit(main())
