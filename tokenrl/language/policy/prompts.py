"""Puts prompts into the form in which a model is asked: system prompt, chat messages, chat template."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from functools import partial
from typing import Any

from tokenrl.errors import Refused, describe, with_places
from tokenrl.language.policy.arguments import PromptArguments
from tokenrl.language.policy.stops import decoded, special_tokens

Prompt = str | list[dict[str, Any]]

CLOCK = (
    "{%- macro strftime_now(format) -%}{%- set text = namespace(text=format) -%}"
    "{%- for part in time_parts -%}{%- set text.text = text.text.replace(part, time_parts[part]) -%}"
    "{%- endfor -%}{{ text.text }}{%- endmacro %}{{ '' }}"
)
"""Put before a chat template it hides the clock that transformers gives to templates under this name."""
DIRECTIVES = "-d -H -I -j -m -M -S -y a A b B c d H I j m M p S U w W x X y Y"
"""Directives of `strftime`; a minus leaves out the zeros in front."""
OURS = (
    "messages",
    "tools",
    "add_generation_prompt",
    "continue_final_message",
    "tokenize",
    "return_dict",
)
"""Arguments of a chat template that are given by this module, and so by nobody else."""

TAIL = 16
"""Tokens before a text that are looked at to see how it reads behind them."""
ANCHORS = ("\n", ".", "=", "a")
"""Texts behind which another is encoded; one of them does not merge with its beginning."""


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
    if not (form.chat or variables or form.system_prompt):
        return form
    _check_template(tokenizer, name)
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
        if form.system_prompt or form.variables:
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
    tools: Sequence[Any] = (),
    **options: Any,
) -> Any:
    """Return messages as the chat template writes them, as text, or with the option tokenize as token ids.

    Raises:
        Refused: there is no template, it refuses the messages, or it never reads tools and there are some.
    """
    from jinja2 import TemplateError

    _check_template(tokenizer, name)
    if tools and not re.search(r"\btools\b", str(tokenizer.chat_template)):
        raise Refused(
            f"The chat template of {name!r} never reads tools, so the policy would not see them: save a "
            "tokenizer.chat_template that does with it, or take another model or an environment without tools."
        )
    variables: dict[str, Any] = {
        "tokenize": False,
        "return_dict": False,
        "tools": list(tools) or None,
    }
    variables |= options | form.variables
    try:
        if form.chat_time:
            variables["chat_template"] = CLOCK + tokenizer.get_chat_template(
                tools=variables["tools"]
            )
            time = datetime.fromisoformat(form.chat_time)
            variables["time_parts"] = {f"%{d}": time.strftime(f"%{d}") for d in DIRECTIVES.split()}
        return tokenizer.apply_chat_template(messages, **variables)
    except (TemplateError, ValueError) as error:
        roles = ", ".join(str(message.get("role")) for message in messages)
        raise Refused(
            f"The chat template of {name!r} refuses messages of these roles: {roles} ({describe(error)}). "
            "Give prompts as the template takes them, the system's words too, or set "
            "tokenizer.chat_template to another template."
        ) from error


def written_turn(
    policy: Any, prompt: Prompt, message: Mapping[str, Any], tools: Sequence[Any] = ()
) -> str:
    """Return a turn of the assistant as the template writes it after a prompt, without its EOS, or refuse it."""
    prompt = formed(prompt, policy.form)
    write: Any = partial(render, policy.tokenizer, form=policy.form, name=policy.source)
    opening = whole = ""
    if not isinstance(prompt, str):
        opening = write(prompt, tools=tools, add_generation_prompt=True)
        whole = write([*prompt, message], tools=tools)
    if not (opening and whole.startswith(opening)):
        raise Refused(
            f"A completion calls tools, and the chat template of {policy.source!r} cannot write it after the "
            f"prompt {prompt!r:.60}: give chat messages, or the completion as text that the model is to write."
        )
    return _ends(policy).split(whole[len(opening) :])[0]


def _ends(policy: Any) -> re.Pattern[str]:
    names = policy.tokenizer.convert_ids_to_tokens(policy.eos_ids)
    return re.compile("|".join(map(re.escape, names)) or "(?!)")


def reply_ids(
    policy: Any, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] = ()
) -> list[int]:
    """Return the ids that a chat template writes from the end of an assistant's turn to its next turn.

    They are read off a dummy conversation, without tokenising the episode again. The first id is the EOS that
    ends the turn before, if the template writes one.

    Raises:
        Refused: the template writes earlier messages differently once others follow them.
    """
    answer: dict[str, Any] = {"role": "assistant", "content": "?"}
    if messages[0]["role"] == "tool":
        call = {"name": messages[0]["name"], "arguments": {}}
        answer |= {"content": "", "tool_calls": [{"type": "function", "function": call}]}
    dummy = [{"role": "user", "content": "?"}, answer]
    write: Any = partial(
        render, policy.tokenizer, form=policy.form, name=policy.source, tools=tools
    )
    opening = write(dummy[:1])
    before = write(dummy)
    whole = write([*dummy, *messages], add_generation_prompt=True)
    end = _ends(policy)
    start = len(before)
    is_kept = whole.startswith(before)
    if ends := end.findall(before):
        # Some templates drop the thoughts of every turn but the last, so ends of turns are counted.
        starts = [match.start() for match in end.finditer(whole)]
        start = next(iter(starts[len(ends) - 1 :]), len(whole))
        is_kept = whole.startswith(opening) and not end.split(before)[-1].strip()
    head, ids = (
        policy.tokenizer(text, add_special_tokens=False).input_ids
        for text in (whole[:start], whole)
    )
    if not (is_kept and before.startswith(opening) and ids[: len(head)] == head):
        raise Refused(
            f"The chat template of {policy.source!r} writes earlier messages otherwise once others follow "
            "them, so an episode of several turns cannot be continued token by token: give the tokenizer a "
            "chat_template that leaves them as they are."
        )
    return list(ids[len(head) :])


def following_ids(
    policy: Any, before: Sequence[int], text: str, prompt: Prompt = ""
) -> list[int] | None:
    """Return the ids of a text that follows other tokens, so that all of them together read as written.

    Many tokenizers put a space in front of a text that they are given alone, as most of sentencepiece do: "7"
    after "3+4=" would then be read as "3+4= 7". Such a text is encoded behind another one instead.

    Args:
        policy: gives the tokenizer.
        before: the ids that the text follows.
        text: the text.
        prompt: what `before` was made of, if that is a prompt. In front of the answer to chat messages the
            template may itself write a space.

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
    text = _space_before(policy, prompt, text) + text
    right = (start + text, read(ids_of(start + text)))  # the second as the tokenizer can write it
    for anchor in ("", start, *ANCHORS):
        head = ids_of(anchor)
        whole = ids_of(anchor + text)
        ids = whole[len(head) :]
        if whole[: len(head)] == head and read(tail + ids) in right:
            return ids
    words = (prompt if isinstance(prompt, str) and prompt else start) + text
    return None if read(ids_of(words)).strip() == words.strip() else alone


