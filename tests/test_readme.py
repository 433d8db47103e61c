"""README and pages: tables are what the code says and the lab finds, code runs, commands exist and run."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import pytest
from pages import commands, write_files

import tokenrl
from tokenrl.cli import COMMANDS, main
from tokenrl.core import PRESETS, Estimator
from tokenrl.flags import parse
from tokenrl.lab import named_estimators
from tokenrl.lab.exact.verdict import default_problems
from toy_tasks.models import TinyModel

ROOT = Path(__file__).parents[1]
RECIPES, FOLDER = ROOT / "recipes", ROOT / "recipes" / "pages"
README, ALL = (ROOT / "README.md").read_text(), (FOLDER / "explain" / "estimators.md").read_text()
PAGES = [ROOT / "README.md", RECIPES / "README.md"]
PAGES += [FOLDER / "explain" / "estimators.md"]
PAGES += [FOLDER / "guides" / f"{name}.md" for name in ("resume", "speed")]
WITH_COMMANDS = [path for path in sorted(FOLDER.rglob("*.md")) if commands(path)]


def axes(name):
    e = Estimator.preset(name)
    return f"| `{name}` | {e.baseline} | {e.scale} | {e.aggregation} | {e.ratio} |"


def named(page):
    return re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)


# the others are in defaults.md and, without a reward, in distillation.md
PAPERS = [name for name, p in PRESETS.items() if not (p.beyond or "beta" in p.fields)]


def measured(name):
    """The declared bias, the cosine and the noise of a preset, as the page has them."""
    (row,) = re.findall(rf"^\| `{name}` \| .* \| (\w+ \| [\d.]+ \| [\d.]+ \|)$", ALL, re.MULTILINE)
    return row


def test_every_preset_has_its_row():
    assert named(ALL) == PAPERS
    for name in PAPERS:
        assert measured(name).startswith(f"{Estimator.preset(name).bias_status} |"), name


def test_the_pages_count_what_the_code_has():
    others = sum(bool(preset.beyond) for preset in PRESETS.values())
    teachers = len(PRESETS) - len(PAPERS) - others
    words = {6: "six", 8: "eight", 9: "nine"}
    assert f"checks {len(named_estimators())} declarations" in ALL
    assert f"All {len(PAPERS)} presets of the table" in ALL
    assert f"There are {len(PRESETS)} presets: [{len(PAPERS)} from papers]" in README
    assert f"[{words[teachers]} that learn from a teacher]" in README
    assert f"[{words[others]} defaults of other toolkits]" in README
    problems = len(default_problems())
    assert (
        f"over {words[problems]} problems" in README
        and f"the {words[problems]} tiny problems" in ALL
    )


def test_the_readme_keeps_six_rows_with_the_numbers_of_the_page():
    assert len(named(README)) == 6
    for name in named(README):
        assert f"{axes(name)} {measured(name)}" in README.splitlines()


@pytest.mark.parametrize(
    "page",
    [ROOT / "README.md", RECIPES / "README.md", *WITH_COMMANDS],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_the_commands_of_a_page_exist(page):
    for name, *words in commands(page):
        if name == "lab":
            name, *words = f"lab {words[0]}", *words[1:]
        assert parse(name, COMMANDS[name], words)


def test_the_python_of_the_pages_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = [json.dumps({"prompt": f"{n}>", "answer": str(n)}) for n in range(20)]
    Path("data.jsonl").write_text("\n".join(rows))
    model, train = TinyModel(tokens=tuple("0123456789>"))(seed=0), tokenrl.train
    short = {
        "model": model,
        "max_steps": 1,
        "max_completion_length": 2,
        "eval_generations": 0,
        "quiet": True,
    }
    monkeypatch.setattr(tokenrl, "train", lambda **settings: train(**settings | short))
    blocks = [
        b for page in PAGES for b in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    ]
    assert len(blocks) >= 3
    for page in PAGES:
        write_files(page)
    for block in blocks:
        Path("block.py").write_text(block)
        runpy.run_path("block.py")
        comments = re.findall(r"^print\(.*\)(?:  # (.+)$|\n((?:# .+\n)+))", block, re.MULTILINE)
        shown = [
            same or below.replace("# ", "").replace("\n", " ").strip() for same, below in comments
        ]
        printed = capsys.readouterr().out.splitlines()
        assert shown == printed or (not shown and len(printed) == 1)
    assert {path.name for path in Path("runs").iterdir()} == {"mine", "half"}


@pytest.mark.slow
def test_the_commands_of_the_readme_run(tmp_path, monkeypatch, handlers):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TOKENRL_CACHE", str(tmp_path / "cache"))
    first = ["train", "--output-dir", "runs/sort_digits-rloo-seed0"]  # as `make train` does
    for name, *words in [first, *commands(ROOT / "README.md")]:
        short = (
            ["--max-steps", "1", "--eval-generations", "0", "--quiet"] if name == "train" else []
        )
        if "HuggingFaceTB" not in " ".join(words):  # which is a download
            assert main([name, *words, *short]) == 0, words


@pytest.mark.slow
def test_the_numbers_are_those_of_the_lab():
    from tokenrl.lab import measure_bias

    for name in PAPERS:
        verdict = measure_bias(Estimator.preset(name))
        assert measured(name).endswith(f"| {verdict.cosine:.3f} | {verdict.noise:.2f} |"), name
