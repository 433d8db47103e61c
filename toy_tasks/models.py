"""Makes tiny causal language models and their tokenizers, without any download.

The model of a task is a randomly initialised Llama of about half a million parameters. At this size a
training step takes well under a tenth of a second on a laptop CPU. The tokenizer is exact: decoding returns
the very text that was encoded, because a reward that compares strings must not see spaces that nobody wrote.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

EOS, UNKNOWN = "<eos>", "<unk>"
CHARACTER = r"[\s\S]"
WORD = (
    r" ?[a-z]+|[\s\S]"  # the space belongs to the word after it, so prompt + completion is the text
)

LINES = "{% for message in messages %}{{ message['content'] + '\\n' }}{% endfor %}"
"""A chat template for messages alone."""
CALLS = """\
{#- The tools are not described: demonstrations show how they are called. -#}
{%- for message in messages -%}
{%- if message.role == "assistant" -%}
{%- for call in message.tool_calls or [] -%}
{{ '<tool_call>{"name": "' + call.function.name + '", "arguments": ' }}
{{- call.function.arguments | tojson }}}</tool_call>
{%- endfor -%}
{{ message.content }}<eos>
{%- else -%} {{ message.content }}> {%- endif -%}
{%- endfor -%}"""
READS_CALLS = {
    "start_anchor": ">",
    "defaults": {"role": "assistant"},
    "fields": {
        "content": {"close": EOS},
        "tool_calls": {
            "open": "<tool_call>",
            "close": "</tool_call>",
            "content": "json",
            "repeats": True,
            "transform": {"type": "function", "function": "{content}"},
        },
    },
}
"""A chat template for calls of tools, and how a tokenizer reads such a call."""


@dataclass(frozen=True)
class TinyModel:
    """The recipe of a tiny model and its tokenizer; calling it with a seed builds both.

    Attributes:
        tokens: The vocabulary without the special tokens, in the order of their ids.
        words: Whether `tokens` are words (each with the space before it) instead of single characters
            and whole strings.
        layers: Transformer layers.
        hidden: Width of the residual stream.
        heads: Attention heads; must divide `hidden`.
        context: The most tokens of a sequence, prompt and completion together.
    """

    tokens: tuple[str, ...]
    words: bool = False
    layers: int = 2
    hidden: int = 128
    heads: int = 4
    context: int = 64

    def __call__(self, seed: int) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
        """Return a freshly initialised model and its tokenizer; equal seeds give equal weights."""
        tokenizer = self.tokenizer()
        shape = {
            "layers": self.layers,
            "hidden": self.hidden,
            "heads": self.heads,
            "context": self.context,
        }
        return tiny_llama(tokenizer, **shape, seed=seed), tokenizer

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Return the tokenizer alone, by whose vocabulary a model of the task is recognised."""
        return word_tokenizer(self.tokens) if self.words else literal_tokenizer(self.tokens)


