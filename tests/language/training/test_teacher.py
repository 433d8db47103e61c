"""A teacher in place of the start model: whole steps against autograd, rows of heads, refusals, runs."""

from __future__ import annotations

import copy
import re
from collections import Counter, defaultdict
from dataclasses import replace

import pytest
import torch
from folders import read_json
from refusals import refused
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
    scored,
    textbook_logprobs,
    vowel_reward,
    weights,
)
from torch.nn.utils.rnn import pad_sequence

import tokenrl
from tokenrl.core.estimator import Estimator
from tokenrl.language.evaluation.evaluation import Evaluator
from tokenrl.language.policy.arguments import PromptArguments
from tokenrl.language.policy.model import add_lora, load_policy
from tokenrl.language.rewards.environments import Environments
from tokenrl.language.rewards.rewards import Rewards
from tokenrl.language.rollout import forward
from tokenrl.language.rollout.generator import TransformersGenerator
from tokenrl.language.rollout.rewarded import completion_kl
from tokenrl.language.rollout.sampling import Sampling, uniforms
from tokenrl.language.rollout.scoring import Regime
from tokenrl.language.training import learner as learners
from tokenrl.language.training.arguments import TrainArguments
from tokenrl.language.training.rows import collect_rows
from tokenrl.language.training.teacher import load_teacher
from tokenrl.runs.metrics import read_completions, read_metrics

PENALTY = Estimator(beta=0.3)
IN_THE_LOSS = Estimator(baseline="group_mean", beta=0.3, kl_placement="loss", kl_estimator="k3")
CLOSED = Estimator(beta=0.3, kl_placement="loss", kl_estimator="closed_form_path")
QUICK = {"max_steps": 2, "prompts_per_step": 2, "num_generations": 2, "threads": 1}
QUICK |= {"max_completion_length": 6, "learning_rate": 0.01, "cpu": True}


def student_of(lora=0):
    """A policy in float64, perhaps with an adapter that changes something."""
    policy = make_policy("gpt2", dtype="float64", initializer_range=0.1)
    policy.eos_ids = ENDS
    if lora:
        add_lora(policy, r=lora)
        with torch.no_grad():
            for p in policy.trainable_parameters():
                p.copy_(torch.sin(torch.arange(p.numel()).view_as(p)) / 3)
    return policy


def logprob(model, policy, prompt, ids, **distribution):
    """Log-probabilities [T] of a completion, of the row alone, and those of all tokens [T, V]."""
    whole = torch.tensor([[*policy.encode(prompt), *ids]])
    logp = textbook_logprobs(model(whole).logits[0, -len(ids) - 1 : -1], **distribution)
    return logp.gather(1, torch.tensor(ids)[:, None]).squeeze(1), logp


@pytest.mark.parametrize("estimator", [PENALTY, CLOSED], ids=["reward", "closed"])
def test_a_teacher_is_scored_in_its_own_way(monkeypatch, estimator):
    """One whose prompts must not be shared is computed anew for each row, though the policy shares them."""
    alone = Regime(share_prompt=False)
    monkeypatch.setattr(learners, "teacher_regime", lambda *_: alone)
    learner = make_learner(student_of(), estimator, teacher=other_model(dtype="float64"))
    assert learner.forward.regime.share_prompt
    keeps_cache = []
    reference = learner.policy.reference
    reference.register_forward_pre_hook(
        lambda _, __, options: keeps_cache.append(options["use_cache"]), with_kwargs=True
    )
    one_step(learner)
    assert keeps_cache and not any(keeps_cache)


@pytest.mark.parametrize("at_once", [5, None], ids=["states", "logits"])
def test_a_closed_form_scores_the_teacher_once_a_step_unless_its_states_are_too_many(
    monkeypatch, at_once
):
    """Two updates of two micro-batches each have the gradients of a teacher that each of them scores again."""
    results = []
    for most in (forward.ACTIVATIONS, 0):
        monkeypatch.setattr(forward, "ACTIVATIONS", most)
        teacher = other_model(dtype="float64")
        several = {"num_iterations": 2, "micro_batch_size": 6, "teacher_template": READS}
        estimator = replace(CLOSED, ratio="token")
        learner = make_learner(student_of(), estimator, ROWS, teacher=teacher, **several)
        regime = Regime(share_prompt=False, tokens_at_once=at_once)
        learner.forward = replace(learner.forward, reference_regime=regime)
        scored = Counter()
        learner.policy.reference.register_forward_pre_hook(
            lambda _, inputs, rows=scored: rows.update(all=len(inputs[0]))
        )
        one_step(learner, prompts=ROWS)
        assert scored["all"] == (12 if most else 36)
        results.append(weights(learner.policy.model))
    assert apart(*results) < 1e-9


