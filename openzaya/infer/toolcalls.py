"""Tool calls in the model's text: ZAYA's XML form, read from a stream.

A call, as openzaya/data/chat_template.jinja renders it (the form of ZAYA1, arXiv 2605.05365):

    <zyphra_tool_call>
    <function=NAME>
    <parameter=P>
    value
    </parameter>
    </function>
    </zyphra_tool_call>

A call is given out whole, when its closing tag has come: a client never holds half of one, and one that was cut off
by a limit cannot be carried out by mistake. Text that begins like a call and is none comes out as content, unchanged.
White space before and between calls belongs to them, and so does white space that ends an answer after a call.
Reasoning must be split off first (reasoning.py): a call that the model only thought about is none.

Values have no type of their own. A parameter that the schema says is a string takes its text as it stands, without
the line break before and after it; other types take the text as JSON if it is JSON, else as a string. Where several
types are allowed, or none is named, JSON of an allowed type other than string wins. So the form carries every value
exactly, but for: strings that read as another allowed type (``"5"`` where a number may stand), strings that hold
``</parameter>``, white space and ``<parameter=``, or either call tag; names that hold ``>`` or a line break.

A call of a function that was not offered is a call nevertheless, its values guessed as above: the client's answer
"no such function" puts the model right, where raw XML in the text would not.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from openzaya.data.tokenizer import TOOL_CALL_CLOSE, TOOL_CALL_OPEN
from openzaya.errors import DataError
from openzaya.infer.reasoning import partial_tag_length

MAX_REFERENCES = 32
"""Steps of ``$ref`` and ``anyOf`` that are followed in a schema; what is beyond them allows any type."""

_TAG = re.compile(f"{TOOL_CALL_OPEN}|{TOOL_CALL_CLOSE}")
_UNNAMEABLE = re.compile(rf">|\n|{_TAG.pattern}")
_FUNCTION_OPEN = "<function="
_CALL = re.compile(r"\s*<function=([^>\n]+)>\s*(.*)</function>\s*", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\n]*)>(.*?)</parameter>\s*(?=<parameter=|\Z)", re.DOTALL)
_JSON_TYPES = {bool: "boolean", int: "integer", float: "number", list: "array", dict: "object", type(None): "null"}
_ALL_TYPES = frozenset({"string", *_JSON_TYPES.values()})
_JSON_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_PYTHON_WORDS = {"True": "true", "False": "false", "None": "null"}
"""Models write these where they mean the JSON words."""


@dataclass(frozen=True)
class Content:
    """Text of the answer; never empty."""

    text: str


@dataclass(frozen=True)
class ToolCall:
    """One whole call; ``arguments`` is the text of a JSON object."""

    index: int
    """0, 1, ... in the order of the answer."""
    id: str
    name: str
    arguments: str


Event = Content | ToolCall


def new_call_id() -> str:
    """A fresh id, in the form of OpenAI's."""
    return "call_" + secrets.token_hex(12)


