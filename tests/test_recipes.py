"""Every recipe runs, shortened, as a user would run it: as a program, in a folder of its own."""

from __future__ import annotations

import ast
import json
import math
import os
import re
import runpy
import string
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

RECIPES = Path(__file__).parent.parent / "recipes"
ALL = sorted(path.stem for path in RECIPES.glob("*.py"))
ELSEWHERE = {  # tests/test_rlhf_recipes.py, tests/test_pretrained_recipe.py, tests/lab/compare/
    *("rlhf_pipeline", "overoptimisation"),
    "pretrained_toy_task",
    "compare_baselines",
}
TABLE = "estimators_table"
ALWAYS = ("reinforce_one_page", "train_lm")
"""Recipes that run for the quick tests too."""
RUNGS = {
    "ladder vanilla": ("none", "exact"),
    "ladder running_mean": ("running_mean", "exact"),
    "ladder rloo": ("rloo", "exact"),
    "ladder grpo": ("group_mean", "biased"),
}
SHORT = {  # flags by recipe, and by its first argument where it has several
    **dict.fromkeys(RUNGS, "--max-steps 2 --shift 1"),
    "reinforce_one_page": "--steps 2 --warm-steps 3 --prompts-per-step 2 --estimator grpo",
    "train_lm": "--max-steps 2 --prompts-per-step 2 --estimator reinforce_running_mean --lora-r 2",
    "filter_by_difficulty": "--prompts 32 --samples 2 --low 0.4 --max-steps 2",
    "pretrained_gsm8k_lora": "--max-steps 2 --prompts-per-step 2 --num-generations 3 --lora-r 2 "
    "--max-completion-length 12 --model model --task sums.jsonl --beta 0.1",
}
NAMES = list(SHORT)
FIGURES = {
    "figures grpo-difficulty": "",
    "figures length-bias": "--sizes 2 4",
    "figures kl": "",
    "figures variance": "--group-sizes 2 3",
    "figures map": "--estimators rloo dr_grpo loo_std grpo gspo",
}
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant: "


