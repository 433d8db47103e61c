"""The supervised stage: its loss is the usual one, it learns, and its cached bases are made once."""

import math
import random
from types import SimpleNamespace

import pytest
import torch
from refusals import refused, stopped
from tiny_environments import Guess, Safe, chat_policy
from tiny_models import (
    PROMPTS,
    make_model,
    make_policy,
    make_tokenizer,
    vowel_reward,
    weights,
)
from torch.nn.utils.rnn import pad_sequence

from tokenrl.language.policy.model import load_policy
from tokenrl.language.preferences.arguments import RewardModelArguments
from tokenrl.language.preferences.data import reward_backbone
from tokenrl.language.preferences.fit import PreferenceTraining
from tokenrl.language.preferences.pairs import Pair
from tokenrl.language.rewards.environments import Environments
from tokenrl.language.rollout.forward import choose_forward, choose_passes
from tokenrl.language.supervised.arguments import SftArguments
from tokenrl.language.supervised.base import warm_started_base
from tokenrl.language.supervised.fit import (
    SupervisedTraining,
    as_in_episodes,
    encode_demonstrations,
    fit,
)
from tokenrl.language.supervised.sft import sft
from tokenrl.language.tasks.task import PromptTask
from tokenrl.runs.metrics import read_metrics

ROWS = [
    {"prompt": "the cat", "completion": " sat on the mat"},
    {"prompt": "a", "completion": "d"},
    {"prompt": "count to ten one two", "completion": " three four<eos>"},
    {"prompt": "sat on the", "completion": ""},
]


def own_loss(model, policy, rows):
    """transformers' cross-entropy with labels, mean over the completions' tokens, padded on the right."""
    pairs = encode_demonstrations(policy, rows)
    columns = [(p + c, [-100] * len(p) + c, [1] * len(p + c)) for p, c in pairs]
    ids, labels, mask = (
        pad_sequence([*map(torch.tensor, column)], batch_first=True, padding_value=value)
        for column, value in zip(zip(*columns, strict=True), (7, -100, 0), strict=True)
    )
    return model(ids, attention_mask=mask, labels=labels).loss


def test_the_loss_is_transformers_own_and_an_update_is_adamw_on_it():
    policy, model = make_policy("gpt2", dtype="float64"), make_model("gpt2", dtype="float64")
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    losses = []
    for rate in (1e-3, 1e-3 * 2 / 3, 1e-3 / 3):  # falls linearly, to 0 after the last
        optimizer.zero_grad()
        loss = own_loss(model, policy, ROWS)
        losses.append(loss.item())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.7)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
    options = {"max_steps": 3, "batch_size": 4, "learning_rate": 1e-3, "max_grad_norm": 0.7}
    assert fit(policy, ROWS, **options) == pytest.approx(losses, rel=1e-5)
    # transformers computes its loss in float32; an update moves a weight by up to 1e-3
    torch.testing.assert_close(weights(policy.model), weights(model), atol=1e-6, rtol=0)


def test_completions_end_with_one_eos():
    policy = make_policy()
    completions = [c for _, c in encode_demonstrations(policy, ROWS)]
    assert all(c[-1] == 1 and 1 not in c[:-1] for c in completions)
    assert completions[3] == [1]  # an empty answer is the end at once


def asked(content):
    return [{"role": "user", "content": content}]


def opened(row):
    """The chat of a row as `Safe.reset` opens it, whose text is appended to the message of the user."""
    return asked(f"{row['prompt'][0]['content']} There is a safe.")


def turning(digit):
    function = {"name": "turn", "arguments": {"digit": digit}}
    calls = [{"type": "function", "function": function}]
    return {"role": "assistant", "content": "so ", "tool_calls": calls}


def test_a_demonstration_of_an_environment_begins_with_the_tokens_of_an_episode():
    policy, environments = chat_policy(), Environments({"safe": Safe, "game": Guess})
    row = {"prompt": asked("the cat"), "environment": "safe"}
    (episode,) = environments.reset([row], [0])
    begun = policy.encode(episode.opening, tools=episode.tools)
    demonstration = {**row, "prompt": opened(row), "completion": "sat"}
    ((prompt, completion),) = encode_demonstrations(policy, [demonstration], environments)
    assert prompt == begun and policy.tokenizer.decode(prompt).startswith("1 tool.")
    assert policy.tokenizer.decode(completion) == "sat<eos>"
    # without tools, without an environment of that name, and without a name
    for name in ("game", "another", None):
        other = demonstration | {"environment": name}
        ((prompt, _),) = encode_demonstrations(policy, [other], environments)
        assert prompt == policy.encode(opened(row)) != begun