@pytest.mark.parametrize("size", [90, 96, 120])
def test_a_head_with_other_padding_rows_is_compared_over_the_rows_of_the_policy(size):
    """Of a larger head the first rows count; those that a smaller one lacks have its mean logit."""
    teacher = other_model(size, dtype="float64")
    args = TrainArguments(teacher=teacher)
    loaded = load_teacher(args, args, make_policy())
    ids = torch.tensor([[5, 17, 60]])
    with torch.no_grad():
        logits = teacher.model(ids).logits
        missing = logits.mean(2, keepdim=True).expand(-1, -1, max(0, 96 - size))
        expected = torch.cat([logits[:, :, :96], missing], dim=2).log_softmax(2)
        result = loaded.policy.model(ids).logits.log_softmax(2)
        assert torch.isfinite(loaded.policy.model(torch.tensor([[95, 1]])).logits).all()
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-12)
    assert result.exp().sum(2) == pytest.approx(1)
    assert (size == 96) == ("rows" not in loaded.line)
    assert teacher.model.lm_head.out_features == size  # the user's own model stays as it is
    learner = make_learner(make_policy(), PENALTY, teacher=teacher)
    learner.policy.eos_ids = ENDS
    assert torch.isfinite(torch.tensor(one_step(learner).metrics["kl"]))


def test_a_teacher_is_moved_and_rounded_with_the_policy_and_the_users_model_is_not():
    teacher = other_model()
    before = copy.deepcopy(teacher.model.state_dict())
    learner = make_learner(make_policy(), PENALTY, teacher=teacher, mixed_precision="bf16")
    kinds = {p.dtype for p in learner.forward.policy.reference.parameters()}
    assert kinds == {torch.bfloat16}
    assert abs(one_step(learner).metrics["kl"]) > 0.1
    after = teacher.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(p.requires_grad for p in teacher.model.parameters())


def test_without_rewards_those_of_an_environment_count_nowhere():
    policy = make_policy("gpt2", dtype="float64", n_positions=128)
    policy.eos_ids = ENDS
    teacher = other_model(dtype="float64", n_positions=128)
    learner = make_learner(policy, PENALTY, teacher=teacher, max_completion_length=20)
    environments = Environments(Guess, timeout=0.3)
    silent = Rewards([], environments=environments, unrewarded=True)
    prompts = [(n, {"prompt": prompt}) for n, prompt in enumerate(PROMPTS)]
    sampling = replace(learner.sampling, step=1)
    batch = collect_rows(learner, silent, prompts, sampling)
    assert not batch.rewards.any() and not batch.dense_rewards.any() and batch.valid.all()
    counted = Rewards([], environments=environments)
    assert collect_rows(learner, counted, prompts, sampling).rewards.any()
    metrics = one_step(learner, reward=silent).metrics
    assert not [name for name in metrics if "reward" in name] and metrics["grad_norm"] > 0


def distilled(folder, **options):
    """A short run with a teacher and no reward."""
    policy = make_policy("gpt2")
    policy.eos_ids = ENDS
    teacher = other_model()
    settings = {"model": policy, "teacher": (teacher.model, teacher.tokenizer), "reward": "none"}
    settings |= {"task": make_task(), "output_dir": folder, "estimator": PENALTY}
    return tokenrl.train(**settings | QUICK | options)


def fails_in_training(completion_ids, trainer_state, **_):
    """A reward that only evaluations before or after all steps may call."""
    assert trainer_state.global_step in (0, trainer_state.max_steps)
    return [float(len(ids)) for ids in completion_ids]


def test_a_run_without_rewards_says_what_it_ascends_and_evaluates_the_reward_of_the_task(
    tmp_path, said
):
    run = tmp_path / "run"
    result = distilled(run, task=make_task(reward=fails_in_training))
    out = said()
    assert "none: what is learnt is to lower the KL to the teacher; evaluated:" in out
    assert re.search(r"teacher GPT2LMHeadModel \([\d,]+ parameters\)", out)
    assert "completion advantage" in out and "completion reward" not in out
    config = read_json(run / "config.json")
    assert config["teacher"] == "GPT2LMHeadModel" and config["reward"] == ["none"]
    row = read_metrics(run / "metrics.jsonl")[1]
    assert "reward" not in row and row["kl"] > 0
    assert {"reward", "reward_greedy", "kl"} < result.eval_after.keys()
    assert result.policy.reference is None and not result.flags
    (table, *_) = (run / "completions").glob("*.parquet")
    assert {row["reward"] for row in read_completions(table)} == {None}
    assert tokenrl.evaluate(model=run, task=make_task(), reward=None).metrics["reward_greedy"]
    data = distilled(tmp_path / "data", task=[{"prompt": prompt} for prompt in PROMPTS * 3])
    assert "kl" in data.eval_after and "reward_greedy" not in data.eval_after


