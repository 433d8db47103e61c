"""Makes `python -m tokenrl` the same as the command `tokenrl`."""

from __future__ import annotations

import sys

from tokenrl.cli import main

sys.exit(main())
