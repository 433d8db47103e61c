"""Training on episodes: its gradient by autograd, what estimators read of tokens, and whole runs by command."""

from __future__ import annotations

import io
import json
import sys
from collections import defaultdict
from dataclasses import replace

import pytest
import torch
from command_line import completes
from families import family_policy
from folders import read_json
from tiny_environments import Faulty, Guess
from tiny_models import (
    ENDS,
    PROMPTS,
    apart,
    gradient,
    make_learner,
    make_policy,
    one_step,
    weights,
)
from torch.nn.utils.rnn import pad_sequence

from tokenrl.core import Estimator
from tokenrl.language.rewards.environments import Environments
from tokenrl.language.rewards.rewards import Rewards
from tokenrl.language.rollout.episodes import ENDINGS
from tokenrl.language.training import learner, rows as collect
from tokenrl.language.training.rows import collect_rows
from tokenrl.runs.reader import read_run

LIMIT, SIZE = 10, 3
"""The most tokens that the policy may choose in an episode, and the episodes of a group."""
ESTIMATORS = {
    "rloo": Estimator(),
    "to go": Estimator(returns="reward_to_go"),
    "sequence mean": Estimator(aggregation="sequence_mean", ratio="sequence_mean"),
    "token mean": Estimator(aggregation="token_mean", ratio="token", returns="reward_to_go"),
    "fixed length": Estimator(aggregation="fixed_length"),
    "kl": Estimator(beta=0.3, kl_estimator="k2", kl_placement="loss"),
    "closed form": Estimator(beta=0.3, kl_estimator="closed_form", kl_placement="loss"),
    "closed form path": Estimator(beta=0.3, kl_estimator="closed_form_path", kl_placement="loss"),
    "kl in the reward": Estimator(beta=0.3),
    "entropy": Estimator(entropy_coef=0.2, aggregation="token_mean"),
}


def policy_of(family, seed=0):
    """A policy in float64 whose turns are short."""
    policy = make_policy(dtype="float64", seed=seed, max_position_embeddings=128)
    if family == "qwen3":
        policy.model = family_policy("qwen3", dtype="float64", seed=seed, vocabulary=96).model
    elif family != "llama":
        policy.model = make_policy(family, dtype="float64", seed=seed, n_positions=128).model
    policy.eos_ids = ENDS
    return policy


def loss_of_actions(policy, reference, rows, e):
    """The loss of the chosen tokens alone, put side by side; each row is scored by itself, as a whole."""
    rows_of = defaultdict(list)
    for i, mask in enumerate(rows.mask):
        actions = mask.nonzero().flatten()
        prompt = rows.prompt_ids[i][rows.prompt_mask[i]]
        ids = torch.cat([prompt, rows.completion_ids[i]])
        before = len(prompt) + actions - 1
        logp = policy.model(ids[None]).logits[0][before].log_softmax(-1)  # [actions, V]
        with torch.no_grad():
            ref = reference.model(ids[None]).logits[0][before].log_softmax(-1)
        chosen = ids[before + 1, None]
        rows_of["logprobs"].append(logp.gather(1, chosen)[:, 0])
        rows_of["ref_logprobs"].append(ref.gather(1, chosen)[:, 0])
        rows_of["entropy"].append(-(logp.exp() * logp).sum(-1))
        rows_of["token_kl"].append((logp.exp() * (logp - ref)).sum(-1))
        rows_of["turns"].append(rows.turns[i][actions])
        rows_of["rewards"].append(rows.dense_rewards[i][actions].double())
        assert not rows.dense_rewards[i][~mask].any()
    padded = {name: pad_sequence(x, batch_first=True) for name, x in rows_of.items()}
    mask = pad_sequence([torch.ones(len(x)) for x in rows_of["turns"]], batch_first=True).double()
    rewards, turns, scores = padded.pop("rewards"), padded.pop("turns"), padded["logprobs"].detach()
    at_first = {"logprobs": scores, "ref_logprobs": padded["ref_logprobs"]}
    advantages, weights, *_ = e.loss_terms(
        rewards, mask, group_size=SIZE, max_length=LIMIT, valid=rows.valid, turns=turns, **at_first
    )
    return e.loss(advantages=advantages, weights=weights, mask=mask, old_logprobs=scores, **padded)


