"""Reads the calls of tools that a policy writes in a turn, and makes them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tokenrl.errors import Refused, describe, refusing, written

Message = dict[str, Any]


def assistant_message(
    tokenizer: Any,
    ids: Sequence[int],
    prefix_ids: Sequence[int],
    text: str,
    tools: Sequence[Any] = (),
) -> Message:
    """Return the message of a sampled turn, with `tool_calls` if there are tools and it calls some.

    Args:
        tokenizer: the tokenizer of the policy.
        ids: the ids of the turn.
        prefix_ids: all ids before it.
        text: the turn as text.
        tools: the tools of the environment.

    Returns:
        A message with role and content; with the key `malformed`, a reason, if a call cannot be parsed.

    Raises:
        Refused: nothing says how the model writes calls.
    """
    message: Message = {"role": "assistant", "content": text}
    if not tools:
        return message
    template = response_template(tokenizer, tools)
    try:
        if template is None:
            message["content"], *bodies = text.split("<tool_call>")
            functions = [json.loads(body[: body.index("</tool_call>")]) for body in bodies]
            calls = [{"type": "function", "function": function} for function in functions]
        else:
            parsed = tokenizer.parse_response(list(ids), prefix=list(prefix_ids), tools=list(tools))
            message["content"] = parsed.get("content") or ""
            calls = parsed.get("tool_calls") or []
        for call in calls:
            name = call["function"]["name"]
            arguments = call["function"]["arguments"]
            if not isinstance(name, str) or not isinstance(arguments, dict):
                raise ValueError("a call needs a name, and arguments by name")
    except Exception as error:
        return {"role": "assistant", "content": text, "malformed": describe(error)}
    return message | {"tool_calls": calls} if calls else message


def response_template(tokenizer: Any, tools: Sequence[Any]) -> Any:
    """Return the template by which calls are read; None for calls as Qwen writes them, JSON in `<tool_call>`.

    The latter are read so if the tokenizer has no response template, and its chat template writes them.

    Raises:
        Refused: nothing says how the model writes calls.
    """
    template = getattr(tokenizer, "response_template", None)
    if template is not None:
        # it checks the template, with its regular expressions
        with refusing("The tokenizer's response_template cannot be used", "Correct it there."):
            tokenizer.get_response_parser(prefix="")
        return template
    if "<tool_call>" not in str(tokenizer.get_chat_template(tools=list(tools))):
        raise Refused(
            "The tokenizer has no response_template, which says how the model writes tool calls: set "
            "tokenizer.response_template and save it with the model, or take a model that has one."
        )
    return None


def check_tool(tool: Any) -> None:
    """Refuse a method of an environment that no schema for the chat template can be made of."""
    from transformers.utils import get_json_schema

    is_step = tool.__name__ == "step"
    seed = ", or give reset a parameter seed, as gymnasium has it" if is_step else ""
    with refusing(
        f"{tool.__qualname__} cannot be a tool",
        "Give it type hints and a docstring with a line for each argument below `Args:`, or a name with _ in front"
        f"{seed}.",
    ):
        get_json_schema(tool)


def reply(name: str, output: Any, error: object = None) -> Message:
    """Return the message of a tool, with what it returned or with the error."""
    result = output if error is None else {"error": written(error, str)}
    return {"role": "tool", "name": encodable(name), "content": encodable(written(result, str))}


def encodable(text: str) -> str:
    """Return a text with `?` for half a pair of surrogates, which tokenizers and files do not take."""
    return text.encode(errors="replace").decode()


def joined(prompt: str, text: str) -> str:
    """Return a prompt and a text, with a line break between if there is no white space where they meet."""
    is_apart = prompt[-1:].isspace() or text[:1].isspace()
    return f"{prompt}\n{text}" if prompt and text and not is_apart else prompt + text


def use(tools: Sequence[Callable[..., Any]], name: str, arguments: Mapping[str, Any]) -> Any:
    """Call the tool of this name.

    Raises:
        LookupError: there is none.
    """
    named = {tool.__name__: tool for tool in tools}
    if name not in named:
        raise LookupError(f"There is no tool {name}; there are {', '.join(named)}.")
    return named[name](**arguments)
