"""Every recipe runs, shortened, as a user would run it: as a program, in a folder of its own."""

from __future__ import annotations

import ast
import json
import math
import re
import runpy
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from pages import blocks, make_chat_model_and_data

from tokenrl.cli import main

RECIPES = Path(__file__).parent.parent / "recipes"
PARTS = {"own", "judging", "questions", "answer", "curves"}  # shared by programs of a folder
PROGRAMS = {
    path.stem: path
    for path in sorted(RECIPES.glob("*/*.py"))
    if path.parent.name != "benchmarks" and path.stem not in PARTS
}
# tests/test_distillation_forms.py, tests/test_rlhf_recipes.py, tests/test_pretrained_recipe.py,
# tests/test_trl_estimator.py, tests/lab/compare/
# tests/language/rollout/test_openenv_client.py and tests/test_toy_environments.py
ELSEWHERE = {"rlhf_pipeline", "overoptimisation", "pretrained_toy_task", "trl_estimator", "rebuild"}
ELSEWHERE |= {"distillation_forms", "pass_at_k", "openenv_client", "turns", "build", "reference"}
ELSEWHERE |= {"distillation", "overall_scores", "compare_existing_runs"}
ELSEWHERE |= {"zero", "code_reward"}
TABLE = "estimators_table"
RUNGS = {
    "ladder vanilla": ("none", "exact"),
    "ladder running_mean": ("running_mean", "exact"),
    "ladder rloo": ("rloo", "exact"),
    "ladder grpo": ("group_mean", "biased"),
}
SHORT = {  # flags by recipe, and by its first argument where it has several
    **dict.fromkeys(RUNGS, "--max-steps 2 --shift 1"),
    "train_lm": "--max-steps 2 --prompts-per-step 2 --estimator reinforce_running_mean --lora-r 2",
    "filter_by_difficulty": "--prompts 32 --samples 2 --low 0.4 --max-steps 2",
    "pretrained_gsm8k_lora": "--max-steps 2 --prompts-per-step 2 --num-generations 3 --lora-r 2 "
    "--max-completion-length 12 --model model --task sums.jsonl --beta 0.1",
}
FIGURES = {
    "figures grpo-difficulty": "",
    "figures kl": "",
    "figures objectives": "",
    "figures map": "--estimators rloo dr_grpo loo_std grpo gspo",
    "samplers": "--noises 0 0.5 --problems 5",
}
OWN = "own_baselines"