@pytest.mark.parametrize(
    ("family", "name", "options"),
    [
        ("gpt2", "rloo", {}),
        ("llama", "to go", {"micro_batch_size": 5, "sampling_batch_size": 3}),
        ("llama", "sequence mean", {}),
        ("qwen3", "token mean", {}),
        ("llama", "token mean", {"factory": Faulty, "micro_batch_size": 1}),
        ("llama", "fixed length", {"share_seed": False}),
        ("gpt2", "kl", {"micro_batch_size": 2}),
        *(("llama", name, {}) for name in [*ESTIMATORS][6:]),
    ],
)
def test_the_gradient_of_episodes_is_that_of_their_chosen_tokens(family, name, options):
    """Neither KL, entropy nor divisors have a token of the environment, nor anything a row that failed.

    Unsloth ignored the mask of tools.
    """
    options = dict(options)
    factory = options.pop("factory", Guess)
    share = options.pop("share_seed", True)
    rewards = Rewards([], environments=Environments(factory, share_seed=share, timeout=0.3))
    estimator = ESTIMATORS[name]
    policy = policy_of(family)
    reference = policy_of(family, seed=1)
    policy.reference = reference.model.requires_grad_(False)
    learner = make_learner(
        policy, estimator, max_completion_length=LIMIT, learning_rate=1e-9, **options
    )
    prompts = [(n, {"prompt": prompt}) for n, prompt in enumerate(PROMPTS)]
    rows = collect_rows(learner, rewards, prompts, replace(learner.sampling, step=1))
    behind = rows.mask.flip(1).cumsum(1).flip(1) > 0
    assert (~rows.mask & behind).sum() > 50 and int(rows.turns.max()) == 2
    assert rows.valid.all() == (factory is Guess)
    loss_of_actions(policy, reference, rows, estimator).backward()
    expected = gradient(policy.model)
    policy.model.zero_grad()
    record = one_step(learner, reward=rewards)
    assert record.metrics["reward"] == pytest.approx(float(rows.rewards[rows.valid].mean()))
    assert expected.norm() > 1e-3 and apart(gradient(policy.model), expected) < 1e-6
    entropies = rows.entropy[rows.mask]
    assert record.metrics["entropy"] == pytest.approx(float(entropies.mean()), rel=1e-6)
    assert record.metrics["completions/mean_length"] == float(rows.mask.sum()) / len(rows)


# ---- every kind of estimator ----

NAMES = "remax ppo optimal dapo gspo cispo"
KINDS = {
    **{name: Estimator.preset(name) for name in NAMES.split()},
    "timestep mean": Estimator.preset("reinforce_timestep_mean", beta=0.1),
    "centred": Estimator(importance="token", importance_centre=True, ratio="token"),
    "truncated": Estimator(truncations="mask", aggregation="token_mean", returns="reward_to_go"),
}
COLUMNS = ("logprobs", "sampling_logprobs", "entropy", "score_norms", "hidden")


def trained(estimator, factory=Guess, **options):
    """A step on episodes, of two updates where there is a ratio: weights and last gradient, and metrics."""
    policy = make_policy(max_position_embeddings=128, initializer_range=0.1)
    policy.eos_ids = ENDS
    if estimator.beta:
        policy.reference = make_policy(seed=1, max_position_embeddings=128).model.requires_grad_(
            False
        )
    shape = {"num_minibatches": 1 + (estimator.ratio != "none"), "max_completion_length": 10}
    learner = make_learner(policy, estimator, **shape | options)
    rewards = Rewards([], environments=Environments(factory, timeout=0.3))
    record = one_step(learner, reward=rewards)
    parts = [weights(policy.model), gradient(policy.model)]
    parts += [] if learner.critic is None else [weights(learner.critic.head)]
    return torch.cat(parts), record.metrics


def disturb(monkeypatch, where):
    """Change what is computed of the tokens that `where` chooses by their mask, and count them."""
    changed = []

    def other(x, mask):
        cells = where(mask)
        changed.append(int(cells.sum()))
        return (
            None
            if x is None
            else torch.where(cells if x.ndim == 2 else cells[:, :, None], 2 * x - 3, x)
        )

    def scored(compute):
        return lambda model, rows, *args, **kw: type(out := compute(model, rows, *args, **kw))(
            *(other(x, rows.mask) for x in out)
        )

    def sampled(*args):
        rows = sample_rows(*args)
        return replace(rows, **{name: other(getattr(rows, name), rows.mask) for name in COLUMNS})

    sample_rows = collect.sample_rows
    monkeypatch.setattr(collect, "sample_rows", sampled)
    for name in ("score_in_parts", "score"):
        monkeypatch.setattr(learner, name, scored(getattr(learner, name)))
    return changed


