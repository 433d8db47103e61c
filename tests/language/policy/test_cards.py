"""Model cards: what they say of base model, command and adapter, as the hub reads them."""

from __future__ import annotations

import re

import yaml

import tokenrl
from tokenrl.language.policy.cards import Card, base_model
from toy_tasks.models import TinyModel


def read(path):
    """The front matter of a card as YAML, and its text."""
    _, front, text = path.read_text().split("---\n", 2)
    return yaml.safe_load(front), text


def short(**options):
    return tokenrl.train(
        task="vowels", max_steps=1, prompts_per_step=2, num_generations=2, eval_generations=1, eval_size=2,
        lora_r=2, quiet=True, **options,
    )  # fmt: skip


def test_the_cards_of_a_model_and_of_its_adapter(tmp_path):
    base = tmp_path / "base: one"
    model, tokenizer = TinyModel(tuple("abcdefghijklmnopqrstuvwxyz>"), layers=1, hidden=16, heads=2)(0)
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    reward = (lambda completions, **_: [float(len(text)) for text in completions],)
    short(model=str(base), reward=reward, output_dir=tmp_path / "run", save_every=1)
    saved = tmp_path / "run" / "model"
    front, text = read(saved / "README.md")
    assert (front["base_model"], front["library_name"]) == (str(base), "transformers")
    assert "started from Python" in text and "tokenrl train" not in text
    front, text = read(saved / "adapter" / "README.md")
    assert (front["base_model"], front["library_name"]) == (str(base), "peft")
    assert "PeftModel.from_pretrained" in text and "More Information Needed" not in text
    assert "no command can name" in (tmp_path / "run" / "report.html").read_text()
    assert not list((tmp_path / "run" / "checkpoints").rglob("README.md"))  # peft's template is not kept


def test_a_model_from_memory_has_no_base_model(tmp_path):
    short(model=TinyModel(tuple("abcdefghijklmnopqrstuvwxyz>"), layers=1)(0), output_dir=tmp_path / "run")
    for path in ("README.md", "adapter/README.md"):
        front, _ = read(tmp_path / "run" / "model" / path)
        assert "base_model" not in front


def test_a_name_is_written_as_yaml_reads_it(tmp_path):
    for name in ('owner/name: "x" #1', "owner/näme"):
        card = Card("t", {"a|b\n": "c|d"}, ["made"], base_model(name))
        for number, text in enumerate((card.policy(), card.policy(adapter=True), card.reward_model())):
            path = tmp_path / f"{number}.md"
            path.write_text(text)
            assert read(path)[0]["base_model"] == name and "c\\|d" in text
    assert base_model(tmp_path) == str(tmp_path) and base_model(None) is None


def test_a_value_is_shown_as_it_is_by_markdown():
    strange = r"""cost $5 or $6 & <b>*x*</b> `y` [z](u) ~~w~~ __v__ \n a|b &lt; in_side"""
    facts = {"asked": f"{strange}\r\nsecond", "rewards/__main__:<lambda>|x": 0.5, "before -> after": None}
    lines = Card(f"{strange}\nsecond", facts, ["made"]).policy().splitlines()
    title = next(line for line in lines if line.startswith("# "))
    rows = [line for line in lines if line.startswith("| ")][1:]
    assert len(rows) == 3 and rows[2] == "| before -> after | None |"
    shown = [re.split(r"(?<!\\)\|", row)[1:-1] for row in rows]
    assert [len(cells) for cells in shown] == [2, 2, 2]
    for text, written in ((f"{strange} second", title[2:]), (f"{strange} second", shown[0][1].strip()),
                          ("rewards/__main__:<lambda>|x", shown[1][0].strip())):  # fmt: skip
        assert re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", written) == text  # an escaped mark is shown as itself
        assert not re.search(r"(?<!\\)[$&<*`~\[\]]", written) and "__" not in written
    assert "in_side" in title
