"""Run the golden runs with the code of a commit and of the working tree, and compare them within rounding.

    python tests/golden/compare.py COMMIT [--only NAME ...] [--jobs 2] [--cache DIR] [--keep DIR]

The commit is checked out into a temporary folder, which is removed again. The table of runs is the working
tree's for both. Exit code 1 says that something differs, 2 that the commit itself could not be run.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from artifacts import artifacts, difference
from golden_runs import ROOT, RUNS, Failed, execute


@dataclass(frozen=True)
class Side:
    """One of the two trees that are compared.

    Attributes:
        tree: The checkout.
        results: Where the folders of its runs lie.
        models: Where it keeps its own warm-started models.
    """

    tree: Path
    results: Path
    models: Path

    def run(self, name: str) -> Path:
        """Return the folder of a run, which is made unless an earlier comparison has left it there."""
        folder = self.results / folder_name(name)
        if not folder.exists():
            partial = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=self.results))
            try:
                execute(name, self.tree, partial / "run", self.models)
                (partial / "run").rename(folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
        return folder


def folder_name(name: str) -> str:
    """Return a name that changes with the run's command lines and the packages that decide its numbers."""
    packages = ("torch", "transformers", "accelerate", "peft", "gymnasium", "numpy", "safetensors")
    versions = {package: metadata.version(package) for package in packages}
    recipe = json.dumps([asdict(RUNS[name]), versions, sys.version], sort_keys=True, default=dict)
    return f"{name}-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"


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


def verdict(name: str, before: Side, after: Side) -> str:
    """Run one golden run on both sides, and say whether it is the same.

    Raises:
        Failed: The run failed on the first side, so there is nothing to compare with.
    """
    began = time.monotonic()
    first = artifacts(before.run(name))
    try:
        second = artifacts(after.run(name))
    except Failed as error:
        return f"DIFFERENT: {error}"
    result = difference(first, second)
    if result:
        return f"DIFFERENT: {result}"
    added = sorted(set(second) - set(first))
    note = f", and writes {', '.join(added)} too" if added else ""
    return f"same ({len(first)} files, {time.monotonic() - began:.0f} s{note})"


def compare(before: Side, after: Side, names: list[str], jobs: int) -> int:
    """Print a line for each run in the order of the table, and return how many differ."""
    different = 0
    with ThreadPoolExecutor(jobs) as pool:
        verdicts = [pool.submit(verdict, name, before, after) for name in names]
        try:
            for name, promised in zip(names, verdicts, strict=True):
                text = promised.result()
                different += text.startswith("DIFFERENT")
                print(f"{name:22}{text}", flush=True)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return different


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Compare the golden runs of a commit and the working tree."
    )
    parser.add_argument("commit", help="what the working tree is compared with")
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS), metavar="NAME")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each with one thread")
    parser.add_argument(
        "--cache", type=Path, help="keep the commit's results here, and use those kept"
    )
    parser.add_argument(
        "--keep", type=Path, help="leave the working tree's results in this new folder"
    )
    args = parser.parse_args()
    if args.keep and args.keep.exists() and any(args.keep.iterdir()):
        parser.error(f"--keep {args.keep}: the folder is not empty")
    return args


def main() -> int:
    """Compare, and return the exit code."""
    args = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the checkout is removed
    commit = git("rev-parse", "--verify", args.commit + "^{commit}")
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="golden-"))).resolve()
        first = (args.cache.resolve() if args.cache else scratch) / commit
        second = args.keep.resolve() if args.keep else scratch / "working-tree"
        sides = [
            Side(stack.enter_context(checkout(commit)), first / "runs", first / "models"),
            Side(ROOT, second / "runs", second / "models"),
        ]
        for side in sides:
            side.results.mkdir(parents=True, exist_ok=True)
        try:
            different = compare(*sides, args.only, args.jobs)
        except Failed as error:
            print(f"The commit {args.commit} cannot be compared with: {error}", file=sys.stderr)
            return 2
    print(
        f"{different} of {len(args.only)} runs differ from {commit[:12]}, {time.monotonic() - began:.0f} s"
    )
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
