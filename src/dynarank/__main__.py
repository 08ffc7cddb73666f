"""``python -m dynarank``: the command line."""

import sys

from dynarank.cli import main

if __name__ == "__main__":
    sys.exit(main())