def test_a_call_in_a_completion_is_written_by_the_chat_template():
    policy, environments = chat_policy(), Environments(Safe)
    row = {"prompt": asked("the cat"), "completion": [turning(3)]}
    ((prompt, completion),) = encode_demonstrations(policy, [row], environments)
    assert policy.tokenizer.decode(completion) == "so <tool_call>turn</tool_call><eos>"
    assert completion.count(policy.tokenizer.eos_token_id) == 1
    written = {"prompt": row["prompt"], "completion": "so <tool_call>turn</tool_call>"}
    assert encode_demonstrations(policy, [written], environments) == [(prompt, completion)]
    with refused("cannot write it after the prompt 'the cat': give chat"):
        encode_demonstrations(policy, [row | {"prompt": "the cat"}])
    # as ChatML, which writes a line break behind the EOS
    policy.tokenizer.chat_template = policy.tokenizer.chat_template.replace("<eos>", "<eos>\\n")
    assert encode_demonstrations(policy, [row], environments)[0][1] == completion
    policy.tokenizer.chat_template = "{{ messages | length }}" + policy.tokenizer.chat_template
    with refused(r"cannot write it after the prompt .*'the cat'"):
        encode_demonstrations(policy, [row], environments)


class Store:
    """Says what its row asks for, in TRL's interface, or draws it."""

    def reset(self, text=None, **row):
        return random.choice("abcdefgh") * 3 if text == "random" else text


SO_FAR = [*asked("a"), {"role": "assistant", "content": "so"}]


@pytest.mark.parametrize(
    ("prompt", "text", "read"),
    [
        (asked("the cat"), "sat", asked("the cat\nsat")),
        (asked("the cat\n"), "\nsat", asked("the cat\n\nsat")),
        (asked("the cat"), None, asked("the cat")),
        (asked(""), "sat", asked("sat")),
        ("the cat", "sat", "the cat\nsat"),
        (SO_FAR + asked("b"), "sat", SO_FAR + asked("b\nsat")),
        # The text elsewhere in the prompt is no text of reset: as the end of a word, in another turn.
        (asked("let us ago"), "go", asked("let us ago\ngo")),
        (SO_FAR + asked("b"), "so", SO_FAR + asked("b\nso")),
        ("a\nb", "a\nb\nc", "a\nb\na\nb\nc"),
    ],
)
def test_a_demonstration_reads_as_the_episode_of_its_row(prompt, text, read):
    environments = Environments(Store)
    rows = [{"prompt": prompt, "text": text, "completion": "x"}, {"prompt": read, "text": text}]
    warnings = []
    for row in as_in_episodes(rows, environments, warnings.append):  # added once
        assert row["prompt"] == read
    assert environments.reset(rows[:1], [7])[0].opening == read and not warnings


def test_what_reset_draws_is_in_no_demonstration_and_a_line_says_so():
    rows = [{"prompt": asked(text), "text": "random", "completion": "sat"} for text in "abcdef"]
    warnings = []
    assert as_in_episodes(rows, Environments(Store), warnings.append) == rows
    assert warnings[0].startswith("Store.reset draws its text at random")
    # gymnasium's interface, and columns that reset cannot take
    for factory in (Guess, {"safe": Store}):
        others = [row | {"environment": "another"} for row in rows]
        assert as_in_episodes(others, Environments(factory), warnings.append) == others


