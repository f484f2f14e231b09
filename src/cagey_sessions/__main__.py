"""``python -m cagey_sessions``. What lives here: the hand-over to the command line. What must not: anything else."""

import sys

from .tools.cli import main

if __name__ == "__main__":
    sys.exit(main())
