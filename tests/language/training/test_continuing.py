"""A run continues only with its own data, models and settings; that it does so bit for bit is in tests/promises."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import pytest
from folders import read_json
from refusals import refused
from tiny_models import PROMPTS, make_policy, make_task

import tokenrl
from tests.resume.killing import left
from tokenrl.core import Estimator
from tokenrl.names import import_attribute


def test_a_run_of_something_else_is_refused_and_more_steps_continue_a_finished_one(tmp_path):
    run = tmp_path / "run"
    prompts = [f"{prompt} {word}" for prompt in PROMPTS for word in ("one", "two")]

    def train(**changes):
        settings = {"model": make_policy(), "task": make_task(prompts), "output_dir": run}
        settings |= {"max_steps": 1, "prompts_per_step": 2, "num_generations": 2, "eval_every": 1}
        settings |= {"max_completion_length": 4, "learning_rate": 0.01, "threads": 1, "cpu": True}
        settings |= {"lr_scheduler_type": "constant", "quiet": True}  # others fall to 0 at the end
        return tokenrl.train(**settings | changes)

    first = train()
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for changes, words in (
        ({"seed": 1}, "otherwise: seed: 0, now 1"),
        ({"learning_rate": 0.02}, r"learning_rate: 0\.01, now 0\.02"),
        ({"estimator": "grpo"}, "estimator.baseline: 'rloo', now 'group_mean'"),
        ({"task": make_task([*prompts[:7], "sat on the mat"])}, "otherwise: .*data"),
        ({"model": make_policy(kind="pad_is_eos")}, "otherwise: .*tokenizer"),
        ({"model": make_policy(seed=1)}, "otherwise: .*base model"),
    ):
        with refused(words):
            train(resume="auto", max_steps=2, **changes)
    assert before == {path: path.read_bytes() for path in before}
    again = train(resume="auto")
    assert (again.exit_code, again.exit_reason, again.steps) == (0, "finished", 1)
    assert (again.eval_after, again.eval_before) == (first.eval_after, first.eval_before)
    train(resume="auto", max_steps=2, save_every=1)
    train(output_dir=tmp_path / "whole", max_steps=2)
    for name in ("metrics.jsonl", "model/model.safetensors"):
        assert (run / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


MINE = """
from functools import partial
import toy_tasks
from pack.helper import ONE
from tokenrl.language import TransformersGenerator
class Env:
    def reset(self, seed=None):
        import late
        return "the", {}
    def step(self, text): return "", float(len(text)), True, False, {}
def score(completions, scale=1.0, **_):
    import late
    return [scale * len(text) for text in completions]
def hint(prompt, completions):
    import late
    return completions[0] + prompt
class Keeps:
    def __call__(self, completions, **_): return [2.0 * len(text) for text in completions]
class Mean:
    def __call__(self, totals, **_): return totals.mean().expand_as(totals)
def engine(policy, rows):
    import late
    return TransformersGenerator(policy, rows)
