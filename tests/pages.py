"""What README and pages show: the commands, and the blocks with what they print."""

import re
import runpy
import shlex
import string
import sys
from pathlib import Path

from folders import write_rows

TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant: "


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


def section(page: Path, heading: str) -> str:
    """The text of a page below a heading that begins so, up to the next one of its level."""
    text = page.read_text(encoding="utf-8")
    return text.partition(f"\n## {heading}")[2].partition("\n## ")[0]


def write_files(page: Path) -> None:
    """Write the blocks of a page that begin with the name of a file."""
    for _, text, _ in blocks(page):
        if name := re.match(r"# (\w+\.(?:py|yaml))\n", text):
            Path(name[1]).write_text(text)


def make_chat_model_and_data(folder: Path, context: int = 256, eos: str = "<eos>") -> None:
    """Save a tiny model with a chat template, and rows of questions with answers as GSM8K has them."""
    from toy_tasks.models import character_tokenizer, tiny_llama

    tokenizer = character_tokenizer(string.printable)
    tokenizer.chat_template = TEMPLATE
    tokenizer.add_special_tokens({"eos_token": eos})
    tiny_llama(tokenizer, layers=1, hidden=16, heads=2, context=context).save_pretrained(
        folder / "model"
    )
    tokenizer.save_pretrained(folder / "model")
    rows = [
        {"question": f"What is {i} + 1?", "answer": f"Count on.\n#### {i + 1}"} for i in range(12)
    ]
    write_rows(folder / "sums.jsonl", rows)


def give_tools(folder: Path, monkeypatch) -> None:
    """Run the program of the page on a pretrained model with tools, with a tiny model in its place."""
    make_chat_model_and_data(folder, context=1024, eos="<|im_end|>")
    monkeypatch.setattr(sys, "argv", ["give_tools.py", "model", "smollm-tools"])
    runpy.run_path("give_tools.py")
