"""Token-steps in memory that keeps its address: the tokens of the plain way, whatever the bucket and the company."""

from dataclasses import replace

import pytest
import torch
from families import family_policy
from test_episodes import played
from tiny_environments import Guess
from tiny_models import ENDS, make_policy, make_tokenizer
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.testing import assert_close

from tokenrl import train
from tokenrl.language.policy.stops import StopStrings
from tokenrl.language.rollout import decoding, forward
from tokenrl.language.rollout.agreement import check_token_steps, checked_generator
from tokenrl.language.rollout.batch import Batch, TokenSteps
from tokenrl.language.rollout.cache import Memory
from tokenrl.language.rollout.generator import TransformersGenerator
from tokenrl.language.rollout.reading import Histories
from tokenrl.language.rollout.sampling import Sampling
from tokenrl.language.rollout.scoring import USUAL, Regime

PROMPTS = [[5, 9, 13, 21, 33], [40, 7], [3, 4, 5]]
LENGTH, SIZE = 18, 3
DRAWS = torch.rand(9, LENGTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
KEPT = Sampling(LENGTH, SIZE, keep_hidden=True, keep_score_norms=True, keep_tokens=4)
NUMBERS = ("logprobs", "entropy", "score_norms", "hidden", "sampling_distribution")
REGIMES = ("plain", "few at once", "turns", "fixed")


def some_policy(family: str, **config):
    """A random policy whose rows end at several lengths, and whose windows hold 64 tokens."""
    adapted = family.endswith(" with LoRA")
    sizes = {"gemma3": {"sliding_window": 64}, "gpt2": {"n_positions": 128}}.get(family, {})
    policy = family_policy(family.removesuffix(" with LoRA"), **sizes, **config)
    if adapted:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
        torch.manual_seed(0)
        policy = replace(policy, model=get_peft_model(policy.model, config).eval())
    return replace(policy, eos_ids=tuple(range(0, 64, 16)), tokenizer=make_tokenizer())


def generated(
    policy, prompts=(0, 1, 2), sampling=KEPT, *, regime="plain", steps=None, greedy=False
):
    """Completions of the prompts of these numbers, each with its own draws."""
    if regime == "fixed":
        steps = TokenSteps()
    at_once = 2 * SIZE if regime == "few at once" else None
    engine = TransformersGenerator(policy, at_once, regime=Regime(token_steps=steps))
    draws = torch.cat([DRAWS[SIZE * i : SIZE * (i + 1)] for i in prompts])
    draws = draws[:, : sampling.max_completion_length]
    draws = None if greedy else draws
    if regime == "turns":  # each row has a prompt of its own
        rows = [PROMPTS[i] for i in prompts for _ in range(SIZE)]
        one_each = replace(sampling, num_generations=1)
        return replace(engine, histories=Histories(2**30)).turn(
            range(len(rows)), rows, one_each, draws
        )
    rollout = engine.generate([PROMPTS[i] for i in prompts], sampling, draws)
    assert regime != "fixed" or len(steps)
    index = torch.arange(len(prompts)).repeat_interleave(sampling.group_size)
    assert torch.equal(rollout.prompt_index, index)
    rows = zip(rollout.prompt_ids, rollout.prompt_mask, strict=True)
    read = [ids[mask].tolist() for ids, mask in rows]
    assert read == [PROMPTS[prompts[i]] for i in index]
    return rollout


def assert_same(actual, expected, rows=slice(None)):
    """The same tokens, and the same numbers up to rounding."""
    width = expected.mask[rows].any(dim=0).sum()
    assert torch.equal(actual.mask[:, :width], expected.mask[rows][:, :width])
    assert not actual.mask[:, width:].any()
    on = actual.mask[:, :width]
    ids = [rollout.completion_ids for rollout in (actual, expected)]
    assert torch.equal(ids[0][:, :width][on], ids[1][rows][:, :width][on])
    for name in NUMBERS:
        a, b = getattr(actual, name), getattr(expected, name)
        assert (a is None) == (b is None)
        if b is not None:
            assert_close(a[:, :width], b[rows][:, :width], atol=5e-6, rtol=1e-5)


@pytest.fixture(params=[1, 8])
def look_every(request, monkeypatch):
    """The host looks after each token, or after eight, as with a device."""
    monkeypatch.setitem(decoding.LOOK_EVERY, "cpu", request.param)


FAMILIES = ["llama", "qwen3", "gpt2", "gemma3", "llama with LoRA", "mixtral", "deepseek_v3"]


@pytest.mark.parametrize(
    ("family", "look_every"),
    [
        ("llama", 1),
        *((family, 8) for family in FAMILIES[:5]),
        *(pytest.param(family, 8, marks=pytest.mark.slow) for family in FAMILIES[5:]),
    ],
    indirect=["look_every"],
)
def test_fixed_memory_samples_the_tokens_of_the_plain_way(family, look_every):
    policy = some_policy(family)
    expected = generated(policy)
    assert len(set(expected.mask.sum(dim=1).tolist())) > 3  # rows leave, and buckets change
    assert_same(generated(policy, regime="fixed"), expected)
    assert_same(
        generated(policy, regime="fixed", greedy=True, sampling=replace(KEPT, num_generations=0)),
        generated(policy, greedy=True, sampling=replace(KEPT, num_generations=0)),
    )


@pytest.mark.parametrize(
    ("family", "regime"),
    [*(("llama", regime) for regime in REGIMES), ("gpt2", "plain")],
)
def test_no_company_order_or_padding_changes_a_row(family, regime, look_every):
    policy = some_policy(family)
    expected = generated(policy)
    for order in ((0, 1, 2) * 4, (2, 0, 1), (1,), (2, 1)):  # 36 rows take a bucket of 64
        rows = torch.cat([torch.arange(SIZE * i, SIZE * (i + 1)) for i in order])
        assert_same(generated(policy, order, regime=regime), expected, rows)
    shorter = generated(policy, sampling=replace(KEPT, max_completion_length=5), regime=regime)
    assert torch.equal(shorter.completion_ids, expected.completion_ids[:, :5])


@pytest.mark.parametrize("distribution", [{"temperature": 0.7, "top_k": 9}, {"top_p": 0.8}])
def test_the_distribution_and_stop_strings_are_those_of_the_plain_way(distribution, look_every):
    policy = some_policy("llama", vocabulary=96)
    policy.stops = StopStrings(policy.tokenizer, ("e", " t"))
    sampling = replace(KEPT, **distribution)
    expected = generated(policy, sampling=sampling)
    assert not torch.equal(expected.mask, generated(replace(policy, stops=None)).mask)
    assert_same(generated(policy, sampling=sampling, regime="fixed"), expected)


def test_a_bucket_serves_all_batches_of_its_size_and_reads_new_weights():
    policy = some_policy("llama")
    steps = TokenSteps()
    generated(policy, (0, 1), steps=steps)
    buckets = len(steps)
    vector = parameters_to_vector(policy.model.parameters()).detach()
    with torch.no_grad():
        for p in policy.model.parameters():
            p.mul_(1.5)  # in place, as an optimiser does
    assert_same(generated(policy, (1, 2), steps=steps), generated(policy, (1, 2)))
    assert buckets <= len(steps) <= 4
    vector_to_parameters(vector, policy.model.parameters())  # at other addresses
    assert_same(generated(policy, (0, 1), steps=steps), generated(policy, (0, 1)))
    assert len(steps) > buckets


def test_memory_is_bounded():
    policy, steps = some_policy("llama"), TokenSteps()
    expected = generated(policy, steps=steps)
    largest = max(bucket.nbytes for bucket in steps._buckets.values())
    for limit in (0, largest):
        few = TokenSteps(limit=limit)
        assert_same(generated(policy, steps=few), expected)
        assert sum(bucket.nbytes for bucket in few._buckets.values()) <= limit
        assert bool(len(few)) == (limit > 0) and len(few) < len(steps)


def tried(policy, regime=USUAL, **options):
    return check_token_steps(policy, regime, TokenSteps(), **options)


def test_a_model_for_which_it_is_wrong_goes_the_plain_way(monkeypatch):
    policy = some_policy("llama")
    assert tried(policy, hidden=True) == ""
    assert "too many values" in tried(some_policy("bloom"))  # a mask of its own kind
    for family in ("mistral", "qwen3_5", "mamba"):
        assert "does not keep all tokens" in tried(some_policy(family))
    assert "only handed back" in tried(policy, Regime(plain_cache=True))

    update = Memory.update

    def late(layer, keys, values, *_, **__):
        """Writes the keys of the next token one column too far."""
        if layer.column is None:
            return update(layer, keys, values)
        for whole, x in zip(layer.whole, (keys, values), strict=True):
            whole.index_copy_(2, layer.column + 1, x)
        return layer.keys, layer.values

    monkeypatch.setattr(Memory, "update", late)
    assert "off by" in tried(policy)


def test_a_step_that_draws_with_other_numbers_is_noticed(monkeypatch):
    begin = Batch.begin

    def other(batch, uniforms):
        begin(batch, uniforms if batch.column is None else uniforms * 0.9)

    monkeypatch.setattr(Batch, "begin", other)
    assert "other tokens" in tried(some_policy("llama"))


def test_episodes_keep_what_was_read_in_fixed_memory_too(look_every):
    policy = replace(make_policy(max_position_embeddings=256), eos_ids=ENDS)
    turns, steps = checked_generator(policy, Guess), TokenSteps()
    expected = played(policy, generator=turns)
    fixed = replace(turns, regime=replace(turns.regime, token_steps=steps))
    rollout = played(policy, generator=fixed)
    assert turns.regime.keeps_turns and len(steps) and rollout.turns.max() == 2
    assert torch.equal(rollout.completion_ids, expected.completion_ids)
    assert_close(rollout.logprobs, expected.logprobs, atol=3e-5, rtol=0)


def trained(folder, **options):
    sizes = {"max_steps": 2, "num_generations": 4, "prompts_per_step": 3, "eval_size": 2}
    task = {"task": "sort_digits", "model": "tiny", "estimator": "ppo", "seed": 3}
    run = train(**task, **sizes, output_dir=folder, **options)
    return parameters_to_vector(run.policy.trainable_parameters())


def test_a_run_takes_it_where_it_is_asked_to_and_says_so(tmp_path, monkeypatch, capsys):
    weights = trained(tmp_path / "plain", capture="auto")
    assert "not captured (not below 1 B" in capsys.readouterr().out
    monkeypatch.setattr(forward, "CAPTURING", ("cpu",))
    steps = TokenSteps()
    monkeypatch.setattr(forward, "TokenSteps", lambda: steps)
    others = trained(tmp_path / "fixed", capture="auto")
    assert len(steps) > 1 and "captured, with buffers" in capsys.readouterr().out
    assert_close(weights, others, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["gpt2", "opt"])
@pytest.mark.parametrize("look_every", [8], indirect=True)
def test_rows_that_no_completion_uses_stay_within_the_table_of_positions(family, look_every):
    """9 rows take a bucket of 16, and smaller ones as they end; a table of 128 positions serves 9 rollouts."""
    policy, steps = some_policy(family), TokenSteps()
    first = generated(policy, steps=steps)
    for _ in range(8):
        assert_same(generated(policy, steps=steps), first)
    positions = [int(bucket.position.max()) for bucket in steps._buckets.values()]
    assert len(positions) > 1 and max(positions) < len(PROMPTS[0]) + LENGTH
