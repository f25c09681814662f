"""A grammar that forces tool calls, for ``tool_choice`` "required" or a named function.

The grammar (llguidance's dialect of Lark) allows exactly what openzaya/data/chat_template.jinja writes, with the
parameters in the order of the schema: those required always, the others or not. So a forced call is read back by
toolcalls.py whatever the model would rather write; only a limit on tokens can cut it off.

    one type string             any text up to the next ``</parameter>``
    enum or const of strings    one of them
    no string allowed           JSON that fits the schema, spelled as the template spells it
    string and other types      any text

``pattern``, ``minLength`` and the like of strings are not held, and properties that the schema does not list are not
allowed. Whether a schema can be compiled at all is found where the grammar is (openzaya/infer/constraint.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from openzaya.data.tokenizer import TOOL_CALL_CLOSE, TOOL_CALL_OPEN
from openzaya.errors import DataError
from openzaya.infer.toolcalls import allowed_types, functions_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_VALUE_END = "\n</parameter>\n"
_JSON_FORM = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "coerce_one_of": True,
    "lenient": True,
}
"""The template's spelling; ``oneOf`` counts as ``anyOf``, unknown keywords are passed over."""


def tool_grammar(
    tools: Sequence[Mapping[str, Any]],
    choice: str | None = None,
    *,
    tokenizer: PreTrainedTokenizerFast | None = None,
    parallel: bool = True,
) -> str:
    """Lark source whose texts are calls of ``tools`` and nothing else.

    Args:
        tools: as the request gave them.
        choice: the function to call, once; None leaves the choice among all, at least one call.
        tokenizer: says whether the call tags are tokens of their own; without it they are taken to be.
        parallel: whether more than one call may follow each other, where ``choice`` is None.

    Raises:
        DataError: no tools, a malformed one, or no function named ``choice``.
    """
    functions = functions_of(tools)
    if not functions:
        raise DataError("tool_choice asks for a call but tools is empty; give at least one function")
    if choice is not None and choice not in functions:
        raise DataError(f"tool_choice names '{choice}', tools hold: {', '.join(functions)}; name one of them")
    chosen = functions if choice is None else {choice: functions[choice]}
    rules: list[str] = []
    for i, (name, schema) in enumerate(chosen.items()):
        rules += _function_rules(f"f{i}", name, schema)
    one = " | ".join(f"f{i}" for i in range(len(chosen)))
    more = r' ("\n" call)*' if parallel and choice is None else ""
    return "\n".join(
        (
            f"start: call{more}",
            rf'call: {_tag(TOOL_CALL_OPEN, tokenizer)} "\n" function "\n" {_tag(TOOL_CALL_CLOSE, tokenizer)}',
            f"function: {one}",
            *rules,
            r"TEXT: /(?s:.*)/ & ~/(?s:.*)(<\/parameter>|<\/?zyphra_tool_call>)(?s:.*)/",
            f"text[lazy]: TEXT {_literal(_VALUE_END)}",
            "",
        )
    )


def _function_rules(rule: str, name: str, schema: Mapping[str, Any]) -> list[str]:
    properties = schema.get("properties") or {}
    required = schema.get("required")
    required = required if isinstance(required, list) else []
    for key in properties:
        if re.search(r">|\n|zyphra_tool_call", key):
            raise DataError(f"function '{name}': the parameter {key!r} holds '>', a line break or a tag; rename it")
    body = "".join(f" {rule}_p{i}{'' if key in required else '?'}" for i, key in enumerate(properties))
    rules = [f"{rule}: {_literal(f'<function={name}>' + chr(10))}{body} {_literal('</function>')}"]
    for i, (key, value) in enumerate(properties.items()):
        opening = _literal(f"<parameter={key}>\n")
        rules.append(f"{rule}_p{i}: {opening} {_value(value, schema)}")
    return rules


def _value(schema: Any, root: Mapping[str, Any]) -> str:
    """What may follow a parameter's opening line, the closing one included."""
    members = _string_members(schema)
    if members:
        return f"({' | '.join(_literal(member) for member in members)}) {_literal(_VALUE_END)}"
    if schema is False or "string" in allowed_types(schema, root):
        return "text"
    whole = dict(schema)
    whole.update({key: root[key] for key in ("$defs", "definitions") if key in root and key not in whole})
    whole["x-guidance"] = _JSON_FORM
    return f"%json {json.dumps(whole)} {_literal(_VALUE_END)}"


def _string_members(schema: Any) -> list[str]:
    """The values of an enum or const that are all strings which a value can carry."""
    if not isinstance(schema, Mapping):
        return []
    members = [schema["const"]] if "const" in schema else schema.get("enum")
    if not isinstance(members, list) or not all(isinstance(one, str) for one in members):
        return []
    return [] if any(re.search("</parameter>|zyphra_tool_call>", one) for one in members) else members


def _tag(tag: str, tokenizer: PreTrainedTokenizerFast | None) -> str:
    """A tag as its token, which llguidance never matches as text, or as text where the tokenizer has no such token."""
    if tokenizer is None:
        return tag
    token = tokenizer.get_vocab().get(tag)
    return _literal(tag) if token is None else f"<[{token}]>"


def _literal(text: str) -> str:
    return json.dumps(text)
