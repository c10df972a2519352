"""`python -m sana.apps.cli` is the command."""

import sys

from sana.apps.cli import main

sys.exit(main())