class ToolCallParser:
    """Reads one candidate's answer; feed it the pieces in order, then call :meth:`finish` once.

    Args:
        tools: as the request gave them (see :func:`functions_of`); without any, all text is content.
        make_id: makes the ids of calls.
    """

    def __init__(self, tools: Sequence[Mapping[str, Any]], make_id: Callable[[], str] = new_call_id) -> None:
        self._schemas = functions_of(tools)
        self._make_id = make_id
        self.num_calls = 0
        """Calls given out so far."""
        self._blanks = ""
        """White space at the end of the content so far; a call may swallow it."""
        self._after_call = False
        """Nothing but white space came since the last call."""
        self._held = ""
        """The end of what was read, where it may be the beginning of a tag."""
        self._body: list[str] | None = None
        """Inside a call: the pieces since its opening tag."""
        self._begins_well = False
        """Whether the body is known to begin as a call does."""

    def feed(self, text: str) -> list[Event]:
        """The events that became certain with ``text``."""
        if not self._schemas:
            return [Content(text)] if text else []
        events: list[Event] = []
        text, self._held = self._held + text, ""
        while text:
            text = self._outside(text, events) if self._body is None else self._inside(self._body, text, events)
        return _joined(events)

    def finish(self) -> list[Event]:
        """What was held back, as content: an unfinished call is none."""
        events: list[Event] = []
        body = [] if self._body is None else [TOOL_CALL_OPEN, *self._body]
        self._add_content("".join([*body, self._held]), events)
        if self._blanks and not self._after_call:
            events.append(Content(self._blanks))
        self._body, self._held, self._blanks = None, "", ""
        return _joined(events)

    def _outside(self, text: str, events: list[Event]) -> str:
        """Read up to an opening tag; returns what follows it."""
        start = text.find(TOOL_CALL_OPEN)
        if start < 0:
            certain = len(text) - partial_tag_length(text, TOOL_CALL_OPEN)
            text, self._held = text[:certain], text[certain:]
        else:
            self._body, self._begins_well = [], False
        self._add_content(text if start < 0 else text[:start], events)
        return "" if start < 0 else text[start + len(TOOL_CALL_OPEN) :]

    def _inside(self, body: list[str], text: str, events: list[Event]) -> str:
        """Read up to a tag, or until the body turns out to be no call's; returns what is still to be read."""
        tag = _TAG.search(text)
        if tag is None:
            uncertain = max(partial_tag_length(text, one) for one in (TOOL_CALL_OPEN, TOOL_CALL_CLOSE))
            body.append(text[: len(text) - uncertain])
            self._held = text[len(body[-1]) :]
            if not self._begins_well:
                start = "".join(body).lstrip()
                self._begins_well = start.startswith(_FUNCTION_OPEN)
                if not self._begins_well and not _FUNCTION_OPEN.startswith(start):
                    self._give_up(body, "", events)
            return ""
        body.append(text[: tag.start()])
        rest = text[tag.end() :]
        if tag.group() == TOOL_CALL_OPEN:
            # A value cannot hold this tag: the call before was never finished.
            self._give_up(body, "", events)
            self._body, self._begins_well = [], False
        elif (call := self._call("".join(body))) is None:
            self._give_up(body, TOOL_CALL_CLOSE, events)
        else:
            events.append(call)
            self.num_calls += 1
            self._body, self._blanks, self._after_call = None, "", True
        return rest

    def _give_up(self, body: list[str], end: str, events: list[Event]) -> None:
        self._add_content("".join((TOOL_CALL_OPEN, *body, end)), events)
        self._body = None

    def _add_content(self, text: str, events: list[Event]) -> None:
        text = self._blanks + text
        certain = text.rstrip()
        self._blanks = text[len(certain) :]
        if certain:
            events.append(Content(certain))
            self._after_call = False

    def _call(self, body: str) -> ToolCall | None:
        """The call between two tags; None where it has not the form."""
        match = _CALL.fullmatch(body)
        if match is None:
            return None
        name, parameters = match.groups()
        schema = self._schemas.get(name, {})
        arguments: dict[str, str] = {}
        position = 0
        while position < len(parameters):
            parameter = _PARAMETER.match(parameters, position)
            # With a parameter given twice it is unknown which was meant.
            if parameter is None or parameter[1] in arguments:
                return None
            value = parameter[2].removeprefix("\n").removesuffix("\n")
            properties = schema.get("properties") or {}
            arguments[parameter[1]] = json_text(value, properties.get(parameter[1], True), schema)
            position = parameter.end()
        pairs = (f"{json.dumps(key, ensure_ascii=False)}: {value}" for key, value in arguments.items())
        return ToolCall(self.num_calls, self._make_id(), name, "{" + ", ".join(pairs) + "}")


def parse_tool_calls(text: str, tools: Sequence[Mapping[str, Any]]) -> tuple[str, list[ToolCall]]:
    """Content and calls of a whole answer."""
    parser = ToolCallParser(tools)
    events = parser.feed(text) + parser.finish()
    content = "".join(event.text for event in events if isinstance(event, Content))
    return content, [event for event in events if isinstance(event, ToolCall)]


