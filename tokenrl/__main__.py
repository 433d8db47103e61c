"""Makes `python -m tokenrl` the same as the command `tokenrl`."""

from __future__ import annotations

import sys


def main() -> int:
    """Run one command and return its exit code; an interruption while it is imported is silent too."""
    try:
        from tokenrl.cli import main as run

        return run()
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