short = lambda completions, **_: [1.0 * len(text) for text in completions]
kept = Keeps()
mean_of = Mean()
scaled = partial(score, scale=3.0)
"""
HELPERS = {
    "pack/__init__.py": "",
    "pack/helper.py": "from .inner import ONE",
    "pack/inner.py": "ONE = 1.0",
    "late.py": "import importlib\nimportlib.import_module('later')",
    "later.py": "TWO = 2.0",
}
HELD = [
    ("reward", "scaled", "scale *", "2 * scale *"),
    ("reward", "kept", "2.0 *", "4.0 *"),
    ("reward", "short", "1.0 *", "3.0 *"),
    ("environment", "Env", "float(len", "2 * float(len"),
    ("teacher_context", "hint", "[0] +", "[-1] +"),
    ("estimator.baseline", "mean_of", ".mean()", ".mean().mul(2)"),
]
"""A setting, what it holds, and a change of that."""


@pytest.fixture
def of_code(workplace, monkeypatch):
    """`train(**changes)`: a run of one step."""
    monkeypatch.syspath_prepend(workplace)

    def train(**changes):
        settings = {"model": make_policy(), "task": make_task(), "teacher": "self", "cpu": True}
        settings |= {"output_dir": "run", "max_steps": 1, "prompts_per_step": 2, "quiet": True}
        settings |= {"num_generations": 2, "max_completion_length": 4, "learning_rate": 0.01}
        settings |= {"lr_scheduler_type": "constant", "threads": 1, "eval_generations": 0}
        settings |= {"eval_every": 0, "stop_after_zero_spread": 0, "estimator": "rloo_opd"}
        return tokenrl.train(**settings | changes)

    Path("pack").mkdir()
    for name, text in (HELPERS | {"mine.py": MINE}).items():
        Path(name).write_text(text)
    return train


def test_a_run_whose_code_has_changed_is_not_continued(of_code):
    """Also a module that is imported in a call, and not yet where the run is to be continued."""
    named = {"reward": ["mine.py:score", "mine:short"], "generator": "mine.py:engine"}
    named["teacher_context"] = "mine.py:hint"
    of_code(**named)
    hashes = read_json("run/config.json")["hashes"]
    for file in ("mine.py", "pack/inner.py", "later.py"):
        text = Path(file).read_text()
        Path(file).write_text(f"{text}\nTHREE = 3")
        for module in ("late", "later"):  # as in a new process
            sys.modules.pop(module, None)
        module = file.removesuffix(".py").replace("/", ".")
        with refused(rf"started otherwise: module {module}: '.*, code and"):
            of_code(**named, resume="auto", max_steps=2)
        Path(file).write_text(text)
    assert {"data", "tokenizer", "base model", "module mine", "module pack.inner"} <= {*hashes}
    assert not {"module pytest", "module json", "module tokenrl", "module toy_tasks"} & {*hashes}
    named["generator"] = "transformers"  # another one is allowed, with a warning
    assert of_code(**named, resume="auto", max_steps=2).steps == 2


def test_nor_is_one_whose_functions_have_changed(of_code):
    def held(text):
        sys.modules.pop("mine", None)
        Path("mine.py").write_text(text)
        return {name: import_attribute(f"mine.py:{name}", setting) for setting, name, *_ in HELD}

    def settings(scaled, kept, short, Env, hint, mean_of):
        estimator = Estimator.preset("rloo_opd", baseline=mean_of)
        rewards = {"reward": [scaled, kept, short], "environment": Env}
        return {"estimator": estimator, "teacher_context": hint, **rewards}

    of_code(**settings(**held(MINE)))
    again = held(MINE)  # made anew, so that each has another address
    assert of_code(**settings(**again), resume="auto", max_steps=2).steps == 2
    assert " at 0x" not in Path("run/config.json").read_text()
    for place, name, before, after in HELD:
        changed = held(MINE.replace(before, after))[name]
        with refused(f"otherwise: .*{place}.*: .*Continue it"):
            of_code(**settings(**again | {name: changed}), resume="auto", max_steps=3)
    held(MINE)
    with refused(r"otherwise: reward mine.score scale: "):
        other = again | {"scaled": partial(again["scaled"], scale=4.0)}
        of_code(**settings(**other), resume="auto", max_steps=3)


class Weighted:
    def __init__(self, scale):
        self.scale, self.seen = scale, []

    def __call__(self, completions, **_):
        self.seen += completions
        return [self.scale * len(text) for text in completions]


def test_nor_is_one_whose_objects_hold_other_values_but_those_that_change_are_state(of_code):
    reward = Weighted(1.0)
    of_code(reward=[reward])
    with refused(r"otherwise: reward \S*Weighted scale: "):
        of_code(reward=[Weighted(2.0)], resume="auto", max_steps=2)
    assert of_code(reward=[reward], resume="auto", max_steps=2).steps == 2
    assert of_code(reward=[Weighted(1.0)], resume="auto", max_steps=3).steps == 3


def test_a_supervised_training_continues_bit_for_bit(tmp_path):
    rows = [{"prompt": prompt, "completion": " dog" * len(prompt)} for prompt in PROMPTS * 2]
    saved = {"max_steps": 3, "learning_rate": 0.01, "save_every": 2, "keep_checkpoints": 9}
    saved |= {"eval_every": 2, "warmup_steps": 2, "threads": 1, "quiet": True}

    def train(**settings):
        model, run = make_policy(), tmp_path / "run"
        tokenrl.sft(model=model, task=rows, batch_size=3, output_dir=run, **saved, **settings)
        return left(run)

    assert train() == train(resume=tmp_path / "run" / "checkpoints" / "step_000002")
    with refused("seed: 0, now 5"):
        train(resume="auto", seed=5)