def model_for_rows(
    rows: Iterable[Mapping[str, Any]],
    seed: int = 0,
    *,
    texts: Iterable[str] = (),
    chat: bool = False,
    tools: bool = False,
    room: int = 1024,
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Return a new tiny model for any rows of data, and its tokenizer.

    Each character of the rows is a token, whatever the column, so that a completion can write all that is
    written there; lists and dicts, but for messages, count as JSON writes them too. The names of roles in chat
    messages do not count: for chats the tokenizer has a template that ends each message with a line break and
    leaves its role out.

    Args:
        rows: Rows with a `prompt`, of all that the model will be trained or evaluated on.
        seed: Seed of the initial weights, which otherwise depend on the number of characters alone.
        texts: What else prompts or completions hold, such as a system prompt.
        chat: Whether prompts that are text will be sent as chat messages too.
        tools: Whether the policy will call tools, which needs chats.
        room: The tokens of the context beside those of the longest row.
    """
    rows, further = list(rows), "".join(texts)
    is_chat = chat or any(isinstance(row.get("prompt"), list) for row in rows)
    further += "\n" * is_chat
    whole = [
        (_text(row) + _nested(row)).encode(errors="ignore").decode() for row in rows
    ]  # in UTF-8
    alphabet = tuple(sorted(set(further).union(*whole)))
    context = room + len(further) + max(map(len, whole))
    model, tokenizer = TinyModel(alphabet, context=context)(seed)
    tokenizer.chat_template = LINES if is_chat else None
    if tools:
        tokenizer.chat_template, tokenizer.response_template = CALLS, READS_CALLS
    return model, tokenizer


def _text(value: Any) -> str:
    """Return the texts in a row of data, one behind the other; numbers are written as text."""
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        value = [item for key, item in value.items() if key != "role"]
    if isinstance(value, list | tuple):
        return "".join(map(_text, value))
    return "" if value is None else str(value)


def _nested(row: Mapping[str, Any]) -> str:
    """Return the JSON of the lists and dicts in a row of data; of messages, that of the lists and dicts in them."""
    texts: list[str] = []
    for value in row.values():
        parts = value if isinstance(value, list) else []
        messages = [part for part in parts if isinstance(part, Mapping) and "role" in part]
        texts += map(_nested, messages)
        if isinstance(value, Mapping | list | tuple) and not messages:
            texts.append(json.dumps(value, ensure_ascii=False, skipkeys=True, default=str))
    return "".join(texts)


def character_tokenizer(alphabet: Iterable[str]) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token for each character of `alphabet`.

    A character outside the alphabet becomes `<unk>`, which decodes to the visible text `<unk>`. If it were a
    special token, a model could write it inside an answer and the decoded answer would still look right.

    Raises:
        ValueError: An entry is not exactly one character, or occurs twice.
    """
    alphabet = tuple(alphabet)
    wrong = [entry for entry in alphabet if len(entry) != 1]
    if wrong:
        raise ValueError(f"The alphabet holds {wrong!r}; each entry must be exactly one character.")
    return _tokenizer(alphabet, CHARACTER)


def word_tokenizer(words: Iterable[str]) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token for each of `words`.

    A text is cut into runs of lower-case letters, each with the one space before it, and single other
    characters. So `words` holds `"the"` for a sentence's first word, `" the"` for later ones, and `"."`.

    Raises:
        ValueError: The cutting rule can never produce one of the words, or a word occurs twice.
    """
    import re

    words = tuple(words)
    wrong = [word for word in words if not re.fullmatch(WORD, word)]
    if wrong:
        raise ValueError(
            f"The words {wrong!r} can never be tokens: a word is lower-case letters with at most one space "
            "before them, or one single character."
        )
    return _tokenizer(words, WORD)


def literal_tokenizer(tokens: Iterable[str]) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token for each of `tokens`, single characters or whole strings."""
    import re

    tokens = tuple(tokens)
    strings = [
        re.escape(token) for token in sorted(tokens, key=len, reverse=True) if len(token) > 1
    ]
    return _tokenizer(tokens, "|".join([*strings, CHARACTER]))


def _tokenizer(tokens: tuple[str, ...], pattern: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer that cuts a text by the regular expression `pattern` and looks each piece up."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate((EOS, UNKNOWN, *tokens))}
    if len(vocabulary) != len(tokens) + 2:
        raise ValueError(f"The vocabulary {tokens!r} holds a token twice; each must occur once.")
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        # Special tokens vanish from decoded text, so a policy could write a separate pad token into an answer
        # and the answer would still look right.
        pad_token=EOS,
        eos_token=EOS,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def tiny_llama(
    tokenizer: PreTrainedTokenizerFast,
    *,
    layers: int = 2,
    hidden: int = 128,
    heads: int = 4,
    context: int = 64,
    seed: int = 0,
) -> LlamaForCausalLM:
    """Return a Llama with random float32 weights; the defaults give about 0.53 million parameters.

    The weights depend on `seed` alone, and the global random state of torch is left as it was.

    Args:
        tokenizer: Gives the vocabulary size and the ids of the pad and end tokens.
        layers: Transformer layers.
        hidden: Width of the residual stream; the feed-forward layer is four times as wide.
        heads: Attention heads; must divide `hidden`.
        context: Longest sequence in tokens.
        seed: Seed of the initial weights.

    Raises:
        ValueError: `heads` does not divide `hidden`.
    """
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    if hidden % heads:
        raise ValueError(f"hidden={hidden} is not divisible by heads={heads}; choose a multiple.")
    special = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    special["pad_token_id"] = tokenizer.pad_token_id
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=context,
        tie_word_embeddings=False,
        **special,
    )
    # torch.manual_seed would also reseed the accelerators, which fork_rng(devices=[]) does not restore.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(**special)
    return model.float().eval()
