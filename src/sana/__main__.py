"""`python -m sana` is the command."""

import sys

from sana.apps.cli import main

sys.exit(main())
