"""Commands of tokenrl that end well, in the process of the tests."""

from tokenrl.cli import main


def completes(line: str, *words: str) -> None:
    """Check that a command ends with exit code 0: a line of words, and words behind it that may hold spaces."""
    assert main([*line.split(), *words]) == 0
