"""What README and pages show: the commands, and the blocks with what they print."""

import re
import shlex
from pathlib import Path


def commands(page: Path) -> list[list[str]]:
    """The words of the commands that a page shows, after `tokenrl`, without comments and torchrun."""
    code_blocks = re.findall(r"^```\w*\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    lines = [
        re.sub("^torchrun .* -m ", "", line) for block in code_blocks for line in block.splitlines()
    ]
    return [
        shlex.split(line, comments=True)[1:]
        for line in lines
        if re.match(r"tokenrl [a-z-]+ ", line)
    ]


def blocks(page: Path) -> list[tuple[str, str, str]]:
    """The blocks of a page: the language, the text, and what the page says that it prints."""
    return re.findall(
        r"```(python|bash|yaml)\n(.*?)```(?:\n\n```text\n(.*?)```)?", page.read_text(), re.DOTALL
    )


def write_files(page: Path) -> None:
    """Write the blocks of a page that begin with the name of a file."""
    for _, text, _ in blocks(page):
        if name := re.match(r"# (\w+\.(?:py|yaml))\n", text):
            Path(name[1]).write_text(text)
