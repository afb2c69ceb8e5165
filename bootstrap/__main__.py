"""Entry of ``python3 -m bootstrap``: the version check, in words that older Pythons can read too."""

import sys

if sys.version_info < (3, 10):  # noqa: UP036 - this file is what tells a user of an older Python
    found = ".".join(str(number) for number in sys.version_info[:3])
    sys.exit(
        "error: Python 3.10 or newer is needed, found Python " + found + " at " + sys.executable
        + "; name a newer one, as in: make test PYTHON=/path/to/python3"
    )

from bootstrap.environment import main  # noqa: E402 - only readable from Python 3.10 on

sys.exit(main())
