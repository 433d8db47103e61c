"""The tiny models and tokenizers of the toy tasks: exact, reproducible, and plain transformers."""

from __future__ import annotations

import pytest
from test_toy_tasks import LOADED as TASKS

import toy_tasks
from toy_tasks import models

of_text = pytest.mark.parametrize(
    "name", [name for name in toy_tasks.NAMES if name != "calculator"]
)


@pytest.fixture(scope="module")
def built():
    return {name: task.build(0) for name, task in TASKS.items()}


@of_text
def test_every_prompt_and_demonstration_survives_the_tokenizer(name, built):
    task, (_, tokenizer) = TASKS[name], built[name]
    demonstrations = task.demonstrations or [{"prompt": "abc>", "completion": "aei"}]
    prompts = [row["prompt"] for row in task.train_prompts + task.eval_prompts]
    completions = [row["completion"] for row in demonstrations]
    special = tokenizer.convert_tokens_to_ids([models.UNKNOWN, models.EOS])
    for texts, longest in (
        (prompts, task.build.context - task.max_completion_length),
        (completions, task.max_completion_length - 1),
    ):
        ids = tokenizer(texts)["input_ids"]
        assert tokenizer.batch_decode(ids) == texts and max(map(len, ids)) <= longest
        assert not {*special} & {token for row in ids for token in row}
    for row in demonstrations[:200]:  # the parts' tokens are those of the whole
        texts = [row["prompt"], row["completion"], row["prompt"] + row["completion"]]
        prompt, completion, whole = tokenizer(texts)["input_ids"]
        assert whole == prompt + completion


@pytest.mark.parametrize("name", ["sort_digits", "sentiment", "calculator"])
def test_model_and_tokenizer_load_in_plain_transformers(name, built, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = built[name]
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    reader = AutoTokenizer.from_pretrained(tmp_path)
    prompt = (TASKS[name].demonstrations or TASKS[name].eval_prompts)[0]["prompt"]
    prompt = prompt if isinstance(prompt, str) else prompt[0]["content"]
    ids = reader(prompt, return_tensors="pt")["input_ids"]
    assert ids[0].tolist() == tokenizer(prompt)["input_ids"] and reader.decode(ids[0]) == prompt
    assert reader.chat_template == tokenizer.chat_template
    eos, unknown = tokenizer.convert_tokens_to_ids([models.EOS, models.UNKNOWN])
    assert tokenizer("€")["input_ids"] == [unknown] != [eos]
    for settings in (tokenizer, reader, loaded.generation_config, loaded.config):
        assert (settings.eos_token_id, settings.pad_token_id) == (eos, eos)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
