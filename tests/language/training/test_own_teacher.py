"""The policy as its own teacher, frozen or averaged, and teachers that read another prompt than the policy."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from functools import partial

import pytest
import torch
from folders import read_json
from refusals import refused, stopped
from test_teacher import CLOSED, QUICK, closed_form, logprob, other_model, student_of
from tiny_environments import Guess
from tiny_models import (
    ENDS,
    PROMPTS,
    apart,
    gradient,
    make_learner,
    make_policy,
    make_task,
    one_step,
    recorded,
    vowel_reward,
    weights,
)
from torch.testing import assert_close

import tokenrl
from tokenrl.core.estimator import Estimator
from tokenrl.errors import Refused, Stopped
from tokenrl.language.evaluation.evaluation import Evaluator
from tokenrl.language.rewards.environments import Environments
from tokenrl.language.rewards.rewards import Rewards
from tokenrl.language.rollout.sampling import Sampling
from tokenrl.language.training.experience import experience
from tokenrl.language.training.rows import collect_rows
from tokenrl.runs.metrics import read_completions

ROWS = [
    {"prompt": p, "answer": a} for p, a in zip(PROMPTS, ["mat", "7", "", "the log"], strict=True)
]
TEMPLATE = "{prompt} is {answer}:"
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


@pytest.mark.parametrize("share", [True, False], ids=["shared", "each"])
@pytest.mark.parametrize("lora", [0, 2])
@pytest.mark.parametrize("source", ["template", "column", "function", "named"])
def test_completions_are_scored_behind_what_the_teacher_reads(source, lora, share):
    """The texts differ in length, and those of a function from row to row; the weights are those before training."""
    read = [text for text in READ for _ in range(3)]
    rows = ROWS
    options = {"teacher": "self", "teacher_template": TEMPLATE}
    if source == "column":
        rows = [{**row, "teacher_prompt": text} for row, text in zip(ROWS, READ, strict=True)]
        options["teacher_template"] = None
    if source == "function":
        options |= {"teacher_template": None, "teacher_context": sibling}
    if source == "named":
        options["teacher"] = other_model(dtype="float64")
    learner = make_learner(student_of(lora), IN_REWARD, rows, **options)
    policy = learner.policy
    start = options["teacher"].model if source == "named" else copy.deepcopy(policy.model)
    regime = replace(learner.forward.reference_regime, share_prompt=share)
    learner.forward = replace(learner.forward, reference_regime=regime)
    one_step(learner, prompts=rows)  # the policy moves, and the teacher does not
    batch = scored_rows(learner, rows=rows)
    if source == "function":
        texts = policy.decode(batch.completion_ids, batch.mask)
        scores = batch.rewards.tolist()
        groups = [[j for j in range(i - i % 3, i - i % 3 + 3) if j != i] for i in range(12)]
        read = [
            sibling(
                PROMPTS[i // 3], [texts[j] for j in own], [scores[j] for j in own], ROWS[i // 3]
            )
            for i, own in enumerate(groups)
        ]
        assert len({*read}) > 4
    expected = by_hand(start, policy, read, batch)
    assert_close(batch.ref_logprobs * batch.mask, expected, rtol=0, atol=1e-10)


def test_an_adapter_shares_the_frozen_weights_with_its_teacher():
    policy = make_learner(student_of(2), IN_REWARD, teacher="self").policy
    pairs = list(zip(policy.model.parameters(), policy.reference.parameters(), strict=True))
    assert {p.requires_grad for p, _ in pairs} == {True, False}
    assert all((p.data_ptr() == q.data_ptr()) is not p.requires_grad for p, q in pairs)
    assert not any(q.requires_grad for _, q in pairs)


def test_the_closed_form_behind_another_prompt_is_that_of_autograd():
    seen: list = []
    learner = make_learner(
        student_of(), CLOSED, ROWS, teacher="self", teacher_template=TEMPLATE, temperature=0.7
    )
    alone = copy.deepcopy(learner.policy.model)
    one_step(learner, prompts=ROWS, reward=recorded(vowel_reward, seen))
    groups = torch.tensor([reward for *_, reward in seen], dtype=torch.float64).view(4, 3)
    advantages = (groups - (groups.sum(1, keepdim=True) - groups) / 2).flatten()
    loss = 0.0
    for i, (prompt, ids, _) in enumerate(seen):
        own, whole = logprob(alone, learner.policy, prompt, ids, temperature=0.7)
        _, theirs = logprob(alone, learner.policy, READ[i // 3], ids, temperature=0.7)
        divergence = closed_form(whole, theirs.detach(), own)
        loss = loss + (0.3 * divergence - advantages[i] * own.sum()) / 12
    loss.backward()
    assert apart(gradient(learner.policy.model), gradient(alone)) < 1e-10


@pytest.mark.parametrize("decay", [0.0, 0.6])
@pytest.mark.parametrize("kind", ["float64", "lora", "bfloat16 copy", "bfloat16"])
def test_the_teacher_is_the_average_of_the_policys_weights(kind, decay):
    dtype = {"bfloat16 copy": "float32", "bfloat16": "bfloat16"}.get(kind, "float64")
    policy = student_of(2) if kind == "lora" else make_policy("gpt2", dtype=dtype)
    options = {"mixed_precision": "bf16"} if kind == "bfloat16 copy" else {}
    options |= {"teacher": "self", "teacher_decay": decay, "teacher_template": TEMPLATE}
    learner = make_learner(policy, CLOSED, ROWS, learning_rate=1e-3, **options)
    average = weights(learner.policy.model)
    for step in (1, 2, 3):
        before = weights(learner.policy.model)
        one_step(learner, step=step, prompts=ROWS)
        assert not torch.equal(weights(learner.policy.model), before)
        average = decay * average + (1 - decay) * weights(learner.policy.model)
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
    options = {"teacher": "self", "teacher_template": TEMPLATE, "max_completion_length": 20}
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


def test_a_kl_is_evaluated_behind_what_the_teacher_reads():
    policy = student_of()
    for template, least in (("{prompt}", 0.0), (TEMPLATE, 0.1)):
        learner = make_learner(policy, IN_REWARD, ROWS, teacher="self", teacher_template=template)
        prompts = partial(learner.teacher_prompts.of, policy, sampling=learner.sampling)
        reads = {"reference": replace(policy), "reference_prompts": prompts}
        evaluator = Evaluator(policy, learner.generator, **reads)
        rows = evaluator.rows(ROWS, Rewards(vowel_reward), Sampling(6, 2), "evaluation")
        largest = max(abs(row["kl"]) for row in rows)
        assert largest > least if least else largest < 1e-12


def taught(folder, **options):
    """A short run with the policy as its own teacher, which reads the answer, and without a reward."""
    policy = make_policy("gpt2")
    policy.eos_ids = ENDS
    settings = {"model": policy, "teacher": "self", "reward": "none", "output_dir": folder}
    settings |= {"task": make_task(), "estimator": "opd_full_path", **QUICK}
    settings["task"].train_prompts = settings["task"].eval_prompts = ROWS
    if "teacher_context" not in options:
        settings["teacher_template"] = TEMPLATE
    return policy, tokenrl.train(**settings | options)


def test_a_run_says_what_its_teacher_is_and_reads_and_keeps_no_teacher(tmp_path, said):
    policy, result = taught(tmp_path / "run", teacher_decay=0.5)
    out = said()
    words = (
        "the policy itself, with an average of its weights (decay 0.5); it reads teacher_template"
    )
    assert f"teacher {words} {TEMPLATE!r} in place of the prompt" in out
    assert policy.reference is None and result.policy.reference is None
    config = read_json(tmp_path / "run" / "config.json")
    names = ("teacher", "teacher_decay", "teacher_template")
    assert [config[name] for name in names] == ["self", 0.5, TEMPLATE]
    assert result.eval_before["kl"] > 0.1
    (table, *_) = (tmp_path / "run" / "completions").glob("*.parquet")
    assert {row["teacher_prompt"] for row in read_completions(table)} < {*READ}
    _, checked = taught(tmp_path / "check", check=True)
    out = said()
    assert any(f"Its teacher reads in place of it: {read}" in out for read in READ)
    assert "step-failed" not in checked.flags


def own(completion, reward):
    return f"{completion} {reward}"


def test_a_function_of_the_row_itself_is_declared_biased_and_no_kl_is_evaluated(tmp_path, said):
    for function, options, words in (
        (lambda completions: completions[0], {}, "bias: exact"),
        (own, {"allow_own_feedback": True}, "bias: biased, as the teacher may read the row itself"),
        (
            lambda rewards: f"{rewards}",
            {"estimator": IN_REWARD, "reward": vowel_reward},
            "bias: biased, as the baseline compares KLs to teachers that have read each other's",
        ),
    ):
        _, result = taught(tmp_path / "run", teacher_context=function, overwrite=True, **options)
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


def failing(prompt):
    raise ValueError("on purpose")


def test_what_a_teacher_cannot_read_is_refused_in_words(tmp_path):
    column = make_task()
    column.train_prompts = column.eval_prompts = [{**row, "teacher_prompt": 3.5} for row in ROWS]
    gap = make_task()
    gap.train_prompts = gap.eval_prompts = [{"teacher_prompt": "a", **ROWS[0]}, *ROWS[1:]]
    chat = [{"role": "user"}]
    cases = [
        ({"teacher": None}, "teacher_template makes what a teacher reads, and there is none"),
        ({"teacher_decay": 0.5, "teacher": other_model()}, "for the teacher self"),
        ({"teacher_template": "{question}"}, r"KeyError: 'question'.*there are prompt, answer\)"),
        ({"teacher_context": own}, "takes completion and reward of the row itself.*compute differ"),
        ({"teacher_context": lambda prompt, hint: ""}, "parameter 'hint'.*Available: completions"),
        ({"teacher_context": "nowhere.py:f"}, "there is no file nowhere.py"),
        ({"teacher_context": sibling, "teacher_template": "a"}, "one prompt: leave out all but on"),
        ({"task": column}, "leave out all but one of teacher_template '.*', the column teacher_pr"),
        ({"task": gap, "teacher_template": None}, r"row 1: the prompt is None \(NoneType\)"),
        (
            {"teacher_template": None},
            "reads the same prompts, so that with reward none there is no",
        ),
        ({"teacher_template": "{prompt}" + 40 * " seven"}, "row 0, for the teacher has .* context"),
    ]
    for changes, words in cases:
        with refused(words):
            taught(tmp_path / "run", quiet=True, **changes)
        assert not (tmp_path / "run" / "config.json").exists()
    for function, words in (
        (failing, "teacher_context failing failed: it raised ValueError: on purpose"),
        (lambda prompt: chat, "message 0 of the prompt has content None"),
        (lambda prompt: 99 * "seven ", "tokens, with its completion"),
    ):
        with stopped(words):
            taught(tmp_path / "run", quiet=True, overwrite=True, teacher_context=function)


@pytest.mark.parametrize("source", ["template", "column", "function"])
def test_only_the_prompts_of_the_policy_are_cut(source, tmp_path):
    """Cut on the left, the teacher's prompt would lose the answer, which is all that it knows more."""

    def told(prompt, completions):
        return f"{completions[0]} is right. {prompt}"

    long = "the cat sat on " * 10
    rows = [{"prompt": long + word, "answer": "mat"} for word in ("a", "the", "on")]
    options = {"teacher_template": "{answer} is right. {prompt}"}
    if source == "column":
        rows = [{**row, "teacher_prompt": f"mat is right. {long}"} for row in rows]
        options = {"teacher_template": None}
    if source == "function":
        options = {"teacher_context": told}
    sizes = {"truncate_prompts": True, "max_completion_length": 16}
    with pytest.raises((Refused, Stopped)) as refusal:
        taught(tmp_path / "run", task=rows, quiet=True, **sizes, **options)
    assert "give the teacher less to read, as its prompts are never cut" in str(refusal.value)
    assert "truncate_prompts" not in str(refusal.value)