def run(name: str, flags: str, folder: Path, monkeypatch, capsys) -> str:
    """What a recipe prints, run as a program in this process, where torch is imported already."""
    program, *first = name.split()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [program, *first, *flags.split()])
    runpy.run_path(str(PROGRAMS[program]), run_name="__main__")
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Makes the base that the rungs share, after a tenth of its warm start, and returns its cache."""
    import toy_tasks
    from tokenrl.language.supervised import base

    @cache
    def base_cache() -> Path:
        folder, fit = tmp_path_factory.mktemp("cache"), base.fit
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TOKENRL_CACHE", str(folder))
            patch.setattr(
                base,
                "fit",
                lambda *args, **options: fit(*args, **(options | {"max_steps": 20})),
            )
            base.warm_started_base(toy_tasks.load("sort_digits"))
        return folder

    return base_cache


def numbers(pattern: str, text: str) -> list[float]:
    """The numbers behind a label, all finite."""
    values = [float(number) for number in re.findall(rf"{pattern} (-?[\d.]+)", text)]
    assert all(map(math.isfinite, values))
    return values


def test_every_recipe_says_from_what_uv_makes_its_environment():
    tomllib = pytest.importorskip("tomllib", reason="it came with Python 3.11")
    project = tomllib.loads((RECIPES.parent / "pyproject.toml").read_text())["project"]
    for path in RECIPES.rglob("*.py"):
        if path.stem in PARTS:
            continue
        (block,) = re.findall(r"(?m)^# /// script\n((?:# .*\n)+)# ///$", path.read_text())
        header = tomllib.loads(re.sub("(?m)^# ", "", block))
        name, _, extra = header["dependencies"][0].rstrip("]").partition("[")
        assert name == project["name"] and extra in {"", *project["optional-dependencies"]}
        assert (
            path.parent / header["tool"]["uv"]["sources"][name]["path"]
        ).resolve() == RECIPES.parent


def test_baselines_of_ones_own_are_what_they_declare(tmp_path, monkeypatch, capsys):
    lines = run(OWN, "", tmp_path, monkeypatch, capsys).splitlines()
    found = [re.match(r"declared (\w+), found \w+: (\w+),", line).groups() for line in lines]
    assert found == [("exact", "exact"), ("biased", "biased")]


def test_every_recipe_is_in_the_list_with_its_command():
    text = (RECIPES / "README.md").read_text()
    paths = {str(path.relative_to(RECIPES)) for path in PROGRAMS.values()}
    assert {
        link for link in re.findall(r"\]\((\w+/\w+\.py)\)", text) if "benchmarks" not in link
    } == paths
    named = set(re.findall(r"python recipes/(\w+/\w+\.py)", text))
    assert {name for name in named if "benchmarks" not in name} == paths
    notebooks = {path.name for path in RECIPES.glob("*.ipynb")}  # tests/test_pages.py
    assert set(re.findall(r"\]\((\w+\.ipynb)\)", text)) == notebooks
    # tests/control/test_control_recipes.py
    control = {name for name in PROGRAMS if PROGRAMS[name].parent.name == "control"}
    alone = ("reinforce_one_page", TABLE, "defaults", "sampler_mismatch", "top_tokens", OWN)
    here = {name.split()[0] for name in (*SHORT, *FIGURES, *alone)}
    assert here | control | ELSEWHERE == set(PROGRAMS)


def test_one_page_is_one_page_of_torch_and_core():
    text = (PROGRAMS["reinforce_one_page"]).read_text()
    assert len(re.sub("# /// script.*# ///\n\n", "", text, flags=re.DOTALL).splitlines()) < 160
    nodes = [
        node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    modules = {getattr(node, "module", None) or node.names[0].name for node in nodes}
    assert modules <= {
        "dataclasses",
        "torch",
        "tyro",
        "transformers",
        "toy_tasks",
        "tokenrl",
        "tokenrl.core",
    }
    named = [node.names for node in nodes if getattr(node, "module", None) == "tokenrl"]
    assert {name.name for names in named for name in names} <= {"Estimator"}  # which is of core
    assert not any(alias.name == "tokenrl" for node in nodes for alias in node.names)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHORT)
def test_recipe_leaves_a_complete_run_of_what_it_says(
    name, base, tmp_path, monkeypatch, capsys, handlers
):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setenv("TOKENRL_CACHE", str(base() if name in RUNGS else tmp_path / "cache"))
    if name == "pretrained_gsm8k_lora":
        make_chat_model_and_data(tmp_path)
    out = run(name, SHORT[name], tmp_path, monkeypatch, capsys)
    (folder,) = (tmp_path / "runs").glob("*")
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["exit_reason"], summary["steps"]) == ("finished", 2)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert all(math.isfinite(line["reward"]) for line in lines[1:])
    assert (folder / "report.html").stat().st_size > 1000
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert model.config.vocab_size == len(tokenizer)
    if name in RUNGS:
        baseline, bias = RUNGS[name]
        assert json.loads((folder / "config.json").read_text())["estimator"]["baseline"] == baseline
        assert f"bias of the gradient: {bias} (" in out
        reward = summary["eval_after"]["reward_greedy"]
        assert 1 <= reward <= 2  # shifted by 1
        assert numbers("greedy:", out) == [pytest.approx(reward - 1, abs=1e-3)]
    if name == "train_lm":
        before = summary["eval_before"]["reward_greedy"]
        assert numbers("reward_greedy:", out) == [pytest.approx(before, abs=1e-3)]
        assert {"rewards/alternates/mean", "rewards/six_long/mean"} <= set(lines[-1])
    if name == "pretrained_gsm8k_lora":
        assert (folder / "model" / "adapter" / "adapter_model.safetensors").is_file()
        assert {"rewards/right/mean", "rewards/well_formed/mean", "kl"} <= set(lines[-1])
        assert len(numbers("most\\):", out)) == 1


@pytest.mark.slow
def test_one_page_learns(tmp_path, monkeypatch, capsys):
    out = run("reinforce_one_page", "", tmp_path, monkeypatch, capsys)
    before, after = numbers("greedy reward", out)
    assert before < 0.3 and after > 0.8
    sampled_before, sampled_after = numbers("sampled reward", out)
    assert sampled_after > sampled_before + 0.3


def replies(*texts: str) -> list[list[dict[str, str]]]:
    return [[{"role": "assistant", "content": text}] for text in texts]


def test_gsm8k_rewards():
    recipe = runpy.run_path(str(PROGRAMS["pretrained_gsm8k_lora"]))
    row = recipe["as_chat"](
        {"question": "How many?", "answer": "2 * 600 = <<2*600=1200>>1200\n#### 1,200"}
    )
    assert row["answer"] == "1,200"
    assert [message["role"] for message in row["prompt"]] == ["system", "user"]
    right = ["#### 1200", "so it is\n#### $1,200.00", "I think 1200.", "#### 1200 apples, not 7"]
    wrong = ["1200 or 7", "#### -1200", "#### 120", "no number", "1200\n#### none", "####", ""]
    scores = recipe["right"](completions=replies(*right, *wrong), answer=["1,200"] * 11)
    assert scores == [1] * 4 + [0] * 7
    formed = replies("so\n#### 12", "#### $1,200 ", "12", "#### 12 apples", "####")
    assert recipe["well_formed"](completions=formed) == [0.1, 0.1, 0, 0, 0]


def test_train_lm_rewards():
    recipe = runpy.run_path(str(PROGRAMS["train_lm"]))
    texts = ["010101", "0101", "000000", "01>10", "", "0101010101"]
    assert recipe["alternates"](completions=texts) == [1, 3 / 5, 0, 2 / 5, 0, 1]
    assert recipe["six_long"](completion_ids=[[0] * 7, [0] * 14, []]) == [0, -1, -1]
    train, held_out = recipe["zigzag"]().train_prompts, recipe["zigzag"]().eval_prompts
    assert {row["prompt"] for row in train}.isdisjoint(row["prompt"] for row in held_out)


def drawn(name: str, tmp_path, monkeypatch, capsys) -> str:
    """What a figure's program prints."""
    path = tmp_path / "figure.png"
    out = run(name, f"{FIGURES[name]} --output {path}", tmp_path, monkeypatch, capsys)
    assert path.read_bytes().startswith(b"\x89PNG")
    return out


