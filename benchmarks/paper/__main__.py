"""``python -m benchmarks.paper``, from the root of the repository."""

import sys

from .command import main

sys.exit(main())
