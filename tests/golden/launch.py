"""Run the command line `tokenrl` of the tree that GOLDEN_TREE names; fail if any code came from elsewhere.

An installed tokenrl, an editable one too, must not stand in for the tree that is to be tested.
"""

import os
import sys
from pathlib import Path


def refuse_foreign(tree: Path) -> None:
    """Stop the process if a module of tokenrl or toy_tasks does not lie in the tree."""
    for name, module in sys.modules.items():
        file = getattr(module, "__file__", None)
        is_ours = name.split(".")[0] in ("tokenrl", "toy_tasks")
        if is_ours and file and not Path(file).resolve().is_relative_to(tree):
            sys.exit(f"the golden run of {tree} imported {file}")


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
