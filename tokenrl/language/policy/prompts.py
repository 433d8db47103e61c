"""Puts prompts into the form in which a model is asked: system prompt, chat messages, chat template."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from tokenrl.configuration import read_config
from tokenrl.errors import Refused, describe, with_places
from tokenrl.language.policy.arguments import PromptArguments
from tokenrl.language.policy.stops import decoded
from tokenrl.settings import arguments, lay

Prompt = str | list[dict[str, Any]]

FORM = tuple(field.name for field in fields(PromptArguments))
CLOCK = (
    "{%- macro strftime_now(format) -%}{%- set text = namespace(text=format) -%}"
    "{%- for part in time_parts -%}{%- set text.text = text.text.replace(part, time_parts[part]) -%}"
    "{%- endfor -%}{{ text.text }}{%- endmacro %}{{ '' }}"
)
"""Put before a chat template it hides the clock that transformers gives to templates under this name."""
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


def form_of(args: Any) -> PromptArguments:
    """Return the part of a command's arguments that says how prompts reach the model."""
    return PromptArguments(**{name: getattr(args, name) for name in FORM})


def run_of(model: Any) -> Path | None:
    """Return the directory of the run that saved a model; None where no run is known, as of a hub name.

    Args:
        model: a directory (of the run, of its `model/` or of a checkpoint), or anything else.
    """
    if isinstance(model, str | os.PathLike) and os.path.exists(model):
        path = Path(model).resolve()
        for run in (path, *path.parents[:2]):
            ours = run == path or path.relative_to(run).parts[0] in ("model", "checkpoints")
            if ours and (run / "metrics.jsonl").exists() and (run / "config.json").exists():
                return run
    return None


def saved_form(model: Any) -> dict[str, Any]:
    """Return how the run that saved a model asked it: the fields of `PromptArguments` that were set.

    Args:
        model: a directory as `run_of` takes it, or a `Policy`; for anything else nothing is known.
    """
    form: Any = getattr(model, "form", None)
    if (run := run_of(model)) is not None:
        config = read_config(run)
        form = arguments(PromptArguments, {name: config.get(name) for name in FORM})
    return {name: value for name, value in vars(form).items() if value} if form is not None else {}


def fill_form(args: Any, model: Any = None) -> Any:
    """Return settings in which the form of prompts, where it was left open, is as in the run of the model.

    Args:
        args: the arguments of a command.
        model: the model; None for `args.model`.
    """
    form = saved_form(args.model if model is None else model)
    return lay(("the model's run", form), ("given", vars(args))).values


def form_line(form: PromptArguments, model: Any = None) -> dict[str, str]:
    """Describe the form as a line of a header, {"asked": ...}; empty if prompts go as they stand.

    Args:
        form: how the model is asked.
        model: the model as it was named, to say where the form comes from if its run was asked so.
    """
    parts = ["each text as a message of the user"] if form.chat else []
    parts += [f"system prompt {form.system_prompt!r}"] if form.system_prompt else []
    parts += [f"chat template with {form.chat_template_kwargs}"] if _variables(form) else []
    parts += [f"chat template at {form.chat_time}"] if form.chat_time else []
    parts += [f"completions end at {' or '.join(map(repr, form.stop))}"] if form.stop else []
    inherited = parts and saved_form(model) == {
        name: value for name, value in vars(form).items() if value
    }
    return (
        {"asked": "; ".join(parts) + (f" (as the run of {model})" if inherited else "")}
        if parts
        else {}
    )


def print_form(form: PromptArguments, model: Any) -> None:
    """Print in one line on the standard error how the model is asked, unless prompts go as they stand."""
    for line in form_line(form, model).values():
        print(f"tokenrl: asked: {line}", file=sys.stderr)


def with_time(tokenizer: Any, form: PromptArguments) -> PromptArguments:
    """Return a form with the present time, to the hour, if the chat template reads the clock and has none."""
    if form.chat_time or "strftime_now" not in str(getattr(tokenizer, "chat_template", None)):
        return form
    return replace(form, chat_time=datetime.now().isoformat(timespec="hours"))


def time_parts(time: str) -> dict[str, str]:
    """Return what `strftime` makes of each of its directives, also without the zeros in front, as in %-d."""
    moment = datetime.fromisoformat(time)
    parts = {letter: moment.strftime(f"%{letter}") for letter in "aAbBcdHIjmMpSUwWxXyY"}
    bare = {f"%-{letter}": text.lstrip("0") or "0" for letter, text in parts.items()}
    return bare | {f"%{letter}": text for letter, text in parts.items()}


