"""The policy as its own teacher, frozen or averaged, and teachers that read another prompt than the policy."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace

import pytest
import torch
from folders import read_json
from refusals import refused, stopped
from test_teacher import CLOSED, QUICK, READS, ROWS, logprob, other_model, student_of
from tiny_environments import Guess
from tiny_models import (
    ENDS,
    PROMPTS,
    apart,
    make_learner,
    make_policy,
    make_task,
    one_step,
    vowel_reward,
    weights,
)
from torch.testing import assert_close

import tokenrl
from tokenrl.core.estimator import Estimator
from tokenrl.errors import Refused, Stopped
from tokenrl.language.rewards.environments import Environments
from tokenrl.language.rewards.rewards import Rewards
from tokenrl.language.training.experience import experience
from tokenrl.language.training.rows import collect_rows
from tokenrl.runs.metrics import read_completions

READ = [f"{row['prompt']} is {row['answer']}:" for row in ROWS]
IN_REWARD = Estimator(beta=0.3)


def sibling(prompt, completions, rewards, row):
    """A prompt that is another for each row."""
    assert len(completions) == len(rewards) == 2
    return f"{prompt} {row['answer']} {max(rewards):.1f} {len(completions[0])}"


def scored_rows(learner, reward=vowel_reward, rows=ROWS):
    """The rows of a step, with their rewards and what the teacher says of them."""
    rewards = reward if isinstance(reward, Rewards) else Rewards(reward)
    sampling = replace(learner.sampling, step=1)
    batch = collect_rows(learner, rewards, [*enumerate(rows)], sampling)
    return experience(learner, batch, sampling)


def by_hand(model, policy, read, rows):
    """Log-probabilities [N, T] of completions behind texts that are read in place of the prompts."""
    columns = torch.zeros(rows.mask.shape, dtype=torch.float64)
    for i, (text, mask) in enumerate(zip(read, rows.mask, strict=True)):
        last = int(mask.nonzero().max()) + 1
        ids = rows.completion_ids[i, :last].tolist()
        columns[i, :last] = logprob(model, policy, text, ids)[0].detach()
    return columns * rows.mask


SOURCES = {
    "template": {"teacher_template": READS},
    "column": {},
    "function": {"teacher_context": sibling},
}


@pytest.mark.parametrize(("lora", "share"), [(0, True), (2, False)])
@pytest.mark.parametrize("source", SOURCES)
def test_completions_are_scored_behind_what_the_teacher_reads(source, lora, share):
    """The texts differ in length, and those of a function from row to row; the weights are those before training."""
    read = [text for text in READ for _ in range(3)]
    rows = ROWS
    if source == "column":
        rows = [{**row, "teacher_prompt": text} for row, text in zip(ROWS, READ, strict=True)]
    learner = make_learner(student_of(lora), IN_REWARD, rows, teacher="self", **SOURCES[source])
    policy = learner.policy
    start = copy.deepcopy(policy.model)
    regime = replace(learner.forward.reference_regime, share_prompt=share)
    learner.forward = replace(learner.forward, reference_regime=regime)
    one_step(learner, prompts=rows)  # the policy moves, and the teacher does not
    batch = scored_rows(learner, rows=rows)
    if source == "function":
        texts, scores = policy.decode(batch.completion_ids, batch.mask), batch.rewards.tolist()
        read = []
        for i in range(12):
            others = [j for j in range(i - i % 3, i - i % 3 + 3) if j != i]
            columns = [texts[j] for j in others], [scores[j] for j in others], ROWS[i // 3]
            read.append(sibling(PROMPTS[i // 3], *columns))
        assert len({*read}) > 4
    expected = by_hand(start, policy, read, batch)
    assert_close(batch.ref_logprobs * batch.mask, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", ["float64", "lora", "bfloat16 copy", "bfloat16"])
def test_the_teacher_is_the_average_of_the_policys_weights(kind):
    dtype = {"bfloat16 copy": "float32", "bfloat16": "bfloat16"}.get(kind, "float64")
    policy = student_of(2) if kind == "lora" else make_policy("gpt2", dtype=dtype)
    options = {"mixed_precision": "bf16"} if kind == "bfloat16 copy" else {}
    options |= {"teacher": "self", "teacher_decay": 0.6, "teacher_template": READS}
    learner = make_learner(policy, CLOSED, ROWS, learning_rate=1e-3, **options)
    average = weights(learner.policy.model)
    for step in (1, 2, 3):
        before = weights(learner.policy.model)
        one_step(learner, step=step, prompts=ROWS)
        assert not torch.equal(weights(learner.policy.model), before)
        average = 0.6 * average + 0.4 * weights(learner.policy.model)
    trained = [p.requires_grad for p in learner.policy.model.parameters()]
    parts = itertools.compress(learner.policy.reference.parameters(), trained)
    theirs = torch.cat([p.flatten() for p in parts])
    held = torch.cat([x.flatten().double() for x in learner.state_dict()["teacher"].values()])
    is_half = "bfloat16" in kind
    assert (theirs.dtype == torch.bfloat16) == is_half
    assert apart(held, average) < (1e-4 if kind == "bfloat16" else 1e-7)
    assert torch.equal(theirs, held.float().to(theirs.dtype) if is_half else held)


def test_a_teacher_of_episodes_reads_in_place_of_prompt_and_first_observation():
    policy = make_policy("gpt2", dtype="float64", n_positions=128, initializer_range=0.1)
    policy.eos_ids = ENDS
    options = {"teacher": "self", "teacher_template": READS, "max_completion_length": 20}
    learner = make_learner(policy, IN_REWARD, ROWS, **options)
    rewards = Rewards([], environments=Environments(Guess, timeout=0.3, share_seed=False))
    batch = scored_rows(learner, rewards)
    numbered = [*enumerate(ROWS)]
    played = collect_rows(learner, rewards, numbered, replace(learner.sampling, step=1))
    assert any(turns > 1 for turns in (batch.turns.amax(dim=1) + 1).tolist())
    openings = [opening for opening, _ in played.openings]
    assert len({*openings}) > 4
    read = [f"{text} is {ROWS[i // 3]['answer']}:" for i, text in enumerate(openings)]
    assert batch.teacher_prompts == [policy.encode(text) for text in read]
    expected = by_hand(policy.model, policy, read, batch)
    assert_close(batch.ref_logprobs * batch.mask, expected, rtol=0, atol=1e-10)


def test_a_text_takes_the_place_of_the_last_message_of_the_user():
    policy = make_policy("gpt2", "chat", n_positions=128)
    turns = [{"role": role, "content": f"{role} one"} for role in ("system", "user", "assistant")]
    rows = [{"prompt": turns, "answer": "two"}]
    for options, column in (
        ({"teacher_template": "{prompt} {answer}"}, {}),
        ({}, {"teacher_prompt": "user one two"}),
        ({"teacher_context": lambda prompt: f"{prompt[1]['content']} two"}, {}),
    ):
        data = [row | column for row in rows]
        learner = make_learner(
            policy, IN_REWARD, data, teacher="self", prompts_per_step=1, **options
        )
        ids = scored_rows(learner, rows=data).teacher_prompts
        text = policy.tokenizer.decode(ids[0])
        assert text.endswith(" one u user one two a assistant one") and ids[0] == ids[2]


def taught(folder, **options):
    """A short run with the policy as its own teacher, which reads the answer, and without a reward."""
    policy = make_policy("gpt2")
    policy.eos_ids = ENDS
    settings = {"model": policy, "teacher": "self", "reward": "none", "output_dir": folder}
    settings |= {"task": make_task(), "estimator": "opd_full_path", **QUICK}
    settings["task"].train_prompts = settings["task"].eval_prompts = ROWS
    if "teacher_context" not in options:
        settings["teacher_template"] = READS
    return policy, tokenrl.train(**settings | options)


def test_a_run_says_what_its_teacher_is_and_reads_and_keeps_no_teacher(tmp_path, said):
    policy, result = taught(tmp_path / "run", teacher_decay=0.5)
    average = "the policy itself, with an average of its weights (decay 0.5)"
    words = f"teacher {average}; it reads teacher_template {READS!r} in place of the prompt"
    assert words in said()
    assert policy.reference is None and result.policy.reference is None
    config = read_json(tmp_path / "run" / "config.json")
    names = ("teacher", "teacher_decay", "teacher_template")
    assert [config[name] for name in names] == ["self", 0.5, READS]
    assert result.eval_before["kl"] > 0.1
    (table, *_) = (tmp_path / "run" / "completions").glob("*.parquet")
    assert {row["teacher_prompt"] for row in read_completions(table)} < {*READ}
    taught(tmp_path / "check", check=True)
    out = said()
    assert any(f"Its teacher reads in place of it: {read}" in out for read in READ)


def own(completion, reward):
    return f"{completion} {reward}"


@pytest.mark.parametrize(
    ("context", "options", "words"),
    [
        (lambda completions: completions[0], {}, "bias: exact"),
        (own, {"allow_own_feedback": True}, "bias: biased, as the teacher may read the row itself"),
        (
            lambda rewards: f"{rewards}",
            {"estimator": IN_REWARD, "reward": vowel_reward},
            "bias: biased, as the baseline compares KLs to teachers that have read each other's",
        ),
    ],
)
def test_a_function_of_the_row_itself_is_declared_biased_and_no_kl_is_evaluated(
    tmp_path, said, context, options, words
):
    _, result = taught(tmp_path, teacher_context=context, **options)
    out = said()
    assert words in out and "it reads teacher_context" in out
    assert "kl" not in result.eval_after


@pytest.mark.parametrize("baseline", ["none", "rloo"])
def test_a_kl_in_the_reward_to_a_teacher_that_reads_siblings_biases_a_baseline(baseline):
    """By enumeration of pairs of one token each, against the gradient with what the teacher reads held fixed."""
    shape = {"dtype": torch.float64, "generator": torch.Generator().manual_seed(0)}
    logits = torch.randn(3, **shape).requires_grad_()
    theirs = torch.randn(3, 3, **shape).log_softmax(1)  # by the token of the sibling
    logp = logits.log_softmax(0)
    estimator = Estimator(baseline=baseline, beta=1.0)
    sums = torch.zeros(2, dtype=torch.float64)
    mask = torch.ones(2, 1, dtype=torch.float64)
    for pair in itertools.product(range(3), repeat=2):
        ids = torch.tensor(pair)
        own, ref = logp[ids, None], theirs[ids.flip(0), ids][:, None]
        columns = {"logprobs": own.detach(), "ref_logprobs": ref, "group_size": 2}
        advantages = estimator.advantages(0 * mask[:, 0], mask, **columns).policy.view(2, 1)
        terms = [(own * advantages).sum(), (own * (ref - own).detach()).sum()]
        sums = sums + own.sum().exp().detach() * torch.stack(terms)
    estimated, exact = (torch.autograd.grad(x, logits, retain_graph=True)[0] for x in sums)
    assert (apart(estimated, exact) < 1e-12) == (baseline == "none")


def with_prompts(*columns):
    """A task with another column `teacher_prompt`, of which some rows have none."""
    task = make_task()
    rows = [{**row, **column} for row, column in zip(ROWS, columns, strict=True)]
    task.train_prompts = task.eval_prompts = rows
    return task


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"teacher": None}, "teacher_template makes what a teacher reads, and there is none"),
        ({"teacher_decay": 0.5, "teacher": other_model()}, "for the teacher self"),
        ({"teacher_template": "{question}"}, r"there is no 'question'.*Available: answer, prompt"),
        ({"teacher_context": own}, "takes completion and reward of the row itself.*compute differ"),
        ({"teacher_context": lambda prompt, hint: ""}, "parameter 'hint'.*Available: completions"),
        ({"teacher_context": "nowhere.py:f"}, "there is no file nowhere.py"),
        ({"teacher_context": sibling, "teacher_template": "a"}, "one prompt: leave out all but on"),
        (
            {"task": with_prompts(*[{"teacher_prompt": 3.5}] * 4)},
            "leave out all but one of teacher_template '.*', the column teacher_pr",
        ),
        (
            {"task": with_prompts({"teacher_prompt": "a"}, {}, {}, {}), "teacher_template": None},
            r"row 1: the prompt is None \(NoneType\)",
        ),
        (
            {"teacher_template": None},
            "reads the same prompts, so that with reward none there is no",
        ),
        ({"teacher_template": "{prompt}" + 40 * " seven"}, "row 0, for the teacher has .* context"),
    ],
)
def test_what_a_teacher_cannot_read_is_refused_in_words(tmp_path, changes, words):
    with refused(words):
        taught(tmp_path, quiet=True, **changes)
    assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize(
    ("context", "words"),
    [
        (lambda prompt: 1 / 0, "failed: it raised ZeroDivisionError: division by zero"),
        (lambda prompt: [{"role": "user"}], "message 0 of the prompt has content None"),
        (lambda prompt: 99 * "seven ", "tokens, with its completion"),
    ],
)
def test_a_context_that_fails_stops_the_run(tmp_path, context, words):
    with stopped(words):
        taught(tmp_path, quiet=True, teacher_context=context)


@pytest.mark.parametrize("source", ["template", "function"])
def test_only_the_prompts_of_the_policy_are_cut(source, tmp_path):
    """Cut on the left, the teacher's prompt would lose the answer, which is all that it knows more."""
    long = "the cat sat on " * 10
    rows = [{"prompt": long + word, "answer": "mat"} for word in ("a", "the", "on")]
    options = {"teacher_template": "{answer} is right. {prompt}"}
    if source == "function":
        told = lambda prompt, completions: f"{completions[0]} is right. {prompt}"  # noqa: E731
        options = {"teacher_context": told}
    sizes = {"truncate_prompts": True, "max_completion_length": 16}
    with pytest.raises((Refused, Stopped), match="as its prompts are never cut") as refusal:
        taught(tmp_path, task=rows, quiet=True, **sizes, **options)
    assert "truncate_prompts" not in str(refusal.value)