def test_figure_of_grpo_agrees_with_enumeration(tmp_path, monkeypatch, capsys):
    out = drawn("figures grpo-difficulty", tmp_path, monkeypatch, capsys)
    rows = [line.split() for line in out.splitlines()[1:6]]
    assert [row[0] for row in rows] == ["2", "4", "8", "16", "64"]
    assert all(float(row[5]) < 1e-12 for row in rows[:3])
    ratios = [float(row[4]) for row in rows]  # rare successes gain on even chances
    assert ratios == sorted(ratios)
    assert ratios[0] == 1.0


def test_figure_of_samplers_that_differ(tmp_path, monkeypatch, capsys):
    out = drawn("samplers", tmp_path, monkeypatch, capsys)
    biases: dict[tuple[str, str], float] = {}
    for line in out.splitlines()[1:11]:
        *name, noise, bias, _ = line.split()
        biases[" ".join(name), noise] = float(bias)
    assert len(biases) == 10 and not any(
        biases[name, noise] for name, noise in biases if noise == "0"
    )
    assert biases["no correction", "0.5"] > biases["token", "0.5"] > biases["sequence", "0.5"] == 0


def test_top_tokens_that_centre_scores(tmp_path, monkeypatch, capsys):
    short = "--samplers noise=0.3 --tops 1 2 3 --vocabulary 4 --problems 2"
    out = run("top_tokens", short, tmp_path, monkeypatch, capsys)
    off = [float(line.split()[2]) for line in out.splitlines()[1:]]
    assert off == sorted(off, reverse=True) and off[0] > 5 * off[2] and off[3] == 0
    shares = [[float(x) for x in line.split()[-2:]] for line in out.splitlines()[1:]]
    assert shares[0] == [1, 1] and shares[3] == [0, 0]
    assert all(middle <= worst < 1 for middle, worst in shares[1:3])


