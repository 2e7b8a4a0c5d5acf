"""`python -m relay`: the command line."""

import sys

from relay.cli import main

sys.exit(main())