def test_sft_shows_the_tools_of_the_environment(tmp_path):
    """Of the demonstrations, and of those that are held out."""
    rows = [{"prompt": asked(text), "completion": [turning(3)]} for text in "abcdef"]
    options = {"max_steps": 1, "batch_size": 6, "learning_rate": 1e-3}
    run = sft(
        task={"train": rows, "test": rows},
        environment=Safe,
        model=chat_policy(),
        output_dir=tmp_path,
        quiet=True,
        **options,
    )
    shown = as_in_episodes(rows, Environments(Safe), str)
    losses = fit(chat_policy(), shown, environments=Environments(Safe), **options)
    assert run.loss_before == pytest.approx(losses[0]) != fit(chat_policy(), shown, **options)[0]
    assert run.eval_before["loss"] == pytest.approx(run.loss_before, rel=1e-5)


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ({"prompt": "a"}, "of row 4: the completion is None"),
        ({"completion": "a"}, "of row 4: it has no prompt"),
        ({"prompt": "a", "completion": {"a": 1}}, r"row 4: the completion is .* such as its JSON"),
        ({"prompt": "a", "completion": "b\ud800"}, r"of row 4: the completion holds '\\ud800'"),
        ({"prompt": "a", "completion": "the cat " * 60}, "row 4: it has .* tokens.*: leave it out"),
    ],
)
def test_bad_rows_are_refused(row, match):
    with refused(match):
        encode_demonstrations(make_policy(), [*ROWS, row])


def test_no_rows_and_an_empty_answer_without_an_eos_are_refused():
    policy = make_policy()
    with refused("no demonstrations"):
        encode_demonstrations(policy, [])
    policy.tokenizer.eos_token = None
    with refused("row 3"):
        encode_demonstrations(policy, ROWS)


@pytest.mark.parametrize("kind", ["demonstrations", "preferences"])
@pytest.mark.parametrize("half", [False, True])
def test_an_update_is_the_same_in_passes_of_any_size(kind, half):
    def trained(**options):
        settings = {"max_steps": 2, "batch_size": 4, "learning_rate": 1e-3, "max_grad_norm": 0.5}
        settings |= {"mixed_precision": "bf16" if half else "no"} | options
        policy = make_policy("gpt2")
        if kind == "demonstrations":
            args = SftArguments(**settings, task="rows", training_attention="as_loaded")
            forward, _ = choose_forward(args, policy, length=8)
            pairs = encode_demonstrations(policy, ROWS)
            training, model = SupervisedTraining(policy, pairs, args, forward), policy.model
        else:
            args = RewardModelArguments(**settings, eval_every=1, center_rewards_coefficient=0.1)
            judge = reward_backbone(policy, seed=1)
            passes, _ = choose_passes(args, judge.model)
            pairs = [Pair(row["prompt"], row["completion"], " dog", 0.3) for row in ROWS]
            training, model = PreferenceTraining(judge, pairs, args, passes), judge.model
        counted, loss = [], training.loss
        training.loss = lambda rows, batch: counted.append(len(rows)) or loss(rows, batch)
        metrics = [training.update() for _ in range(2)]
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        return counted, metrics, weights(model)

    sizes, metrics, after = trained()
    assert sizes == [4, 4]
    for options, passes in (({"micro_batch_size": 3}, 4), ({"tokens_per_pass": 1}, 8)):
        sizes, others, divided = trained(**options)
        assert len(sizes) == passes
        for whole, other in zip(metrics, others, strict=True):
            assert other["padding"] < whole["padding"]
            expected = whole | {"padding": other["padding"]}
            assert other == pytest.approx(expected, rel=0.05 if half else 1e-4, abs=1e-6)
        # AdamW moves each weight by about its rate, whatever the size of a gradient that is rounding alone
        close = (divided - after).abs() < (1e-3 if half else 2e-5)
        assert close.float().mean() > 0.99


def test_a_gradient_that_is_not_finite_stops_before_it_reaches_the_weights():
    policy = make_policy()
    before = weights(policy.model)
    policy.model.lm_head.weight.register_hook(lambda gradient: gradient * math.nan)
    with stopped(r"norm of the gradient of the supervised stage is .* at step 1"):
        fit(policy, ROWS, max_steps=3, batch_size=2, learning_rate=0.1)
    assert torch.equal(weights(policy.model), before)


