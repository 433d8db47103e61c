"""Pages can be read in one go: no long sentence, no long paragraph, no word translated piece by piece."""

from __future__ import annotations

import re
from collections.abc import Iterator

from test_house import DOCUMENTS, ROOT

WORDS, CHARACTERS = 30, 600
"""The longest sentence, and the longest paragraph: five lines."""
REFUSED = ("foretold", "commonest", "own ones?", "it is said", "is said whether", "of no account")
REFUSED += ("mend(?:s|ed)?", "thereof", "whereof", "therewith", "wherein")
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md"]
PAGES += [page for page in DOCUMENTS if page.is_relative_to(ROOT / "recipes")]
# Plans of the study stay as they were before the runs.
PAGES = [page for page in PAGES if page.parent.name != "plans"]


def paragraphs(text: str) -> Iterator[tuple[int, str]]:
    """Yield paragraphs and points of lists with their first lines; code, tables and headings are left out."""
    without_code = re.sub(
        r"(?ms)^ *(```|~~~).*?^ *\1 *$|^---$.*?^---$|::\n\n(?:    .*\n)+",
        lambda block: "\n" * block[0].count("\n"),
        text,
    )
    block: list[str] = []
    for number, line in enumerate([*without_code.splitlines(), ""], 1):
        words, point = line.strip(), re.match(r"\s*([-*+]|\d+\.) ", line)
        other = not words or words[0] in "#|<$!"
        if block and (other or point):
            yield number - len(block), " ".join(block)
            block = []
        if not other:
            block.append(line[point.end() :] if point else words)


def faults(text: str) -> list[str]:
    """Return the long sentences, long paragraphs and refused words of a page, each with its line."""
    found = []
    for line, paragraph in paragraphs(text):
        plain = re.sub(r"`[^`]*`|\$[^$]*\$", "Code", paragraph)
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", plain)
        if len(plain) > CHARACTERS:
            found.append(f"{line}: a paragraph of {len(plain)} characters: {plain[:60]}...")
        for sentence in re.split(r"(?<=[.!?])\W*\s(?=\W*[A-Za-z])|(?<=[:;])\s(?=[A-Z])", plain):
            count = len(re.findall(r"[\w'-]+", sentence))
            if count > WORDS:
                found.append(f"{line}: a sentence of {count} words: {sentence}")
        for word in re.findall(rf"(?i)\b(?:{'|'.join(REFUSED)})\b", plain):
            found.append(f"{line}: another word for: {word}")
    return found


def test_sentences_and_paragraphs_of_pages_are_short():
    found = [
        f"{page.relative_to(ROOT)}:{fault}" for page in PAGES for fault in faults(page.read_text())
    ]
    assert not found, "\n".join(found)


def test_the_rule_notices():
    word, short = "word " * 30, "# A heading\n\nA sentence of `code a b`. **Another.**"
    assert faults(f"{short}\n\n```\nX{word * 30}\n```\n\n| {word} b |\n\n- A {word[5:]}.\n") == []
    assert faults(f"{short}\n- Short.\n- A {word}.") == [f"5: a sentence of 31 words: A {word}."]
    assert faults("A [link](to.md).\n" * 100)[0].startswith("1: a paragraph of 799 characters")
    assert faults("The commonest mistake.") == ["1: another word for: commonest"]
