"""`python -m flashprefill` is the command line tool, for when its script is not on the path."""

import sys

from .cli import main

sys.exit(main())