@pytest.mark.parametrize("name", KINDS)
def test_no_estimator_reads_what_is_computed_of_the_environments_tokens(name, monkeypatch):
    """Whatever their log-probabilities, entropies and hidden states are, the update has the same bits."""
    usual, measured = trained(KINDS[name])
    assert usual.isfinite().all() and measured["episodes/turns"] > 1
    with monkeypatch.context() as patch:
        changed = disturb(patch, torch.logical_not)
        again, metrics = trained(KINDS[name])
    assert sum(changed) > 50 and torch.equal(again, usual)
    assert metrics == pytest.approx(measured, rel=0, abs=0, nan_ok=True)
    if name == "ppo":  # those of the policy do count
        disturb(monkeypatch, torch.Tensor.bool)
        assert not torch.equal(trained(KINDS[name])[0], usual)


# ---- whole runs ----

ENVIRONMENT = '''
class Talk:
    """Says <b>; a turn is worth its digits, and one with a q ends the episode."""

    def reset(self, seed=None):
        return f"<{seed % 10}>", {}

    def step(self, text):
        digits = float(sum(letter.isdigit() for letter in text))
        return "<b>\\n", digits, "q" in text, False, {}


class Away(Talk):
    """Its service is away."""

    def step(self, text):
        raise OSError("no connection")


def long(completions, **_):
    return [float(len(text)) for text in completions]
'''
SMALL = """--model tiny --max-turns 3 --max-completion-length 24 --max-steps 1 --prompts-per-step 4
--num-generations 4 --eval-size 6 --stop """ + " ".join("abcdefghijklmnop")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The directory of a run in an environment, beside the file that defines it."""
    folder = tmp_path_factory.mktemp("talk")
    (folder / "talk.py").write_text(ENVIRONMENT)
    completes(f"train --task {folder}/talk.py:Talk {SMALL} --output-dir {folder}/run --quiet")
    return folder / "run"


def test_a_run_records_episodes_and_its_page_shows_them_as_chats(run):
    recorded = read_run(run)
    assert recorded.config["max_turns"] == 3
    row, *others = recorded.completions()[:4]
    turns = json.loads(row["messages"])
    assert row["prompt"][0] + row["prompt"][2] == "<>" and row["ending"] in ENDINGS
    assert {turn["role"] for turn in turns[::2]} == {"assistant"} and row["failure"] is None
    assert {turn["content"] for turn in turns[1::2]} <= {"<b>\n"}
    assert {other["prompt"][1] for other in others} == {row["prompt"][1]}
    page = (run / "report.html").read_text()
    opened = '<div class="message user"><span class="label">user</span><div class="text">&lt;b&gt;'
    assert opened in page and '<div class="message assistant">' in page and "<b>\n" not in page
    assert recorded.metrics[-1]["eval_episodes/turns"] > 0
    tokens = recorded.tokens()
    is_given = tokens["logprob"].isna()
    assert "<b>\n" in "".join(tokens["text"][is_given]) and not is_given.iloc[-1]
    assert tokens["entropy"].isna().equals(is_given) and '<span class="given"' in page


def test_it_is_evaluated_and_sampled_as_it_was_trained(run, capsys, said, monkeypatch):
    numbers = run.parent / "numbers.json"
    command = f"evaluate --model {run} --json {numbers} --num-generations 2 --best-of 2"
    completes(f"{command} --reference {run} --reward {run.parent}/talk.py:long")
    assert "mean number of turns of an episode" in said()
    metrics = read_json(numbers)
    of_episodes = {name: value for name, value in metrics.items() if name.startswith("episodes/")}
    turns = of_episodes.pop("episodes/turns")
    assert 1 < turns <= 3 and sum(of_episodes.values()) == pytest.approx(1)
    assert abs(metrics["kl"]) < 1e-4
    # the task's own reward measures what the other one chose
    assert metrics["best_of_n_proxy@2"] >= metrics["best_of_n_proxy@1"] != metrics["best_of_n@1"]
    completes(f"sample --model {run} --num-generations 1 --prompt", "", "7")
    out, output = capsys.readouterr()
    assert out.count("episode\nprompt     <") == 2 and "7<" not in out and "\nending     " in out
    words = "Talk begins its episodes itself, so they are played without that prompt"
    assert output.count(words) == 1 and out.count("\nuser       <b>") >= 2
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n\n"))
    completes(f"sample --model {run} --num-generations 0")
    assert capsys.readouterr().out.count("episode\nprompt") == 2  # an empty line plays one too


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (f"train --check {SMALL} --task talk.py:Away", "episodes failed. Away.step raised OSError"),
        ("lab measure --task talk.py:Talk --model tiny", "lab measure needs completions of one"),
        (
            "reward-model --output-dir new --task talk.py:Talk --model tiny",
            "A pair of completions needs completions of one turn, and Talk answers them: name a task",
        ),
    ],
)
def test_what_fails_and_what_needs_a_single_turn_is_refused(
    run, monkeypatch, refusal, command, words
):
    monkeypatch.chdir(run.parent)
    assert words in refusal(command)
