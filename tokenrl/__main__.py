"""Makes `python -m tokenrl` the same as the command `tokenrl`."""

from __future__ import annotations

import sys


def main() -> int:
    """Run one command and return its exit code; say of an interruption, also while it is imported, what is saved."""
    try:
        from tokenrl.cli import main as run

        return run()
    except KeyboardInterrupt:
        print(
            "\ntokenrl: stopped by Ctrl-C. A training saves nothing before its first step. The same command with "
            "--resume auto goes on from its last checkpoint, or begins again where there is none.",
            file=sys.stderr,
        )
        return 130


if __name__ == "__main__":
    sys.exit(main())
