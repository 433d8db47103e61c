"""Builds the site of the documentation: all pages, the notebook, and each program that a page links to.

`make docs` runs it and leaves the site in `build/site`, with every page as HTML and as Markdown, and `llms.txt`,
the list of all pages. The pages stand in `build/docs` as in the repository, so that their links stay the same.
The menu of the site is `zensical.toml` beside this program. `tests/test_site.py` opens the result.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["tokenrl-lm[docs]"]
# [tool.uv.sources]
# tokenrl-lm = { path = "../..", editable = true }
# ///

import json
import os
import re
import shutil
import subprocess
import sys
from base64 import b64decode
from collections import defaultdict
from html import unescape
from pathlib import Path
from typing import Any

import tyro
from latex2mathml.converter import convert

ROOT = Path(__file__).parents[2]
SETTINGS = Path(__file__).with_name("zensical.toml")
QUESTIONS = Path("recipes/pages/guides/questions.md")
"""The page whose questions are the words by which the search finds the pages that answer them."""
LINK = re.compile(r"\]\((?!https?:|#|mailto:)([^)#\s]+)(#[^)\s]*)?\)")
"""A link of Markdown to a file: its path and its anchor."""
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
"""A formula of a built page: its element, whether it stands in a line, and its LaTeX."""
MOVED = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Moved</title>
<link rel="canonical" href="{0}"><meta http-equiv="refresh" content="0; url={0}">
<p>This page has moved <a href="{0}">here</a>.</p></html>
"""
PICTURES = (".png", ".svg")
LANGUAGES = {
    ".py": "python",
    ".toml": "toml",
    ".json": "json",
    ".yaml": "yaml",
    ".txt": "text",
    ".csv": "text",
}


class Site:
    """The tree of pages that the site is made of.

    Attributes:
        docs: folder of the pages; a page has the path there that its file has in the repository.
        sources: files that pages link to and that are shown as pages of code.
    """

    def __init__(self, docs: Path) -> None:
        self.docs = docs
        self.sources: set[Path] = set()

    def file(self, path: Path) -> Path:
        """Return the file of the tree for a path in the repository; its folder is made."""
        file = self.docs / path
        file.parent.mkdir(parents=True, exist_ok=True)
        return file

    def add_page(self, path: Path, text: str) -> None:
        """Add a page of the repository; its links are those of the site then."""

        def rewritten(link: re.Match[str]) -> str:
            target = (ROOT / path.parent / link[1]).resolve().relative_to(ROOT)
            if (ROOT / target).is_dir():
                return "]"
            return f"]({self.link(link[1], target)}{link[2] or ''})"

        self.file(path).write_text(LINK.sub(rewritten, text), encoding="utf-8")

    def link(self, text: str, target: Path) -> str:
        """Return the link of a page to a file of the repository, which the site gets where it needs it."""
        if not (ROOT / target).exists():  # a picture of a notebook; else the build names it
            return text
        if target.suffix in PICTURES:
            shutil.copy(ROOT / target, self.file(target))
        elif target.suffix == ".ipynb":
            return text.removesuffix(".ipynb") + ".md"
        elif target.suffix in LANGUAGES:
            self.sources.add(target)
            return f"{text}.md"
        return text

    def add_sources(self) -> None:
        """Add a page for each file of code that pages link to; search leaves these out."""
        for path in sorted(self.sources):
            code = (ROOT / path).read_text(encoding="utf-8")
            language = LANGUAGES[path.suffix]
            front = "---\nsearch:\n  exclude: true\n---\n"
            text = f"{front}# {path.name}\n\n`{path}`\n\n````{language}\n{code}````\n"
            page = self.file(path.with_name(path.name + ".md"))
            page.write_text(text, encoding="utf-8")


def from_notebook(path: Path, cells: list[dict[str, Any]], site: Site) -> str:
    """Return a notebook as Markdown, with the output that is stored in it; its pictures are written beside."""
    parts = []
    for number, cell in enumerate(cells):
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                picture = path.with_name(f"{path.stem}_{number}.png")
                site.file(picture).write_bytes(b64decode(data["image/png"]))
                parts.append(f"![output of the cell above]({picture.name})")
                continue
            text = "".join(output.get("text") or data.get("text/plain", []))
            if text.strip():
                parts.append(f"```text\n{text.rstrip()}\n```")
    return "\n\n".join(parts) + "\n"


