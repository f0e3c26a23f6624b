"""``python -m torchlathe``: the same as the ``torchlathe`` command."""

import sys

from torchlathe.tools.cli import main

if __name__ == "__main__":
    sys.exit(main())