def _space_before(policy: Any, prompt: Prompt, text: str) -> str:
    """Return the white space that the chat template writes between a prompt and its answer."""
    prompt = formed(prompt, policy.form)
    if isinstance(prompt, str) or prompt[-1]["role"] == "assistant":
        return ""
    written = partial(render, policy.tokenizer, form=policy.form, name=policy.source)
    opening = written(prompt, add_generation_prompt=True)
    whole = written([*prompt, {"role": "assistant", "content": text}])
    answer = whole[len(opening) :]
    return re.match(r"\s*", answer)[0] if whole.startswith(opening) else ""  # type: ignore[index]


def _check_template(tokenizer: Any, name: str) -> None:
    if not getattr(tokenizer, "chat_template", None):
        raise Refused(
            f"The prompts are chat messages, but the tokenizer of {name!r} has no chat template: give plain "
            "text without chat (--chat), or set tokenizer.chat_template."
        )


def special_texts(tokenizer: Any, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a warning if a prompt contains the text of a special token, else an empty list.

    The tokenizer reads such text as the token itself: an `<eos>` in a prompt ends it for the model. Special
    tokens that a chat template writes around messages are not meant.

    Args:
        tokenizer: the model's tokenizer.
        rows: rows with a `prompt`, text or chat messages, as the user wrote them.
    """
    if getattr(tokenizer, "split_special_tokens", False):
        return []
    names = sorted(special_tokens(tokenizer).values(), key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, names)) or "(?!)")
    for location, row in with_places(rows):
        prompt = row["prompt"]
        text = (
            prompt if isinstance(prompt, str) else " ".join(str(turn["content"]) for turn in prompt)
        )
        if match := pattern.search(text):
            return [
                f'The prompt of {location} contains "{match[0]}", which the tokenizer reads as a special '
                "token. If it is meant as text, write it differently, as with a space inside."
            ]
    return []