def typeset(formula: re.Match[str]) -> str:
    """Return a formula as MathML, which browsers draw without a script or a font of the site."""
    element, bracket, latex = formula.groups()
    display = "inline" if bracket == "(" else "block"
    return f"<{element}>{convert(unescape(latex), display=display)}</{element}>"


def questions(page: Path) -> dict[str, str]:
    """Return the questions, with their answers, that lead to each address of the site."""
    asked = defaultdict(str)
    for question in page.read_text(encoding="utf-8").split("\n### ")[1:]:
        for target, anchor in LINK.findall(question):
            address = os.path.normpath(QUESTIONS.parent / target).replace("README.md", "index.md")
            asked[address.removesuffix(".md") + f".html{anchor}"] += LINK.sub("]", question)
    return asked


def replace_search(site: Path, asked: dict[str, str]) -> None:
    """Give the site the search of this project, and its index the questions in place of their page."""
    (worker,) = (site / "assets" / "javascripts" / "workers").glob("search.*.js")
    shutil.copy(SETTINGS.with_name("search.js"), worker)
    index = json.loads((site / "search.json").read_text(encoding="utf-8"))
    address = f"{QUESTIONS.with_suffix('.html').as_posix()}#"
    items = [item for item in index["items"] if not item["location"].startswith(address)]
    for item in items:
        item["text"] = re.sub(r"\\[(\[].*?\\[)\]]", " ", item["text"], flags=re.DOTALL)
        item["asked"] = asked.get(item["location"], "")
    text = json.dumps(index | {"items": items})
    (site / "search.json").write_text(text, encoding="utf-8")


def redirect(site: Path) -> None:
    """Let each address of a page that has moved lead to where its text is now, by the lines of moved.txt."""
    for line in SETTINGS.with_name("moved.txt").read_text(encoding="utf-8").splitlines():
        old, new = map(Path, line.split())
        target = os.path.relpath(new, old.parent)
        page = site / old
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(MOVED.format(target), encoding="utf-8")


def main(output: Path = ROOT / "build") -> None:
    """Build the site into the folder `site` of the output."""
    docs = output / "docs"
    for folder in (docs, output / "site"):  # so that a page that goes does not stay
        shutil.rmtree(folder, ignore_errors=True)
    site = Site(docs)
    patterns = ["README.md", "CHANGELOG.md", "recipes/**.md", "recipes/*.ipynb"]
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *patterns]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    pages = sorted(map(Path, listed.split()))
    for path in pages:
        text = (ROOT / path).read_text(encoding="utf-8")
        if path.suffix == ".ipynb":
            text = from_notebook(path, json.loads(text)["cells"], site)
        site.add_page(path.with_suffix(".md"), text)
    site.add_sources()
    shutil.copy(SETTINGS, output / "zensical.toml")
    shutil.copy(SETTINGS.with_name("tables.css"), docs / "tables.css")
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--config-file"]
    subprocess.run([*command, str(output / "zensical.toml")], check=True)
    for page in (output / "site").rglob("*.html"):
        text = FORMULA.sub(typeset, page.read_text(encoding="utf-8"))
        page.write_text(text, encoding="utf-8")
    replace_search(output / "site", questions(docs / QUESTIONS))
    redirect(output / "site")
    markdown = sorted(path.relative_to(docs) for path in docs.rglob("*.md"))
    for path in markdown:
        shutil.copy(docs / path, output / "site" / path)
    sentence = "Policy gradients on small language models, with the bias of each estimator checked."
    about = f"# tokenrl\n\n> {sentence}\n\n"
    for path in (path.with_suffix(".md") for path in pages):
        title = re.search(r"^# (.+)$", (docs / path).read_text(encoding="utf-8"), re.MULTILINE)
        about += f"- [{title[1] if title else path.stem}]({path})\n"
    (output / "site" / "llms.txt").write_text(about, encoding="utf-8")
    print(f"{output / 'site' / 'index.html'}: {len(markdown)} pages")


if __name__ == "__main__":
    tyro.cli(main)