def run(name: str, flags: str, folder: Path, cache: Path) -> subprocess.CompletedProcess[str]:
    settings = {"TOKENRL_CACHE": str(cache), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    program, *rung = name.split()
    return subprocess.run(
        [sys.executable, str(RECIPES / f"{program}.py"), *rung, *flags.split()],
        cwd=folder,
        env=os.environ | settings,
        capture_output=True,
        text=True,
        timeout=280,
    )


def make_chat_model_and_data(folder: Path) -> None:
    from toy_tasks.models import character_tokenizer, tiny_llama

    tokenizer = character_tokenizer(string.printable)
    tokenizer.chat_template = TEMPLATE
    tiny_llama(tokenizer, layers=1, hidden=16, heads=2, context=256).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [{"question": f"What is {i} + 1?", "answer": f"Count on.\n#### {i + 1}"} for i in range(12)]
    (folder / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A cache with the base that the rungs share, after a tenth of its warm start."""
    import toy_tasks
    from tokenrl.language.training import warm_start

    cache, fit = tmp_path_factory.mktemp("cache"), warm_start.fit
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOKENRL_CACHE", str(cache))
        patch.setattr(warm_start, "fit", lambda *args, **options: fit(*args, **(options | {"max_steps": 20})))
        warm_start.warm_started_base(toy_tasks.load("sort_digits"))
    return cache


def quickly(name: str):
    """A recipe as a parameter; a few of them are enough for the quick tests."""
    return name if name in ALWAYS else pytest.param(name, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, request):
    """Results by name; the recipes start at once, two at a time, since most of their time is importing."""
    root = tmp_path_factory.mktemp("recipes")
    wanted = " ".join(item.nodeid for item in request.session.items)
    chosen = [name for name in NAMES if f"[{name}]" in wanted or name in ALWAYS]
    folders = {name: root / name for name in chosen}
    for folder in folders.values():
        folder.mkdir()
    if "pretrained_gsm8k_lora" in folders:
        make_chat_model_and_data(folders["pretrained_gsm8k_lora"])
    cache = request.getfixturevalue("base") if RUNGS.keys() & folders else root / "cache"
    with ThreadPoolExecutor(max_workers=2) as pool:
        runs = {name: pool.submit(run, name, SHORT[name], folders[name], cache) for name in folders}
        yield {name: (future, folders[name]) for name, future in runs.items()}
        for future in runs.values():
            future.cancel()


def result(finished, name):
    """What a recipe printed, and the run directory that it left under its default name."""
    future, folder = finished[name]
    done = future.result()
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    runs = list((folder / "runs").glob("*"))
    return done.stdout, runs[0] if runs else None


def numbers(pattern: str, text: str) -> list[float]:
    """The numbers behind a label, all finite."""
    found = [float(number) for number in re.findall(rf"{pattern} (-?[\d.]+)", text)]
    assert all(map(math.isfinite, found))
    return found


def test_every_recipe_is_in_the_list_with_its_command():
    text = (RECIPES / "README.md").read_text()
    assert sorted(set(re.findall(r"\]\((\w+)\.py\)", text))) == ALL
    assert sorted(set(re.findall(r"python recipes/(\w+)\.py", text))) == ALL
    notebooks = {path.name for path in RECIPES.glob("*.ipynb")}  # tests/test_notebook.py
    assert set(re.findall(r"\]\((\w+\.ipynb)\)", text)) == notebooks
    control = {name for name in ALL if name.startswith("control_")}  # tests/control/test_control_recipes.py
    assert {name.split()[0] for name in (*SHORT, *FIGURES, *control, *ELSEWHERE, TABLE)} == set(ALL)


def test_one_page_is_one_page_of_torch_and_core():
    text = (RECIPES / "reinforce_one_page.py").read_text()
    assert len(text.splitlines()) < 150
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import | ast.ImportFrom)]
    modules = {getattr(node, "module", None) or node.names[0].name for node in nodes}
    assert modules <= {"dataclasses", "torch", "tyro", "transformers", "toy_tasks", "tokenrl", "tokenrl.core"}
    named = [node.names for node in nodes if getattr(node, "module", None) == "tokenrl"]
    assert {name.name for names in named for name in names} <= {"Estimator"}  # which is of core
    assert not any(alias.name == "tokenrl" for node in nodes for alias in node.names)


RUNS = [quickly(name) for name in NAMES if name != "reinforce_one_page"]


@pytest.mark.parametrize("name", RUNS)
def test_recipe_leaves_a_complete_run(finished, name):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _, folder = result(finished, name)
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["exit_reason"], summary["steps"]) == ("finished", 2)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert all(math.isfinite(line["reward"]) for line in lines[1:])
    assert (folder / "report.html").stat().st_size > 1000
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert model.config.vocab_size == len(tokenizer)


@pytest.mark.parametrize("name", [quickly(name) for name in RUNGS])
def test_rung_is_what_it_says(finished, name):
    out, folder = result(finished, name)
    baseline, bias = RUNGS[name]
    assert json.loads((folder / "config.json").read_text())["estimator"]["baseline"] == baseline
    assert f"bias of the gradient: {bias} (" in out
    reward = json.loads((folder / "summary.json").read_text())["eval_after"]["reward_greedy"]
    assert 1 <= reward <= 2  # shifted by 1
    assert numbers("greedy:", out) == [pytest.approx(reward - 1, abs=1e-3)]


def test_one_page_runs(finished):
    out, _ = result(finished, "reinforce_one_page")
    rewards = numbers("reward", out)
    assert len(rewards) == 5  # greedy and sampled, before and after, and the last step
    assert all(0 <= reward <= 1 for reward in rewards)
    assert "biased" in out


def test_train_lm_prints_reward_before_and_after(finished):
    out, folder = result(finished, "train_lm")
    summary = json.loads((folder / "summary.json").read_text())
    assert numbers("reward_greedy:", out) == [
        pytest.approx(summary["eval_before"]["reward_greedy"], abs=1e-3)
    ]
    metrics = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"rewards/alternates/mean", "rewards/six_long/mean"} <= set(metrics)


@pytest.mark.slow
def test_gsm8k_trains_an_adapter_on_chat_prompts_towards_its_reference(finished):
    out, folder = result(finished, "pretrained_gsm8k_lora")
    assert (folder / "model" / "adapter" / "adapter_model.safetensors").is_file()
    metrics = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"rewards/right/mean", "rewards/well_formed/mean", "kl"} <= set(metrics)
    assert len(numbers("most\\):", out)) == 1


def said(*texts: str) -> list[list[dict[str, str]]]:
    return [[{"role": "assistant", "content": text}] for text in texts]


def test_gsm8k_rewards():
    recipe = runpy.run_path(str(RECIPES / "pretrained_gsm8k_lora.py"))
    row = recipe["as_chat"]({"question": "How many?", "answer": "2 * 600 = <<2*600=1200>>1200\n#### 1,200"})
    assert row["answer"] == "1,200"
    assert [message["role"] for message in row["prompt"]] == ["system", "user"]
    completions = said(
        *("#### 1200", "so it is\n#### $1,200.00", "I think 1200.", "#### 1200 apples, not 7", "1200 or 7"),
        *("#### -1200", "#### 120", "no number", "1200\n#### none", "####", ""),
    )
    scores = recipe["right"](completions=completions, answer=["1,200"] * len(completions))
    assert scores == [1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0]
    formed = recipe["well_formed"](
        completions=said("so\n#### 12", "#### $1,200 ", "12", "#### 12 apples", "####")
    )
    assert formed == [0.1, 0.1, 0, 0, 0]


def test_train_lm_rewards():
    recipe = runpy.run_path(str(RECIPES / "train_lm.py"))
    texts = ["010101", "0101", "000000", "01>10", "", "0101010101"]
    assert recipe["alternates"](completions=texts) == [1, 3 / 5, 0, 2 / 5, 0, 1]
    assert recipe["six_long"](completion_ids=[[0] * 7, [0] * 14, []]) == [0, -1, -1]
    train, held_out = recipe["zigzag"]().train_prompts, recipe["zigzag"]().eval_prompts
    assert {row["prompt"] for row in train}.isdisjoint(row["prompt"] for row in held_out)


@pytest.mark.slow
def test_one_page_learns(tmp_path):
    done = run("reinforce_one_page", "", tmp_path, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    before, after = numbers("greedy reward", done.stdout)
    assert before < 0.3
    assert after > 0.8
    sampled_before, sampled_after = numbers("sampled reward", done.stdout)
    assert sampled_after > sampled_before + 0.3


def drawn(name: str, tmp_path, monkeypatch, capsys) -> str:
    """What a figure's program prints, run in this process, where torch is imported already."""
    path, (program, figure) = tmp_path / "figure.png", name.split()
    monkeypatch.setattr(sys, "argv", [program, figure, *FIGURES[name].split(), "--output", str(path)])
    runpy.run_path(str(RECIPES / f"{program}.py"), run_name="__main__")
    assert path.read_bytes().startswith(b"\x89PNG")
    return capsys.readouterr().out


def test_figure_of_grpo_agrees_with_enumeration(tmp_path, monkeypatch, capsys):
    out = drawn("figures grpo-difficulty", tmp_path, monkeypatch, capsys)
    rows = [line.split() for line in out.splitlines()[1:6]]
    assert [row[0] for row in rows] == ["2", "4", "8", "16", "64"]
    assert all(float(row[5]) < 1e-12 for row in rows[:3])
    ratios = [float(row[4]) for row in rows]  # rare successes gain on even chances
    assert ratios == sorted(ratios)
    assert ratios[0] == 1.0


def test_figure_of_length_bias(tmp_path, monkeypatch, capsys):
    out = drawn("figures length-bias", tmp_path, monkeypatch, capsys)
    rows = {(r[0], int(r[1])): [float(x) for x in r[2:]] for r in map(str.split, out.splitlines()[1:7])}
    assert all(row[3] < 1e-12 for row in rows.values())  # by exchange of rows as by enumeration
    assert all(rows["sequence_sum", n][2] < 1e-12 for n in (2, 4))
    assert rows["token_mean", 4][2] < 0.7 * rows["token_mean", 2][2]
    assert rows["sequence_mean", 4][2] == rows["sequence_mean", 2][2] > 0.1


def test_figure_of_kl_measures_what_the_lab_does(tmp_path, monkeypatch, capsys):
    import torch

    from tokenrl import Estimator
    from tokenrl.core.choices import EXACT, KL_EFFECTS
    from tokenrl.lab import exact_moments, tabular_problem

    drawn("figures kl", tmp_path, monkeypatch, capsys)
    recipe = runpy.run_path(str(RECIPES / "figures.py"))
    problem = tabular_problem(3)
    problem = replace(problem, rewards=torch.zeros_like(problem.rewards))
    real = recipe["EVERY"].mask.bool()
    tables = torch.zeros(2, 7, 3, dtype=torch.double)
    for table, logprobs in zip(tables, (problem.logprobs[0], problem.ref_logprobs[0]), strict=True):
        table[recipe["EVERY"].prefix[real], recipe["EVERY"].ids[real]] = logprobs[real]
    _, found = recipe["measure_kl"](*tables)
    assert {(place, name) for name, place in found} == set(KL_EFFECTS)
    for (name, place), (_, error) in found.items():
        estimator = Estimator(baseline="none", beta=1.0, kl_estimator=name, kl_placement=place)
        bias = exact_moments(estimator, problem, group_size=1).relative_bias
        assert error == pytest.approx(bias, abs=1e-12)
        assert (error < 1e-12) == (KL_EFFECTS[place, name].status == EXACT)


def test_figure_of_variance(tmp_path, monkeypatch, capsys):
    out = drawn("figures variance", tmp_path, monkeypatch, capsys)
    zero, mean, best, one, two, three = numbers("variance", out)
    assert best < mean < min(zero, one)
    assert mean < three < two


def test_map_of_presets(tmp_path, monkeypatch, capsys):
    out = drawn("figures map", tmp_path, monkeypatch, capsys)
    angles = {line.split()[0]: float(line.split()[2]) for line in out.splitlines()[:-1]}
    assert angles["rloo"] == angles["dr_grpo"] == 0
    assert 0 < angles["loo_std"] < angles["grpo"]


def test_the_table_of_estimators_has_the_rows_of_the_page(tmp_path, monkeypatch, capsys):
    from tokenrl.core import PRESETS

    path = tmp_path / "table.md"
    monkeypatch.setattr(sys, "argv", [TABLE, "--output", str(path), "--estimators", "rloo", "grpo"])
    runpy.run_path(str(RECIPES / f"{TABLE}.py"), run_name="__main__")
    page = (RECIPES / "estimators.md").read_text().splitlines()
    others = [line for line in page if line.startswith("| `") and not re.match(r"\| `(rloo|grpo)` ", line)]
    assert path.read_text().splitlines() == [line for line in page if line not in others]
    assert [line.split("`")[1] for line in page if line.startswith("* **`")] == list(PRESETS)  # the notes
