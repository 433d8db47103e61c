"""Reads the pages of reports, as a browser would, without one."""

from __future__ import annotations

from html.parser import HTMLParser

EVIL = '<script>alert("1")</script>'


class Page(HTMLParser):
    """Collects the tags and the text outside of style and script, and notices a tag that is never closed."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.open = [], "", []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "input", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"style", "script"} & set(self.open):
            self.text += data

    def all(self, tag, kind=None):
        """The attributes of every element with this tag and, if it is named, of this class."""
        matching = [attributes for name, attributes in self.tags if name == tag]
        return [a for a in matching if kind is None or kind in (a.get("class") or "").split()]
