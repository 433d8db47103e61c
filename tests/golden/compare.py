"""Run the golden runs with the code of a commit and of the working tree, and compare them within rounding.

    python tests/golden/compare.py COMMIT [--only NAME ...] [--jobs 2]

The commit is checked out into a temporary folder, which is removed again. The table of runs is the working
tree's for both. Exit code 1 says that something differs, 2 that the commit itself could not be run.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from artifacts import artifacts, difference
from golden_runs import ROOT, RUNS, Failed, execute


def git(*words: str) -> str:
    """Run git in the working tree and return what it prints."""
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        print(f"git {words[0]} failed: {done.stderr.strip()}", file=sys.stderr)
        sys.exit(2)
    return done.stdout.strip()


@contextlib.contextmanager
def checkout(commit: str) -> Iterator[Path]:
    """Check a commit out into a temporary folder, and remove it whatever happens."""
    with tempfile.TemporaryDirectory(prefix="golden-") as folder:
        tree = Path(folder).resolve() / "tree"
        git("worktree", "add", "--detach", "--quiet", str(tree), commit)
        try:
            yield tree
        finally:
            git("worktree", "remove", "--force", str(tree))


def verdict(name: str, before: Path, folder: Path) -> str:
    """Run one golden run with the code of a checkout and of the working tree, and say whether it is the same.

    Raises:
        Failed: The run failed in the checkout, so there is nothing to compare with.
    """
    began = time.monotonic()
    execute(name, before, folder / "before" / name, folder / "models before")
    first = artifacts(folder / "before" / name)
    try:
        execute(name, ROOT, folder / "after" / name, folder / "models after")
    except Failed as error:
        return f"DIFFERENT: {error}"
    second = artifacts(folder / "after" / name)
    result = difference(first, second)
    if result:
        return f"DIFFERENT: {result}"
    added = sorted(set(second) - set(first))
    note = f", and writes {', '.join(added)} too" if added else ""
    return f"same ({len(first)} files, {time.monotonic() - began:.0f} s{note})"


def compare(before: Path, folder: Path, names: list[str], jobs: int) -> int:
    """Print a line for each run in the order of the table, and return how many differ."""
    different = 0
    with ThreadPoolExecutor(jobs) as pool:
        verdicts = [pool.submit(verdict, name, before, folder) for name in names]
        try:
            for name, promised in zip(names, verdicts, strict=True):
                text = promised.result()
                different += text.startswith("DIFFERENT")
                print(f"{name:22}{text}", flush=True)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return different


def main() -> int:
    """Compare, and return the exit code."""
    parser = argparse.ArgumentParser(
        description="Compare the golden runs of a commit and the working tree."
    )
    parser.add_argument("commit", help="what the working tree is compared with")
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS), metavar="NAME")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each with one thread")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the checkout is removed
    commit = git("rev-parse", "--verify", args.commit + "^{commit}")
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="golden-") as folder, checkout(commit) as tree:
        try:
            different = compare(tree, Path(folder).resolve(), args.only, args.jobs)
        except Failed as error:
            print(f"The commit {args.commit} cannot be compared with: {error}", file=sys.stderr)
            return 2
    seconds = time.monotonic() - began
    print(f"{different} of {len(args.only)} runs differ from {commit[:12]}, {seconds:.0f} s")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
