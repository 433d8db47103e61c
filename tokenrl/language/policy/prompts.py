"""Puts prompts into the form in which a model is asked: system prompt, chat messages, chat template."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from functools import partial
from os.path import commonprefix
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from tokenrl.errors import Refused, describe
from tokenrl.language.policy.arguments import WRITTEN, PromptArguments
from tokenrl.language.policy.stops import decoded
from tokenrl.settings import shown

Message = Mapping[str, Any]
Prompt = str | list[dict[str, Any]]

OURS = (
    "messages",
    "tools",
    "add_generation_prompt",
    "continue_final_message",
    "tokenize",
)
"""Arguments of a chat template that are given by this module, and so by nobody else."""

TAIL = 16
"""Preceding tokens decoded with a text, to check that it reads as written."""
ENCODED_TWICE = re.compile(r'"\{\s*(\\|\})')
"""How the JSON of an object begins that was encoded again, as text."""
BEGUN = 200
"""The most characters at the end of a text with which the next one can begin again."""
ANCHORS = ("\n", ".", "=", "a")
"""Texts behind which another is encoded; one of them does not merge with its beginning."""

CUT = "truncate_prompts (--truncate-prompts), which drops tokens from the left, leave it out"
"""What helps against a prompt of the policy that is too long."""


def checked_form(tokenizer: Any, form: PromptArguments, name: str) -> PromptArguments:
    """Return the form in which a model is asked, and refuse one in which it cannot be asked.

    If the chat template reads the clock and the form has no time, it gets the present one, to the hour.

    Args:
        tokenizer: the model's tokenizer.
        form: how the model is to be asked.
        name: what the message calls the model.

    Raises:
        Refused: there is no chat template, it does not know one of the variables, or it refuses or leaves out
            a message of the system.
    """
    template = str(getattr(tokenizer, "chat_template", None))
    if "strftime_now" in template and not form.chat_time:
        form = replace(form, chat_time=datetime.now().isoformat(timespec="hours"))
    variables = form.variables
    words = re.findall(r"\w+", template)  # of all named templates
    for variable in variables:
        if variable in OURS or variable not in words:
            raise Refused(
                f"chat_template_kwargs sets {variable!r}, which the chat template of {name!r} never reads, or "
                "which each prompt sets itself: leave it out."
            )
    if form.system_prompt:
        question = [{"role": "user", "content": "?"}]
        whole = formed(question, form)
        if render(tokenizer, whole, form, name) == render(tokenizer, question, form, name):
            raise Refused(
                f"The chat template of {name!r} leaves out messages of the system: write the system_prompt "
                "into the prompts, as with a prompt_template."
            )
    return form


def formed(prompt: Prompt, form: PromptArguments) -> Prompt:
    """Return a prompt in the form in which the model is asked, text or chat messages.

    Raises:
        Refused: the form has a system prompt or variables of the template and the prompt is text, or the
            prompt already has a message of the system.
    """
    if isinstance(prompt, str) and form.chat:
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(prompt, str):
        setting = "system_prompt" if form.system_prompt else "chat_template_kwargs"
        if form.system_prompt or (form.chat_template_kwargs and form.variables):
            raise Refused(
                f"{setting} is for chat messages, but a prompt is text: {prompt!r:.60}. Add chat (--chat) "
                "to send text as a message of the user, or write the words into the prompts."
            )
    elif form.system_prompt:
        if prompt and prompt[0].get("role") == "system":
            raise Refused(
                "A prompt already begins with a message of the system, "
                f"{prompt[0].get('content')!r:.60}: leave it out, or system_prompt."
            )
        return [{"role": "system", "content": form.system_prompt}, *prompt]
    return prompt


def render(
    tokenizer: Any,
    messages: Any,
    form: PromptArguments,
    name: str,
    tools: Any = (),
    **options: Any,
) -> str:
    """Return messages as the chat template writes them, at the time of the form.

    The tools are functions, or what a column `tools` of the data holds (see `read_tools`).

    Arguments of calls of tools may be the JSON of an object, as OpenAI has them; empty text is that of an empty
    object. The template gets them as objects where it would encode the text again, or fails on it.

    Raises:
        Refused: there is no template, it fails on the messages, it never reads tools and there are some, or
            they are no tools, or the arguments of a call are no object.
    """
    from transformers.utils import chat_template_utils

    if not getattr(tokenizer, "chat_template", None):
        raise Refused(
            f"The prompts are chat messages, but the tokenizer of {name!r} has no chat template: give plain "
            "text without chat (--chat), or set tokenizer.chat_template."
        )
    tools = read_tools(tools)
    if tools and not re.search(r"\btools\b", str(tokenizer.chat_template)):
        raise Refused(
            f"The chat template of {name!r} never reads tools, so the model would not see them: save a "
            "tokenizer.chat_template that does with it, take another model or an environment without tools, or "
            "leave the column tools out of the data."
        )
    options |= {"tokenize": False, "tools": tools or None, **form.variables}
    clock: Any = datetime
    if form.chat_time:
        clock = SimpleNamespace(now=partial(datetime.fromisoformat, form.chat_time))

    def write(turns: Any) -> str:
        with patch.object(chat_template_utils, "datetime", clock):
            text = tokenizer.apply_chat_template(turns, **options)
        text.encode()  # fails for what is no text, and for half of a surrogate pair
        return str(text)

    try:
        messages = _with_arguments(messages, lambda value: "{}" if value == "" else value)
        objects = _with_arguments(messages, _object)
        try:
            text = write(messages)
        except Exception:
            return write(objects)
        return write(objects) if ENCODED_TWICE.search(text) else text
    except Refused:
        raise
    except Exception as error:  # a template is a program
        roles = ", ".join(str(message.get("role")) for message in messages)
        raise Refused(
            f"The chat template of {name!r} refuses messages of these roles: {roles} ({describe(error)}). "
            "Give prompts as the template takes them, the system's words too, or set "
            "tokenizer.chat_template to another template."
        ) from error


def read_tools(tools: Any) -> list[Any]:
    """Return the tools that a chat template describes to the model.

    Args:
        tools: a sequence of functions with type hints and docstrings, or of JSON schemas; or the JSON of
            such a list or of its items, as data sets store them; None for no tools.

    Raises:
        Refused: it is something else.
    """
    try:
        parts = json.loads(tools or "null") if isinstance(tools, str) else tools
        read = [json.loads(part) if isinstance(part, str) else part for part in parts or ()]
    except (TypeError, ValueError):  # no list, or no JSON
        read = [None]
    if not all(isinstance(part, Mapping) or callable(part) for part in read):
        raise Refused(
            f"The column tools holds {shown(tools)}; for chat messages it must be a list of JSON schemas of "
            "functions, its JSON, or None. Give a column that holds something else another name."
        )
    return read


def _with_arguments(messages: Sequence[Any], read: Callable[[Any], Any]) -> list[Any]:
    """Return messages with the arguments of calls as a function reads them."""
    turns = copy.deepcopy([*messages])
    for turn in turns:
        for call in turn.get("tool_calls") or ():
            function = call.get("function", call)
            function["arguments"] = read(function.get("arguments"))
    return turns


def _object(arguments: Any) -> Any:
    """Return the arguments of a call as an object, of which they may be the JSON.

    Raises:
        Refused: they are none.
    """
    value = arguments
    if isinstance(value, str):
        with suppress(ValueError):
            value = json.loads(value)
    if not isinstance(value, Mapping):
        raise Refused(
            f"A call of a tool has the arguments {shown(arguments)}: they must be an object, such as "
            '{"city": "Bern"}, or its JSON.'
        )
    return value


def completion_text(
    policy: Any, prompt: Prompt, message: Message, tools: Any = ()
) -> tuple[str, str]:
    """Return what a policy writes after a prompt, for the turn to be this message of the assistant.

    Calls of tools, and thoughts apart from the content, are as the chat template writes them, without the end
    of the turn. A tag such as `<think>` with which the generation prompt ends is not written again.

    Returns:
        White space that the template writes in front, and the text.

    Raises:
        Refused: the template does not write the turn behind the prompt.
    """
    prompt = formed(prompt, policy.form)
    opening = whole = ""
    if not isinstance(prompt, str) and prompt[-1]["role"] != "assistant":
        opening = policy.write(prompt, tools, add_generation_prompt=True)
        whole = policy.write([*prompt, message], tools)
    answer = whole[len(opening) :] if whole.startswith(opening) else ""
    if message.keys() & WRITTEN:
        if not answer:
            raise Refused(
                f"A completion calls tools or has thoughts, and the chat template of {policy.source!r} cannot "
                f"write it after the prompt {prompt!r:.60}: give chat messages, or the completion as text that "
                "the model is to write."
            )
        return "", answer.rstrip().removesuffix(_turn_end(policy, prompt, answer, tools))
    text = str(message["content"])
    bare = opening.rstrip()
    words = answer.lstrip()
    size = _shared(bare, text.lstrip())
    if size and text.lstrip()[0] in "<[" and not words.startswith(text.strip()):
        text = text.lstrip()[size:].removeprefix(opening[len(bare) :])
    return answer[: len(answer) - len(words)], text


def _shared(before: str, after: str) -> int:
    """Return the most characters at the end of a text with which another begins."""
    sizes = range(min(len(before), BEGUN), 0, -1)
    return next((size for size in sizes if before.endswith(after[:size])), 0)


def _turn_end(policy: Any, prompt: Sequence[Any], text: str, tools: Any) -> str:
    """Return what a template writes at the end of a turn of the assistant: its EOS, or what ends other turns too.

    Args:
        policy: knows the ends of completions.
        prompt: the messages before the turn.
        text: what the template writes, up to the end of the turn.
        tools: what the template describes.
    """
    ends = decoded(policy.tokenizer, [[i] for i in policy.ends], skip_special_tokens=False)
    end = max(ends, key=text.rfind, default="")
    if end.strip() and end in text:
        return end
    answered = policy.write([*prompt, {"role": "assistant", "content": "."}], tools)
    return commonprefix([text[::-1], answered[::-1]])[::-1].rstrip()  # noqa: RUF071


def reply_ids(
    policy: Any,
    messages: Sequence[Message],
    tools: Any = (),
    before: Sequence[int] = (),
) -> list[int]:
    """Return the ids that a chat template writes from the end of an assistant's turn to its next turn.

    They are read off a dummy conversation, without tokenising the episode again. The first id is the EOS that
    ends the turn before, if the template writes one.

    Args:
        policy: the policy.
        messages: the messages between the turns.
        tools: what the template describes.
        before: the ids that are followed. Text at their end with which the reply begins is not written again.

    Raises:
        Refused: the template writes earlier messages differently once others follow them.
    """
    answer: dict[str, Any] = {"role": "assistant", "content": "?"}
    if messages[0]["role"] == "tool":
        call = {"name": messages[0]["name"], "arguments": {}}
        answer |= {"content": "", "tool_calls": [{"type": "function", "function": call}]}
    dummy = [{"role": "user", "content": "?"}, answer]
    opening = policy.write(dummy[:1], tools)
    first = policy.write(dummy, tools)
    whole = policy.write([*dummy, *messages], tools, add_generation_prompt=True)
    end = _turn_end(policy, dummy[:1], first, tools)
    start = len(first.rstrip())
    is_kept = whole.startswith(first)
    if end:
        # Some templates drop the thoughts of every turn but the last, so ends of turns are counted.
        start = len(end.join(whole.split(end)[: first.count(end)]))
        is_kept = (
            whole.startswith(opening) and first.rstrip().endswith(end) and end in whole[start:]
        )
    if not (is_kept and first.startswith(opening)):
        raise Refused(
            f"The chat template of {policy.source!r} writes earlier messages otherwise once others follow "
            "them, so an episode of several turns cannot be continued token by token: give the tokenizer a "
            "chat_template that leaves them as they are."
        )
    tail = decoded(policy.tokenizer, [before[-TAIL:]], skip_special_tokens=False)[0]
    start += _shared(tail, whole[start:])
    head, ids = (
        policy.tokenizer(text, add_special_tokens=False).input_ids
        for text in (whole[:start], whole)
    )
    if ids[: len(head)] == head:
        return list(ids[len(head) :])
    return following_ids(policy, before, whole[start:]) or []


def text_ids(tokenizer: Any, text: str, **options: Any) -> list[int]:
    """Return the ids of a text with those that the tokenizer adds, but no second BOS if it begins with one."""
    ids = list(tokenizer(text, **options).input_ids)
    return ids[1:] if ids[:2] == [tokenizer.bos_token_id] * 2 else ids


def following_ids(
    policy: Any, before: Sequence[int], text: str, space: str = ""
) -> list[int] | None:
    """Return the ids of a text that follows other tokens, so that all of them together read as written.

    Many tokenizers put a space in front of a text that they are given alone, as most of sentencepiece do: "7"
    after "3+4=" would then be read as "3+4= 7". Such a text is encoded behind another one instead.

    Args:
        policy: gives the tokenizer.
        before: the ids that the text follows.
        text: the text.
        space: white space that may stand in front, as a chat template writes it.

    Returns:
        The ids; None if there are none that read so, though the tokenizer can write such a text.
    """
    tokenizer = policy.tokenizer
    tail = list(before[-TAIL:])

    def read(ids: list[int]) -> str:
        return decoded(tokenizer, [ids], skip_special_tokens=False)[0]

    def ids_of(words: str) -> list[int]:
        return list(tokenizer(words, add_special_tokens=False).input_ids)

    alone = ids_of(text)
    start = read(tail)
    is_first = set(before) <= set(tokenizer.all_special_ids)
    if is_first or read(tail + alone) == start + text:
        return alone
    text = space + text
    right = (start + text, read(ids_of(start + text)))  # the second as the tokenizer can write it
    for anchor in ("", start, *ANCHORS):
        head = ids_of(anchor)
        whole = ids_of(anchor + text)
        ids = whole[len(head) :]
        if whole[: len(head)] == head and read(tail + ids) in right:
            return ids
    words = start + text
    return None if read(ids_of(words)).strip() == words.strip() else alone