def test_a_run_continues_with_its_own_teacher_only(tmp_path):
    distilled(tmp_path, quiet=True, max_steps=1)
    more = {"quiet": True, "resume": "auto", "max_steps": 2}
    with refused("otherwise: .*teacher"):
        distilled(tmp_path, teacher=other_model(initializer_range=0.4), **more)
    with refused("The teacher cannot be used"):
        distilled(tmp_path, teacher=None, **more)
    assert distilled(tmp_path, **more).steps == 2


# ---- a teacher that ends otherwise ----


def ending_at(*ids, seed=3):
    """A policy whose completions end at these ids; those of its tokenizer do not count."""
    policy = make_policy("gpt2", vocabulary=90, seed=seed, initializer_range=0.5)
    policy.eos_ids = ids
    return policy


def test_completions_end_where_the_teacher_ends_too_and_so_does_what_is_saved(tmp_path, said):
    from transformers import GenerationConfig

    policy = ending_at(1, seed=0)
    options = {"model": policy, "teacher": ending_at(7, 9), "max_completion_length": 24}
    options |= {"eval_generations": 4, "save_every": 1}
    result = distilled(tmp_path, **options)
    names = policy.tokenizer.convert_ids_to_tokens([7, 9])
    assert f"completions end where it ends too, at {names[0]}, {names[1]}" in said()
    assert policy.eos_ids == (1,) and result.policy.eos_ids == (1, 7, 9)  # the user's own stays
    for folder in (tmp_path / "model", tmp_path / "checkpoints" / "step_000002"):
        assert GenerationConfig.from_pretrained(folder).eos_token_id == [1, 7, 9]
        assert {1, 7, 9} <= {*load_policy(folder).eos_ids}
    options |= {"model": ending_at(1, seed=0), "resume": "auto", "max_steps": 3, "quiet": True}
    again = distilled(tmp_path, **options)
    assert again.steps == 3 and again.policy.eos_ids == (1, 7, 9)


def test_the_kl_to_a_reference_counts_up_to_where_it_ends():
    policy, reference, sampling = ending_at(1, seed=0), ending_at(1), Sampling(24, 8)
    rows = [{"prompt": prompt} for prompt in PROMPTS]
    evaluator = Evaluator(policy, TransformersGenerator(policy), reference=ending_at(7, 1))
    draws = uniforms("evaluation", sampling, range(len(PROMPTS)))
    ids = [policy.encode(prompt) for prompt in PROMPTS]
    batch = TransformersGenerator(policy).generate(ids, sampling, draws)
    ended = 0
    table = evaluator.table(rows, Rewards(vowel_reward), sampling, "evaluation")
    kl = completion_kl(table.logprobs, table.ref_logprobs, table.mask)["kl"]
    for i, index in enumerate(table.prompt_index.tolist()):
        tokens = batch.completion_ids[i][batch.mask[i]].tolist()
        kept = tokens[: tokens.index(7) + 1] if 7 in tokens else tokens
        ended += 7 in tokens[:-1]
        prompt = PROMPTS[index]
        ours, theirs = (logprob(m.model, policy, prompt, kept)[0] for m in (policy, reference))
        assert float(kl[i]) == pytest.approx(float((ours - theirs).sum()), abs=1e-3)
    assert ended > 2


READS = "{prompt} is {answer}:"
ROWS = [
    {"prompt": p, "answer": a} for p, a in zip(PROMPTS, ["mat", "7", "", "the log"], strict=True)
]


def other_model(rows=96, **options):
    """A teacher with fewer layers, of another width than the policies here."""
    shape = {"n_embd": 16, "n_layer": 1, "n_head": 2, "initializer_range": 0.5}
    return make_policy("gpt2", vocabulary=rows, seed=3, **shape | options)