def test_figure_of_kl_measures_what_the_lab_does(tmp_path, monkeypatch, capsys):
    import torch

    from tokenrl import Estimator
    from tokenrl.core.choices import KL_EFFECTS
    from tokenrl.core.effects import EXACT
    from tokenrl.lab import exact_moments, tabular_problem

    drawn("figures kl", tmp_path, monkeypatch, capsys)
    recipe, problem = runpy.run_path(str(PROGRAMS["figures"])), tabular_problem(3)
    problem = replace(problem, rewards=torch.zeros_like(problem.rewards))
    every, tables = recipe["EVERY"], torch.zeros(2, 7, 3, dtype=torch.double)
    real = every.mask.bool()
    for table, logprobs in zip(tables, (problem.logprobs[0], problem.ref_logprobs[0]), strict=True):
        table[every.prefix[real], every.ids[real]] = logprobs[real]
    errors = {
        (placement, name): error
        for (name, placement), (_, error) in recipe["measure_kl"](*tables)[1].items()
    }
    sampled = {pair for pair in KL_EFFECTS if not pair[1].startswith("closed_form")}
    assert errors.keys() == sampled
    for (placement, name), error in errors.items():
        estimator = Estimator(baseline="none", beta=1.0, kl_estimator=name, kl_placement=placement)
        assert error == pytest.approx(
            exact_moments(estimator, problem, group_size=1).relative_bias, abs=1e-12
        )
        assert (error < 1e-12) == (KL_EFFECTS[placement, name].status == EXACT)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["hidden", "difficulty"])
def test_two_objectives_are_compared_over_paired_seeds(
    task, tmp_path, monkeypatch, capsys, handlers
):
    out = run("pass_at_k", f"--task {task} --seeds 3 --max-steps 1", tmp_path, monkeypatch, capsys)
    for line in out.splitlines()[-2:]:
        first, second, difference = map(
            float, re.findall(r" [+-]?([\d.]+)", line.split("±")[0])[-3:]
        )
        assert abs(abs(second - first) - difference) < 0.0021 and 0 <= first <= 1


@pytest.mark.slow
def test_students_learn_from_a_reward_from_a_teacher_or_from_both(
    short_warm_start, tmp_path, monkeypatch, capsys
):
    flags = "--arms rloo opd_full_path rloo_opd --seeds 2 --max-steps 10 --teacher-steps 2"
    out = run("distillation", f"{flags} --output-dir runs", tmp_path, monkeypatch, capsys)
    assert re.findall(r"^(\w+) +area 0\.\d+$", out, re.MULTILINE) == [*flags.split()[1:4]]
    student = json.loads((tmp_path / "runs/sort_digits_opd_full_path_1/config.json").read_text())
    assert (student["teacher"], student["reward"]) == ("runs/sort_digits_teacher", ["none"])
    assert (tmp_path / "runs" / "sort_digits.png").exists()
    # read, not trained again
    assert run("distillation", f"{flags} --output-dir runs", tmp_path, monkeypatch, capsys) == out