def functions_of(tools: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Name and parameter schema of each function, in order.

    A tool is ``{"type": "function", "function": {"name", "parameters"}}`` or, as in the responses endpoint, has name
    and parameters beside its type. Raises ``DataError`` naming what is wrong with which tool.
    """
    functions: dict[str, dict[str, Any]] = {}
    for i, tool in enumerate(tools):
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(name, str) or tool.get("type", "function") != "function":
            raise DataError(f"tools[{i}] is no function with a name; give {{'type': 'function', 'function': ...}}")
        if not name or _UNNAMEABLE.search(name):
            raise DataError(f"tools[{i}]: the name {name!r} is empty or holds '>', a line break or a tag; rename it")
        if name in functions:
            raise DataError(f"tools[{i}]: there are two functions '{name}'; rename one")
        schema = function.get("parameters")
        if schema is None:
            schema = {}
        if not isinstance(schema, Mapping) or not isinstance(schema.get("properties") or {}, Mapping):
            raise DataError(f"tools[{i}] ('{name}'): parameters are no JSON schema of an object; give one")
        functions[name] = dict(schema)
    return functions


def _joined(events: list[Event]) -> list[Event]:
    """``events`` with neighbouring pieces of content as one."""
    result: list[Event] = []
    for event in events:
        if result and isinstance(event, Content) and isinstance(last := result[-1], Content):
            result[-1] = Content(last.text + event.text)
        else:
            result.append(event)
    return result


# --- values -----------------------------------------------------------------------------------------


def json_text(text: str, schema: Any, root: Mapping[str, Any]) -> str:
    """A parameter's text as JSON text, by its schema; ``root`` is where ``#/...`` references lead.

    JSON in the text is given on as it stands, so that numbers keep their digits.
    """
    types = allowed_types(schema, root)
    members = schema.get("enum") if isinstance(schema, Mapping) else None
    is_member = isinstance(members, list) and text in [one for one in members if isinstance(one, str)]
    if types != {"string"} and not is_member:
        json_like = _PYTHON_WORDS.get(text.strip(), text.strip())
        found = _type_of_json(json_like)
        fits = found in types or (found == "integer" and "number" in types)
        if found is not None and found != "string" and (fits or "string" not in types):
            return json_like
    return json.dumps(text, ensure_ascii=False)


def allowed_types(schema: Any, root: Mapping[str, Any]) -> frozenset[str]:
    """The JSON types that values of a schema may have; all of them where it does not say."""
    return _allowed_types(schema, root, [MAX_REFERENCES])


def _allowed_types(schema: Any, root: Mapping[str, Any], steps_left: list[int]) -> frozenset[str]:
    steps_left[0] -= 1
    if steps_left[0] < 0 or not isinstance(schema, Mapping):
        return _ALL_TYPES
    allowed = _ALL_TYPES
    kind = schema.get("type")
    names = [kind] if isinstance(kind, str) else kind if isinstance(kind, list) else []
    if known := _ALL_TYPES.intersection(name for name in names if isinstance(name, str)):
        allowed &= known | ({"integer"} if "number" in known else set())
    members = schema.get("enum") if "const" not in schema else [schema["const"]]
    if isinstance(members, list) and members:
        allowed &= {_JSON_TYPES.get(type(member), "string") for member in members}
    if isinstance(schema.get("$ref"), str):
        allowed &= _allowed_types(_referred(schema["$ref"], root), root, steps_left)
    for key in ("anyOf", "oneOf"):
        if isinstance(schema.get(key), list) and schema[key]:
            allowed &= frozenset().union(*(_allowed_types(one, root, steps_left) for one in schema[key]))
    if isinstance(schema.get("allOf"), list):
        for one in schema["allOf"]:
            allowed &= _allowed_types(one, root, steps_left)
    return allowed or _ALL_TYPES


def _referred(reference: str, root: Mapping[str, Any]) -> Any:
    """What a reference inside the schema leads to; True (anything) where it leads nowhere."""
    found: Any = root
    if not reference.startswith("#"):
        return True
    for step in reference[1:].split("/")[1:]:
        key = step.replace("~1", "/").replace("~0", "~")
        if not isinstance(found, Mapping) or key not in found:
            return True
        found = found[key]
    return found


def _type_of_json(text: str) -> str | None:
    """The JSON type of ``text``; None where it is not JSON."""
    if _JSON_NUMBER.fullmatch(text):
        return "integer" if text.lstrip("-").isdigit() else "number"
    try:
        return _JSON_TYPES.get(type(json.loads(text, parse_int=float, parse_constant=_refuse)), "string")
    except (ValueError, RecursionError):
        return None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
