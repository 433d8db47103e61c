"""Run the command line `tokenrl` of the tree that GOLDEN_TREE names; fail if any code came from elsewhere.

An installed tokenrl, an editable one too, must not stand in for the tree that is to be tested.
"""

import os
import sys
from pathlib import Path


def foreign(tree: Path) -> list[str]:
    """Return the files of imported modules of tokenrl and toy_tasks that do not lie in the tree."""
    names = [name for name in sys.modules if name.split(".")[0] in ("tokenrl", "toy_tasks")]
    files = [getattr(sys.modules[name], "__file__", None) for name in names]
    return [file for file in files if file and not Path(file).resolve().is_relative_to(tree)]


def refuse_foreign(tree: Path) -> None:
    """Stop the process if code came from elsewhere."""
    if result := foreign(tree):
        sys.exit(f"the golden run of {tree} imported {result[0]}")


def main() -> int:
    """Run one command and return its exit code."""
    tree = Path(os.environ["GOLDEN_TREE"]).resolve()
    sys.path.pop(0)  # the folder of this file, which is no part of the tree that is tested
    import tokenrl.cli

    refuse_foreign(tree)
    code = tokenrl.cli.main(sys.argv[1:])
    refuse_foreign(tree)
    return code


if __name__ == "__main__":
    sys.exit(main())