@pytest.mark.slow
def test_samplers_that_differ_are_trained_and_measured(
    short_warm_start, tmp_path, monkeypatch, capsys, handlers
):
    flags = "--task vowels --mismatches old=2 --corrections sequence --seeds 2 --max-steps 2"
    out = run("sampler_mismatch", flags, tmp_path, monkeypatch, capsys)
    gaps = {line[:20].strip(): float(line.split()[-2]) for line in out.splitlines()[1:3]}
    assert gaps["same none"] < 1e-5 and 1e-3 < gaps["old=2 sequence"] < 1
    assert out.count("descriptive") == 1 and len(list(tmp_path.glob("runs/*/*.png"))) == 1
    # read, not trained again
    assert run("sampler_mismatch", flags, tmp_path, monkeypatch, capsys) == out
    rounded = "--task vowels --lengths 1 9 --mismatches"
    out = [
        run("sampler_mismatch", f"{rounded} bits={n}", tmp_path, monkeypatch, capsys)
        for n in (16, 4)
    ]
    fine, coarse = ([float(line.split()[2]) for line in text.splitlines()[-2:]] for text in out)
    assert all(0 < a < b < 1 for a, b in zip(fine, coarse, strict=True))


def test_figure_of_objectives(tmp_path, monkeypatch, capsys):
    out = drawn("figures objectives", tmp_path, monkeypatch, capsys)
    weights = {
        line[:28].strip(): [float(x) for x in line[28:].split()] for line in out.splitlines()[1:-1]
    }
    assert weights["mean reward (rloo)"] == [1.0] * 5
    assert (
        weights["pass@4 (max_at_k)"][1] == 2.916 and weights["log of success (maxrl)"][1] == 5.217
    )


def test_map_of_presets(tmp_path, monkeypatch, capsys):
    out = drawn("figures map", tmp_path, monkeypatch, capsys)
    angles = {line.split()[0]: float(line.split()[2]) for line in out.splitlines()[:-1]}
    assert angles["rloo"] == angles["dr_grpo"] == 0
    assert 0 < angles["loo_std"] < angles["grpo"]


def test_the_page_of_defaults_says_what_the_code_does(tmp_path, monkeypatch, capsys):
    from tokenrl.core import PRESETS

    page, path = RECIPES / "pages" / "explain" / "defaults.md", tmp_path / "defaults.md"
    flags = f"--output {path} --figure {tmp_path / 'defaults.png'} --estimators nanochat trl_rloo"
    run("defaults", flags, tmp_path, monkeypatch, capsys)
    lines = page.read_text().splitlines()
    presets = [line.split("`")[1] for line in lines if re.match(r"\| `\w+` \| \w+ / \w+ \|", line)]
    toolkits = {name: preset for name, preset in PRESETS.items() if preset.beyond}
    assert presets == [*toolkits, "dr_grpo", "rloo"]
    written = [line for line in path.read_text().splitlines() if line.startswith("| `")]
    assert len(written) == 2 and set(written) < set(lines)
    ((_, settings, _),) = [block for block in blocks(page) if block[0] == "yaml"]
    Path("grpo.yaml").write_text(settings)
    assert main(["lab", "exact", "--trl-config", "grpo.yaml"]) == 0
    ((_, _, output),) = [block for block in blocks(page) if "--trl-config" in block[1]]
    assert " ".join(output.split()) in " ".join(capsys.readouterr().out.split())


def test_the_table_of_estimators_has_the_rows_of_the_page(tmp_path, monkeypatch, capsys):
    from tokenrl.core import PRESETS

    path = tmp_path / "table.md"
    run(TABLE, f"--output {path} --estimators rloo grpo", tmp_path, monkeypatch, capsys)
    page = (RECIPES / "pages" / "explain" / "estimators.md").read_text().splitlines()
    other_rows = [
        line for line in page if line.startswith("| `") and not re.match(r"\| `(rloo|grpo)` ", line)
    ]
    assert path.read_text().splitlines() == [line for line in page if line not in other_rows]
    # the others are in defaults.md and in distillation.md
    papers = [name for name, p in PRESETS.items() if not (p.beyond or "beta" in p.fields)]
    assert [line.split("`")[1] for line in page if line.startswith("| `")] == papers
