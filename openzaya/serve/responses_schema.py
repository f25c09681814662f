"""Requests to /v1/responses as clients send them, and how their items become messages.

Conversations are not stored: ``store`` is ignored, and what would need a stored answer is refused with the remedy.
Input items that carry reasoning are accepted and left out, as reasoning of earlier turns always is.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from openzaya.serve.errors import bad_request
from openzaya.serve.schemas import (
    CalledFunction,
    ChatMessage,
    Content,
    Count,
    EarlierCall,
    Flag,
    Function,
    FunctionName,
    Lenient,
    NamedFunction,
    NamedTool,
    Number,
    Positive,
    Sampling,
    Text,
    Tool,
    ToolChoice,
)
from openzaya.serve.settings import Effort


class MessageItem(Lenient):
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Content


class CallItem(Lenient):
    type: Literal["function_call"]
    call_id: Text
    name: Text
    arguments: Text = "{}"


class CallOutputItem(Lenient):
    type: Literal["function_call_output"]
    call_id: Text
    output: Content


class ReasoningItem(Lenient):
    type: Literal["reasoning"]


def _kind(item: Any) -> str | None:
    """A message may leave its type out."""
    kind = item.get("type", "message") if isinstance(item, dict) else getattr(item, "type", None)
    return kind if isinstance(kind, str) else None


InputItem = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[CallOutputItem, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")],
    Discriminator(_kind),
]


class FlatTool(Lenient):
    """A function; the tools that OpenAI runs itself do not exist here."""

    type: Literal["function"]
    name: FunctionName
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: Flag | None = None


class FlatNamedTool(Lenient):
    type: Literal["function"]
    name: FunctionName


class TextFormat(Lenient):
    type: Literal["text", "json_object", "json_schema"]
    name: Text | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: Flag | None = None
    description: Text | None = None


class TextSettings(Lenient):
    format: TextFormat | None = None


class ReasoningSettings(Lenient):
    effort: Effort | None = None


class ResponsesRequest(Lenient):
    """Body of /v1/responses."""

    input: Text | Annotated[list[InputItem], Field(min_length=1)]
    model: Text | None = None
    instructions: Text | None = None
    stream: Flag | None = None
    max_output_tokens: Positive | None = None
    temperature: Annotated[Number, Field(ge=0)] | None = None
    top_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    top_logprobs: Annotated[Count, Field(le=20)] | None = None
    include: list[Text] | None = None
    """``message.output_text.logprobs`` adds log probabilities; others are ignored."""
    reasoning: ReasoningSettings | None = None
    text: TextSettings | None = None
    tools: Annotated[list[FlatTool], Field(max_length=512)] | None = None
    tool_choice: Literal["none", "auto", "required"] | FlatNamedTool | None = None
    parallel_tool_calls: Flag | None = None
    metadata: dict[str, Text] | None = None
    previous_response_id: Text | None = None
    conversation: Any = None
    prompt: Any = None
    background: Flag | None = None
    truncation: Literal["auto", "disabled"] | None = None
    user: Text | None = None
    top_k: Annotated[int, Field(strict=True, ge=-1)] | None = None
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(strict=True)] | None = None

    def check(self) -> None:
        """Raise ``ApiError`` for what needs a server that stores or works in the background."""
        for name, remedy in (
            ("previous_response_id", "send the earlier items in 'input'"),
            ("conversation", "send the earlier items in 'input'"),
            ("prompt", "send the text in 'input'"),
            ("background", "wait for the answer, or stream it"),
        ):
            if getattr(self, name):
                raise bad_request(f"{name} is not available, since nothing is stored here; {remedy}", name)

    def messages(self) -> list[ChatMessage]:
        """Instructions and items as chat messages; calls that follow each other belong to one assistant turn."""
        messages: list[ChatMessage] = []
        if self.instructions:
            messages.append(ChatMessage(role="system", content=self.instructions))
        if isinstance(self.input, str):
            return [*messages, ChatMessage(role="user", content=self.input)]
        for item in self.input:
            if isinstance(item, MessageItem):
                messages.append(ChatMessage(role=item.role, content=item.content))
            elif isinstance(item, CallItem):
                call = EarlierCall(function=CalledFunction(name=item.name, arguments=item.arguments))
                last = messages[-1] if messages else None
                if last is not None and last.role == "assistant":
                    calls = [*(last.tool_calls or []), call]
                    messages[-1] = ChatMessage(role="assistant", content=last.content, tool_calls=calls)
                else:
                    messages.append(ChatMessage(role="assistant", tool_calls=[call]))
            elif isinstance(item, CallOutputItem):
                messages.append(ChatMessage(role="tool", content=item.output, tool_call_id=item.call_id))
        if not messages:
            raise bad_request("input holds no message; send at least one", "input")
        return messages

    def chat_tools(self) -> list[Tool]:
        fields = {"name", "description", "parameters", "strict"}
        return [
            Tool(type="function", function=Function(**tool.model_dump(include=fields))) for tool in self.tools or []
        ]

    def chat_choice(self) -> ToolChoice:
        choice = self.tool_choice or "auto"
        return NamedTool(function=NamedFunction(name=choice.name)) if isinstance(choice, FlatNamedTool) else choice

    def sampling(self) -> Sampling:
        return Sampling(
            temperature=self.temperature, top_p=self.top_p, top_k=self.top_k, min_p=self.min_p, seed=self.seed
        )
