"""Requests as clients send them: chat completions, completions, tokenize and detokenize.

Fields that are not listed are ignored, since clients send many of their own. Types are exact: a number in quotes is
refused. ``null`` is the same as leaving a field out. Extensions to OpenAI's fields carry the names that vLLM uses.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from openzaya.serve.settings import Effort

Integer = Annotated[int, Field(strict=True)]
Count = Annotated[int, Field(strict=True, ge=0)]
Positive = Annotated[int, Field(strict=True, ge=1)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Flag = Annotated[bool, Field(strict=True)]
Text = Annotated[str, Field(strict=True)]
FunctionName = Annotated[str, Field(strict=True, pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
StopStrings = Annotated[list[Annotated[str, Field(strict=True, min_length=1, max_length=1000)]], Field(max_length=16)]
Texts = Annotated[list[Text], Field(min_length=1)]
TokenIds = Annotated[list[Count], Field(min_length=1)]


class Lenient(BaseModel):
    """Base of all parts of a request: what is unknown is ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True, protected_namespaces=())


class TextPart(Lenient):
    """A piece of text; images, sound and files are not understood by this model."""

    type: Literal["text", "input_text", "output_text"] = "text"
    text: Text


Content = Text | list[TextPart]


class CalledFunction(Lenient):
    name: Text
    arguments: Text | dict[str, Any] = "{}"


class EarlierCall(Lenient):
    """A tool call of an earlier assistant turn."""

    id: Text | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(Lenient):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    tool_calls: list[EarlierCall] | None = None
    tool_call_id: Text | None = None


class Function(Lenient):
    name: FunctionName
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: Flag | None = None


class Tool(Lenient):
    type: Literal["function"]
    function: Function


class NamedFunction(Lenient):
    name: FunctionName


class NamedTool(Lenient):
    type: Literal["function"] = "function"
    function: NamedFunction


ToolChoice = Literal["none", "auto", "required"] | NamedTool


class NamedSchema(Lenient):
    name: Text | None = None
    schema_: dict[str, Any] | Flag = Field(alias="schema")
    strict: Flag | None = None


class ResponseFormat(Lenient):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None


class StreamOptions(Lenient):
    include_usage: Flag | None = None
    include_rsa: Flag | None = None
    """Tell in chunks what happens to each candidate of an RSA run."""


class TemplateSettings(Lenient):
    enable_thinking: Flag | None = None


class Sampling(Lenient):
    """What chat completions and completions share."""

    model: Text | None = None
    """By default the model that is served."""
    stream: Flag | None = None
    stream_options: StreamOptions | None = None
    n: Positive | None = None
    max_tokens: Count | None = None
    """By default, and at most, what the context and the server's limit leave."""
    temperature: Annotated[Number, Field(ge=0)] | None = None
    """Default 1."""
    top_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    """Default 0.95; 0 keeps the most likely token alone."""
    top_k: Annotated[Integer, Field(ge=-1)] | None = None
    """0 and -1 keep all."""
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[Number, Field(gt=0, le=100)] | None = None
    logit_bias: dict[str, Annotated[Number, Field(ge=-100, le=100)]] | None = None
    """Token id, as text, to what is added to its logit."""
    stop: Text | StopStrings | None = None
    stop_token_ids: Annotated[list[Count], Field(max_length=1024)] | None = None
    include_stop_str_in_output: Flag | None = None
    ignore_eos: Flag | None = None
    min_tokens: Count | None = None
    seed: Integer | None = None
    """By default a random one; candidate i draws from ``seed + i``."""
    return_token_ids: Flag | None = None
    return_experts: Flag | None = None
    """Give the expert of every token and layer, as uint8 in base64; the last token was never run."""


class ChatRequest(Sampling):
    """Body of /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Count | None = None
    """Reasoning counts; wins over ``max_tokens``."""
    logprobs: Flag | None = None
    top_logprobs: Annotated[Count, Field(le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=512)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: Flag | None = None
    reasoning_effort: Effort | None = None
    enable_thinking: Flag | None = None
    chat_template_kwargs: TemplateSettings | None = None
    thinking_budget: Count | None = None
    """Most tokens of reasoning; wins over ``reasoning_effort``."""
    thinking_token_budget: Count | None = None
    rsa: Flag | Text | dict[str, Any] | None = None
    """Answer with Markovian RSA: true, a preset, or settings, ``preset`` and ``events`` among them."""


class CompletionRequest(Sampling):
    """Body of /v1/completions."""

    prompt: Text | Texts | TokenIds | Annotated[list[TokenIds], Field(min_length=1)]
    echo: Flag | None = None
    logprobs: Annotated[Count, Field(le=20)] | None = None
    suffix: Text | None = None
    best_of: Integer | None = None


class TokenizeRequest(Lenient):
    """Body of /tokenize: a text, or a conversation as the model would see it."""

    model: Text | None = None
    prompt: Text | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    tools: Annotated[list[Tool], Field(max_length=512)] | None = None
    add_special_tokens: Flag = True
    """Begin with the BOS token, as completions do."""
    add_generation_prompt: Flag = True
    enable_thinking: Flag = True
    return_token_strs: Flag = False


class DetokenizeRequest(Lenient):
    """Body of /detokenize."""

    model: Text | None = None
    tokens: list[Count]
