"""The documentation: the reference is what the code says, the menu has every page, the site works in a browser."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from shutil import which
from threading import Thread
from urllib.parse import unquote, urldefrag

import pytest
from folders import RECIPES, ROOT

from tokenrl.core import PRESETS, Estimator

SITE, PAGES = RECIPES / "site", RECIPES / "pages"
FILES = sorted(path.relative_to(ROOT) for path in PAGES.rglob("*.md"))
SIZES = [(1280, 900), (390, 800)]
ERRANDS = """
guides/choose.html | which estimator should I take
guides/choose.html | what algorithm is best for me, and why?
guides/choose.html | which estimator for one completion per prompt
guides/choose.html | choose
guides/choose.html#passk | which estimator for pass@k
guides/choose.html#passk | pass@k
guides/choose.html#agents | which estimator for agents
guides/choose.html#agents | agents
guides/read_a_run.html | my reward stays 0
guides/read_a_run.html | why does the model not learn anything?
guides/read_a_run.html | loss is zero
guides/read_a_run.html | zero
tutorials/own_task.html | train on my CSV
tutorials/own_task.html | train on my CSV with a reward in Python
tutorials/own_task.html | how do I use my own dataset?
tutorials/own_task.html | csv
tutorials/own_task.html | dataset
study/questions.html#2- | what does GRPO's std do
study/questions.html#2- | why divide by the standard deviation
study/questions.html#2- | std
study/questions.html#2- | normalise
guides/resume.html | resume after a kill
guides/resume.html | my job was interrupted, how do I continue?
guides/resume.html | resume
guides/resume.html | kill
guides/resume.html | chekpoint
reference/run_directory.html | what is in each file of a run
reference/run_directory.html | what do the output files contain
reference/run_directory.html | files
reference/run_directory.html | summary.json
guides/fast_and_small.html | use a GPU or a Mac
guides/fast_and_small.html | does it run on Apple silicon?
guides/fast_and_small.html | gpu
guides/fast_and_small.html | mac
guides/fast_and_small.html | cuda
guides/fast_and_small.html | windows
guides/fast_and_small.html | quantization
guides/fast_and_small.html#out-of-memory | out of memory
guides/read_a_run.html#completions-are-cut | stop token
tutorials/own_task.html#slow-rewards | asks a server
guides/compare.html#judge | judge my own runs
estimators.html#a-baseline-of-your-own | add my own baseline and check its bias
estimators.html#a-baseline-of-your-own | how do I write a custom baseline and test if it is biased?
estimators.html#a-baseline-of-your-own | baseline
estimators.html#a-baseline-of-your-own | bias
explain/distillation.html | distil from a teacher
explain/distillation.html | how do I distill a large model into a small one?
explain/distillation.html | teacher
explain/distillation.html | distillation
tutorials/tools.html | an environment of several turns with a tool
tutorials/tools.html | multi-turn agent with tool calls
tutorials/tools.html | tool
tutorials/tools.html | environment
rewards.html#is-it-better | is negative-only better?
rewards.html#what-does-a-noisy | noisy reward
rewards.html#may-the-teacher | self-distillation
reference/train.html | flag that bounds completions
guides/compare.html | how many seeds
reference/train.html#metrics | units of metrics
explain/kl.html#which | unbiased KL
explain/kl.html#which | k3 or k1
groups.html#token-mean | token mean or sequence mean
groups.html#is-the-group | group advantage biased
groups.html#does-it-pay | vineppo
run_directory.html | Hugging Face format
evaluate.html | compare two rewards
"""
"""The page that answers what a new user types into the search, as a question and in other words."""
SEARCH = """
const { readFileSync } = require("node:fs");
const [script, file, ...queries] = process.argv.slice(1);
const { items } = JSON.parse(readFileSync(file)), answers = [];
globalThis.self = globalThis;
globalThis.postMessage = ({ data }) => answers.push(data?.items.map(({ id }) => items[id].location));
require("node:vm").runInThisContext(readFileSync(script));
onmessage({ data: { type: 0, data: { items } } });
queries.forEach((input) => onmessage({ data: { type: 2, data: { input } } }));
console.log(JSON.stringify(answers.slice(1)));
"""
"""Asks the search of a site, as its pages do, and prints the addresses of the first results of each query."""


@pytest.mark.skipif(
    sys.version_info[:2] != (3, 11), reason="signatures stand there as Python 3.11 writes them"
)
def test_the_reference_is_what_the_code_says():
    pages = runpy.run_path(str(SITE / "reference.py"))["pages"]()
    for name, text in pages.items():
        assert (PAGES / "reference" / name).read_text(encoding="utf-8") == text, (
            f"run python recipes/site/reference.py; {name} is not what it makes"
        )


def test_the_index_by_paper_has_each_preset_with_its_bias():
    text = (PAGES / "reference" / "papers.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"(?m)^\| `(\w+)` \|(?: [^|]* \|){3} (\w+) \|", text))
    papers = [name for name, preset in PRESETS.items() if not preset.beyond]
    assert rows == {name: Estimator.preset(name).bias_status for name in papers}


def test_every_page_is_in_the_menu_and_in_the_list_of_pages():
    menu = re.findall(r'= "([\w/.-]+\.md)"', (SITE / "zensical.toml").read_text())
    assert {str(path) for path in FILES} <= {*menu}
    links = re.findall(r"\]\(([\w/.-]+\.md)\)", (PAGES / "README.md").read_text())
    listed = {(PAGES / link).resolve().relative_to(ROOT) for link in links}
    assert {*FILES} - {Path("recipes/pages/README.md")} <= listed


class Links(HTMLParser):
    """What a page links to and embeds, and the anchors that it has."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.links += [values[key] for key in ("href", "src") if values.get(key)]
        self.anchors |= {values[key] for key in ("id", "name") if values.get(key)}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built in a folder of its own."""
    pytest.importorskip("zensical")
    pytest.importorskip("latex2mathml")
    output = tmp_path_factory.mktemp("build")
    command = [sys.executable, str(SITE / "build.py"), "--output", str(output)]
    built = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert built.returncode == 0, built.stdout + built.stderr
    return output / "site"


@pytest.mark.slow
def test_every_link_anchor_and_picture_exists(site):
    pages = {path: Links(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}
    broken = []
    for path, page in pages.items():
        for link in page.links:
            address, anchor = urldefrag(unquote(link))
            if re.match(r"\w+:|//", address) or path.name == "404.html":
                continue
            target = (path.parent / address).resolve() if address else path
            if not target.is_file() or (
                anchor and target in pages and anchor not in pages[target].anchors
            ):
                broken.append(f"{path.relative_to(site)}: {link}")
    assert broken == []
    listed = re.findall(r"\]\(([^)]+)\)", (site / "llms.txt").read_text())
    assert len(listed) > 40 and all((site / path).is_file() for path in listed)


@pytest.mark.slow
def test_the_address_of_each_page_that_has_moved_leads_to_its_text(site):
    lines = (SITE / "moved.txt").read_text(encoding="utf-8").splitlines()
    assert len(lines) > 40
    for old, new in map(str.split, lines):
        assert not (ROOT / old).with_suffix(".md").exists(), f"{old} is a page again"
        text = (site / old).read_text(encoding="utf-8")
        (target,) = re.findall(r'http-equiv="refresh" content="0; url=([^"]+)"', text)
        assert re.findall(r'rel="canonical" href="([^"]+)"', text) == [target]
        address, anchor = urldefrag(target)
        page = ((site / old).parent / address).resolve()
        assert page == site / urldefrag(new)[0], old
        assert not anchor or anchor in Links(page.read_text(encoding="utf-8")).anchors, old


@pytest.mark.slow
@pytest.mark.skipif(which("node") is None, reason="there is no node to run the search with")
def test_the_search_leads_to_the_section_that_answers(site):
    (worker,) = (site / "assets" / "javascripts" / "workers").glob("search.*.js")
    errands = [line.split(" | ") for line in ERRANDS.strip().splitlines()]
    command = ["node", "-e", SEARCH, str(worker), str(site / "search.json")]
    asked = subprocess.run(
        [*command, *(words for _, words in errands)], capture_output=True, text=True, check=True
    )
    answers = json.loads(asked.stdout)
    missed = [
        (words, right, found[:3])
        for (right, words), found in zip(errands, answers, strict=True)
        if not any(right in address for address in found[:3])
    ]
    assert missed == []


@pytest.fixture(scope="module")
def home(site):
    """The address of the site, which a server on this machine serves."""
    handler = partial(SimpleHTTPRequestHandler, directory=str(site))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


@pytest.fixture(scope="module")
def browser():
    """A browser without a window."""
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = which("chromium") or which("chromium-browser") or which("google-chrome")
    if chromium is None:
        pytest.skip("there is no browser: neither chromium nor google-chrome is on the path")
    with playwright.sync_playwright() as play:
        yield play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])


@pytest.mark.slow
def test_the_site_works_in_a_browser_and_asks_no_other_machine(site, home, browser):
    requests, messages = [], []
    for width, height in SIZES:
        page = browser.new_page(viewport={"width": width, "height": height})
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda message: messages.append((message.type, message.text)))
        page.on("pageerror", lambda error: messages.append(("error", str(error))))
        for path in sorted(site.rglob("*.html")):
            if 'http-equiv="refresh"' in path.read_text(encoding="utf-8"):
                continue  # the browser leaves it at once
            page.goto(home + str(path.relative_to(site)))
            wide = page.evaluate("document.documentElement.scrollWidth")
            assert wide <= width + 1, f"{path.name} is {wide} pixels wide on {width}"
        page.close()
    assert [url for url in requests if not url.startswith((home, "data:", "blob:"))] == []
    assert [text for kind, text in messages if kind == "error"] == []


@pytest.mark.slow
def test_the_box_of_the_search_shows_what_the_search_finds(home, browser):
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto(home, wait_until="networkidle")
    page.keyboard.press("Control+k")
    page.get_by_role("combobox", name="Search").fill("out of memory", timeout=10_000)
    results = page.get_by_role("option")
    results.first.wait_for(timeout=10_000)
    assert "#out-of-memory" in " ".join(link.get_attribute("href") for link in results.all()[:3])


@pytest.mark.slow
def test_formulas_are_typeset_and_the_index_by_paper_is_cards_on_a_telephone(site, home, browser):
    for source in RECIPES.rglob("*.md"):
        text = re.sub(r"(?ms)^```.*?^```|`[^`\n]*`", "", source.read_text(encoding="utf-8"))
        formulas = re.findall(r"\$\$.+?\$\$|\$[^$\n]+\$", text)
        built = site / source.relative_to(ROOT).with_suffix(".html")
        if formulas and built.exists():
            html = built.read_text(encoding="utf-8")
            assert html.count("<math") == len(formulas) and "arithmatex" not in html, source
    page = browser.new_page(viewport={"width": 390, "height": 800})
    page.goto(home + "recipes/pages/reference/papers.html")
    row = page.locator(".cards tbody tr").first
    left = {cell.bounding_box()["x"] for cell in row.locator("td").all()}
    assert len(left) == 1 and not page.locator(".cards th").first.is_visible()