def test_a_warm_started_base_is_made_once_for_each_seed(cache, monkeypatch):
    built, output = [], []

    def build(seed):
        built.append(seed)
        return make_model(seed=seed), make_tokenizer()

    options = {"batch_size": 2, "learning_rate": 0.01}
    base = SimpleNamespace(build=build, demonstrations=ROWS, fingerprint="1")
    base.warm_start = SimpleNamespace(steps=4, **options)
    task = PromptTask("toy", ROWS, ROWS, demonstrations=ROWS, base=base)
    folders = [warm_started_base(task, seed=seed, announce=output.append) for seed in (0, 0, 1)]
    base.fingerprint = "2"
    folders.append(warm_started_base(task))
    assert built == [0, 1, 0] and len(output) == 2 and len(set(folders)) == 3
    for seed, folder in enumerate(folders[1:3]):  # of the weights and of the rows' order
        by_hand = make_policy(seed=seed)
        fit(by_hand, ROWS, max_steps=4, seed=seed, **options)
        assert torch.equal(weights(load_policy(folder).model), weights(by_hand.model))
    monkeypatch.setenv("TOKENRL_CACHE", str(folders[0] / "model.safetensors"))
    with stopped("could not be written"):
        warm_started_base(task)


def test_a_supervised_run_leaves_a_directory_like_any_other(tmp_path, said):
    task = PromptTask("toy", ROWS, ROWS, vowel_reward, 8, demonstrations=ROWS)
    settings = {"task": task, "output_dir": tmp_path, "max_steps": 4, "batch_size": 2}
    settings |= {"learning_rate": 0.03, "eval_every": 2}
    ended = sft(**settings, model=make_policy())
    assert (ended.exit_reason, ended.exit_code, ended.steps) == ("finished", 0, 4)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert (rows[1]["loss"], rows[4]["loss"]) == (ended.loss_before, ended.loss_after)
    assert (rows[1]["learning_rate"], rows[4]["epoch"]) == (0.03, 2)
    evaluated = {row["step"]: row["eval_reward"] for row in rows if "eval_reward" in row}
    assert list(evaluated) == [0, 2, 4] and len(rows) == 5
    ends = (ended.eval_before["reward"], ended.eval_after["reward"])
    assert ends == (evaluated[0], evaluated[4]) and len({*evaluated.values()}) > 1
    assert "4 updates x 2 demonstrations (given)" in said()
    card = (tmp_path / "model" / "README.md").read_text()
    assert f"| reward_greedy after | {ended.eval_after['reward_greedy']:.4g} |" in card
    seldom = settings | {"eval_every": 0, "overwrite": True, "quiet": True}
    again = sft(**seldom, model=make_policy())
    assert again.eval_after == ended.eval_after  # an evaluation changes nothing in the training
    assert torch.equal(weights(again.policy.model), weights(ended.policy.model))


@pytest.mark.parametrize("prompts", [PROMPTS[:3], PROMPTS[:1] * 3], ids=["several", "one prompt"])
def test_the_loss_of_held_out_completions_is_the_mean_over_their_tokens(prompts, tmp_path):
    endings = (" sat", " sat on the mat", " ran")
    rows = [{"prompt": x, "completion": y} for x, y in zip(prompts, endings, strict=True)]
    policy = make_policy()
    loss = own_loss(policy.model, policy, rows[1:]).item()
    task = {"train": rows[:1], "test": rows[1:]}
    settings = {"max_steps": 1, "batch_size": 1, "output_dir": tmp_path, "quiet": True}
    result = sft(task=task, model=policy, **settings)
    assert result.eval_before["loss"] == pytest.approx(loss, rel=1e-5)


def test_a_data_set_is_evaluated_if_there_is_a_reward(tmp_path):
    rows = [{"prompt": prompt, "answer": " sat"} for prompt in PROMPTS * 2]
    values = {"task": rows, "model": make_policy(), "completion_column": "answer", "max_steps": 2}
    values |= {"batch_size": 2, "output_dir": tmp_path, "quiet": True, "overwrite": True}
    assert sft(**values).eval_after.keys() == {"loss"}
    result = sft(**values, reward=(vowel_reward,), eval_size=2)
    assert {"reward", "reward_greedy", "loss"} <= result.eval_before.keys()
    for options, words in (
        ({"reward": (vowel_reward,), "completion_column": "gold"}, "no demonstrations"),
        ({"completion_column": "anser"}, "no column 'anser'.*Did you mean 'answer'"),
    ):
        with refused(words):
            sft(**values | options)