def check_form(tokenizer: Any, form: PromptArguments, name: str) -> None:
    """Refuse a form in which the model cannot be asked.

    Args:
        tokenizer: the model's tokenizer.
        form: how the model is to be asked.
        name: what the message calls the model.

    Raises:
        Refused: there is no chat template, it does not know one of the variables, or it refuses or leaves out
            a message of the system.
    """
    variables = _variables(form)
    if not (form.chat or variables or form.system_prompt):
        return
    _check_template(tokenizer, name)
    read = set(re.findall(r"\w+", str(tokenizer.chat_template))).difference(
        OURS
    )  # of all named templates
    if unread := [variable for variable in variables if variable not in read]:
        reason = (
            f"which the chat template of {name!r} never reads, or which each prompt sets itself"
        )
        raise Refused(f"chat_template_kwargs sets {unread[0]!r}, {reason}: leave it out.")
    question = [{"role": "user", "content": "?"}]
    if form.system_prompt:
        whole = [{"role": "system", "content": form.system_prompt}, *question]
        if render(tokenizer, whole, form, name) == render(tokenizer, question, form, name):
            raise Refused(
                f"The chat template of {name!r} leaves out messages of the system: write the system_prompt "
                "into the prompts, as with a prompt_template."
            )


def formed(prompt: Prompt, form: PromptArguments) -> Prompt:
    """Return a prompt in the form in which the model is asked, text or chat messages.

    Raises:
        Refused: the form has a system prompt or variables of the template and the prompt is text, or the
            prompt already has a message of the system.
    """
    if isinstance(prompt, str):
        if form.chat:
            prompt = [{"role": "user", "content": prompt}]
        elif form.system_prompt or _variables(form):
            setting = "system_prompt" if form.system_prompt else "chat_template_kwargs"
            raise Refused(
                f"{setting} is for chat messages, but a prompt is text: {prompt!r:.60}. Add chat (--chat) "
                "to send text as a message of the user, or write the words into the prompts."
            )
    if not isinstance(prompt, str) and form.system_prompt:
        if prompt and prompt[0].get("role") == "system":
            fault = f"A prompt already begins with a message of the system, {prompt[0].get('content')!r:.60}"
            raise Refused(f"{fault}: leave it out, or system_prompt.")
        prompt = [{"role": "system", "content": form.system_prompt}, *prompt]
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
        Refused: there is no template, it refuses them, or it never reads tools and there are some.
    """
    from jinja2 import TemplateError

    _check_template(tokenizer, name)
    shown = list(tools) or None
    try:
        template = str(tokenizer.get_chat_template(tools=shown))
    except ValueError as error:  # it has several, and none is named default
        problem = f"The tokenizer of {name!r} has several chat templates ({describe(error)})"
        raise Refused(f"{problem}: set tokenizer.chat_template to one of them.") from error
    if tools and not re.search(r"\btools\b", template):
        problem = (
            f"The chat template of {name!r} never reads tools, so the policy would not see them"
        )
        raise Refused(
            f"{problem}: take a model whose template does, or an environment without tools."
        )
    fixed: dict[str, Any] = {"tokenize": False, "return_dict": False, "tools": shown}
    if form.chat_time:
        fixed |= {"chat_template": CLOCK + template, "time_parts": time_parts(form.chat_time)}
    try:
        return tokenizer.apply_chat_template(messages, **(fixed | options | _variables(form)))
    except TemplateError as error:
        roles = ", ".join(str(message.get("role")) for message in messages)
        fault = f"The chat template of {name!r} refuses messages of these roles: {roles} ({describe(error)})"
        raise Refused(
            f"{fault}. Give prompts as the template takes them, the system's words too."
        ) from error
    except ValueError as error:
        if not options.get("continue_final_message"):
            raise
        fault = f"The chat template of {name!r} cuts the last message of a prompt, which the policy continues"
        end = messages[-1]["content"][-60:]
        raise Refused(
            f"{fault}: {end!r}. End the prompt otherwise, or with a message of the user."
        ) from error


def reply_ids(
    policy: Any, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] = ()
) -> list[int]:
    """Return the ids that a chat template writes from a turn of the assistant to its next one.

    They are taken from a conversation of two dummy turns, without tokenising the episode again. Where they
    start in it is checked once and remembered in `reply_starts` of the policy. The first id is the EOS that
    ends the turn before, if the template writes one.

    Raises:
        Refused: the template writes what is before or behind a turn otherwise once messages follow.
    """
    answer: dict[str, Any] = {"role": "assistant", "content": "?"}
    if messages[0]["role"] == "tool":
        call = {"name": messages[0]["name"], "arguments": {}}
        answer |= {"content": "", "tool_calls": [{"type": "function", "function": call}]}
    dummy = [{"role": "user", "content": "?"}, answer]
    form = {"form": policy.form, "name": policy.source, "tools": tools}
    ids_of: Any = partial(render, policy.tokenizer, **form, tokenize=True)
    whole, starts = ids_of([*dummy, *messages], add_generation_prompt=True), policy.reply_starts
    key = str((policy.form, answer, len(messages), [tool.__qualname__ for tool in tools]))
    if key not in starts:  # the ids before an answer depend on none of its words
        before = ids_of(dummy)
        longer = [{**turn, "content": turn["content"] + " and more"} for turn in messages]
        others = ids_of([*dummy, *longer], add_generation_prompt=True)
        ends, later = (
            [i for i, x in enumerate(ids) if x in policy.eos_ids] for ids in (before, whole)
        )
        head = start = len(before)
        tail: list[int] = []
        if ends:  # the turn itself may differ, as some templates drop the thoughts of all turns but the last
            head, tail = ([-1, *ends])[-2] + 1, before[ends[-1] :]
            start = next(iter(later[len(ends) - 1 :]), len(whole))  # where the dummy turn ends
        same = whole[:head] == before[:head] and whole[start : start + len(tail)] == tail
        same = same and whole[: start + 1] == others[: start + 1]
        if (
            not same or policy.tokenizer.decode(tail[1:]).strip()
        ):  # or EOS is before a turn, not behind it
            problem = f"The chat template of {policy.source!r} writes earlier messages otherwise once others"
            problem += (
                " follow them, so an episode of several turns cannot be continued token by token"
            )
            raise Refused(
                f"{problem}: give the tokenizer a chat_template that leaves them as they are."
            )
        starts[key] = start
    return whole[starts[key] :]


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
    tokenizer, tail = policy.tokenizer, [*before[-TAIL:]]

    def read(ids: list[int]) -> str:
        return decoded(tokenizer, [ids], skip_special_tokens=False)[0]

    def ids_of(words: str) -> list[int]:
        return list(tokenizer(words, add_special_tokens=False).input_ids)

    alone, start = ids_of(text), read(tail)
    begins = set(before) <= set(tokenizer.all_special_ids)
    if begins or read(tail + alone) == start + text:
        return alone
    text = _space_before(policy, prompt, text) + text
    right = {
        start + text,
        read(ids_of(start + text)),
    }  # as written, as far as the tokenizer can write it
    for anchor in ("", start, *ANCHORS):
        head, whole = ids_of(anchor), ids_of(anchor + text)
        ids = whole[len(head) :]
        if whole[: len(head)] == head and read(tail + ids) in right:
            return ids
    whole_text = prompt + text if prompt and isinstance(prompt, str) else start + text
    return alone if read(ids_of(whole_text)).strip() != whole_text.strip() else None


def _space_before(policy: Any, prompt: Prompt, text: str) -> str:
    """Return the white space that the chat template writes between a prompt and its answer."""
    prompt = formed(prompt, policy.form)
    if isinstance(prompt, str) or prompt[-1]["role"] == "assistant":
        return ""
    written = partial(render, policy.tokenizer, form=policy.form, name=policy.source)
    opening = written(prompt, add_generation_prompt=True)
    whole = written([*prompt, {"role": "assistant", "content": text}])
    answer = whole.removeprefix(opening)
    return answer[: len(answer) - len(answer.lstrip())] if whole.startswith(opening) else ""


def _variables(form: PromptArguments) -> dict[str, Any]:
    """Return the variables that the form gives to the chat template."""
    return dict(json.loads(form.chat_template_kwargs or "{}"))


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
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    names = {*tokenizer.all_special_tokens, *(token.content for token in added if token.special)}
    pattern = re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)")
    prompts = [row["prompt"] for row in rows]
    texts = [
        p if isinstance(p, str) else " ".join(str(turn["content"]) for turn in p) for p in prompts
    ]
    placed = zip(with_places(rows), texts, strict=True)
    matches = [
        (position, match[0]) for (position, _), text in placed if (match := pattern.search(text))
    ]
    if not matches or getattr(tokenizer, "split_special_tokens", False):
        return []
    further = f" (and {len(matches) - 1:,} more rows contain one)" if len(matches) > 1 else ""
    return [
        f'The prompt of {matches[0][0]} contains "{matches[0][1]}", which the tokenizer reads as a special '
        f"token{further}. If it is meant as text, write it otherwise, as with a space inside."
    ]