@pytest.mark.parametrize(
    ("lora", "chunked", "reads"),
    [(0, False, None), (2, True, READS)],
)
@pytest.mark.parametrize(
    "estimator", [PENALTY, IN_THE_LOSS, CLOSED], ids=["reward", "loss", "closed"]
)
def test_a_step_is_that_of_autograd_with_the_teacher_as_reference(estimator, lora, chunked, reads):
    """The policy is that of the tokens in top_p; the teacher has the temperature, and all tokens."""
    teacher = other_model(dtype="float64")
    before = weights(teacher.model)
    seen: list = []
    cut = {"temperature": 0.7, "top_p": 0.9}
    options = {"teacher": teacher, "teacher_template": reads}
    learner = make_learner(student_of(lora), estimator, ROWS, **options, **cut)
    policy = learner.policy
    assert learner.forward.reference_regime.tokens_at_once  # a head of its own
    if chunked:
        scored(learner, tokens_at_once=5)
    alone = copy.deepcopy(policy.model)
    record = one_step(learner, prompts=ROWS, reward=recorded(vowel_reward, seen))

    read = {row["prompt"]: (reads or "{prompt}").format_map(row) for row in ROWS}
    columns = defaultdict(list)
    for prompt, ids, _ in seen:
        logp, whole = logprob(alone, policy, prompt, ids, **cut)
        with torch.no_grad():
            ref, of_teacher = logprob(teacher.model, policy, read[prompt], ids, temperature=0.7)
        kept = whole.masked_fill(whole.isinf(), 0.0)
        divergence = (whole.exp() * (kept - of_teacher)).sum(-1)
        for name, x in {"logprobs": logp, "ref_logprobs": ref, "token_kl": divergence}.items():
            columns[name].append(x)
    padded = {name: pad_sequence(x, batch_first=True) for name, x in columns.items()}
    mask = pad_sequence([torch.ones(len(x)) for x in columns["logprobs"]], batch_first=True)
    old, ref = padded["logprobs"].detach(), padded["ref_logprobs"]
    rewards = torch.tensor([reward for *_, reward in seen], dtype=torch.float64)
    terms = {"group_size": 3, "max_length": 6, "logprobs": old, "ref_logprobs": ref}
    advantages, of_rows, *_ = estimator.loss_terms(rewards, mask.double(), **terms)
    estimator.loss(
        advantages=advantages, weights=of_rows, mask=mask, old_logprobs=old, **padded
    ).backward()
    assert apart(gradient(policy.model), gradient(alone)) < 1e-10
    ratios = (old - ref).sum(1)
    assert record.metrics["kl"] == pytest.approx(ratios.mean().item())
    error = ratios.view(4, 3).mean(dim=1).std().item() / 2
    assert record.metrics["kl_stderr"] == pytest.approx(error, rel=1e-4)
    with policy.reference_model() as reference:
        assert torch.equal(weights(reference.requires_grad_(True)), before)  # never trained
    assert torch.equal(weights(teacher.model), before)


def spoilt_teacher(spoil):
    """A teacher with one fault."""
    teacher = other_model()
    spoil(teacher)
    return teacher


def not_finite(teacher):
    teacher.model.transformer.h[0].ln_1.bias.data[0] = float("nan")


def with_another_token(teacher):
    teacher.tokenizer = copy.deepcopy(teacher.tokenizer)
    teacher.tokenizer.add_tokens(["<new>"])


def with_two_tokens_exchanged(teacher):
    """As many tokens, of which two have each other's ids."""
    vocabulary = teacher.tokenizer.get_vocab()
    first, second, *_ = sorted(vocabulary, key=vocabulary.__getitem__)[40:]
    exchanged = vocabulary | {first: vocabulary[second], second: vocabulary[first]}
    teacher.tokenizer.get_vocab = lambda: exchanged


def stopping(teacher):
    teacher.ask(PromptArguments(stop=("on", "<pad>")))


def demonstrated():
    task = make_task()
    task.demonstrations = [{"prompt": prompt, "completion": " dog"} for prompt in PROMPTS]
    return task


SAME = make_policy("gpt2")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"spoil": with_another_token}, r"another vocabulary.* 1 ids differ, first 90, .*'<new>'"),
        ({"spoil": with_two_tokens_exchanged}, "another vocabulary.* 2 ids differ, first 40"),
        ({"spoil": not_finite}, "not finite"),
        ({"spoil": stopping}, r"ends its completions at \('on', '<pad>'\).*--stop with the same"),
        (
            {"spoil": with_another_token, "task": demonstrated(), "warm_start": True},
            "another vocabulary",
        ),
        ({"teacher": "nowhere"}, "no such model was found|There is no directory"),
        ({"teacher": other_model(n_positions=12)}, "context of 12"),
        ({"teacher": 3}, r"teacher was given as a int.*teacher=\(model, tokenizer\)"),
        ({"teacher": SAME, "model": SAME}, "very model that is trained"),
        (
            {"estimator": Estimator(), "reward": vowel_reward},
            "beta is 0: give it one .--estimator.beta",
        ),
        ({"estimator": Estimator()}, "beta is 0"),
        ({"teacher": None}, "name one by teacher .--teacher"),
        ({"reward": ["none", vowel_reward]}, "no reward at all: .*without rewards beside it"),
        ({"reward_weights": 0.5}, "no reward at all: .*without reward_weights"),
        (
            {"estimator": Estimator(beta=0.1, zero_spread="drop")},
            "zero_spread 'drop' needs rewards",
        ),
    ],
)
def test_what_cannot_be_a_teacher_is_refused_in_words_before_the_first_step(
    tmp_path, changes, words
):
    options = dict(changes)
    if "spoil" in options:
        options["teacher"] = spoilt_teacher(options.pop("spoil"))
    with refused(words):
        distilled(tmp_path, quiet=True, **options)
    assert not [*tmp_path.rglob("config.json")]
