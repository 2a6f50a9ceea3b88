"""The forms of answers, for the OpenAPI document; requests are in mpillama/openai."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorObject(BaseModel):
    error: ErrorDetail


class Usage(BaseModel):
    prompt_tokens: int
    total_tokens: int
    completion_tokens: int | None = None
    prompt_tokens_details: dict[str, int] | None = None
    completion_tokens_details: dict[str, int] | None = None


class CalledFunctionOut(BaseModel):
    """A function and its arguments as JSON text."""

    name: str
    arguments: str


class ToolCallOut(BaseModel):
    id: str
    type: Literal["function"]
    function: CalledFunctionOut


class MessageOut(BaseModel):
    role: Literal["assistant"]
    content: str | None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[ToolCallOut] | None = None


class ChatChoiceOut(BaseModel):
    index: int
    message: MessageOut
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class PromptLogprob(BaseModel):
    """One of the tokens that could stand in a place of the prompt."""

    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]
"""Of each token of the prompt, by the ids of tokens; none of the first."""


class CompletionChoiceOut(BaseModel):
    index: int
    text: str
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length"]
    prompt_logprobs: PromptLogprobs | None = None


class Answer(BaseModel):
    id: str
    created: int
    model: str
    system_fingerprint: str
    usage: Usage


class ChatCompletion(Answer):
    object: Literal["chat.completion"]
    choices: list[ChatChoiceOut]
    prompt_logprobs: PromptLogprobs | None = None


class Completion(Answer):
    object: Literal["text_completion"]
    choices: list[CompletionChoiceOut]


class Embedding(BaseModel):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class Embeddings(BaseModel):
    """Embeddings in the order of their texts."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: Usage


class Model(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class Models(BaseModel):
    object: Literal["list"]
    data: list[Model]


class Tokens(BaseModel):
    tokens: list[int]
    count: int
    max_model_len: int
    pieces: list[str] | None = None


class Text(BaseModel):
    """The text of ids, under our name and vLLM's."""

    content: str
    prompt: str


class TokenizerInfo(BaseModel):
    """What clients that count tokens must know."""

    bos_token: str | None
    eos_token: str | None
    chat_template: str | None
    vocab_size: int
    model_max_length: int


class Group(BaseModel):
    ranks: Annotated[list[int], Field(min_length=1)]
    ready: bool
    failure: str | None


class Health(BaseModel):
    status: Literal["ok", "loading", "draining"]
    reason: str
    model: str | None
    version: str
    groups: list[Group]


# -- The Responses API ------------------------------------------------------------------------------------------------


class InputTokensDetails(BaseModel):
    """Tokens of a request that were known."""

    cached_tokens: int
    cache_write_tokens: int


class OutputTokensDetails(BaseModel):
    """Tokens of an answer that were thought."""

    reasoning_tokens: int


class ResponseUsage(BaseModel):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class IncompleteDetails(BaseModel):
    reason: Literal["max_output_tokens"]


class OutputText(BaseModel):
    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[dict[str, Any]]


class OutputMessage(BaseModel):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    content: list[OutputText]
    status: Literal["completed", "incomplete"]


class OutputCall(BaseModel):
    id: str
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    status: Literal["completed", "incomplete"]


class ThoughtText(BaseModel):
    type: Literal["reasoning_text"]
    text: str


class OutputReasoning(BaseModel):
    id: str
    type: Literal["reasoning"]
    summary: list[Any]
    content: list[ThoughtText]
    status: Literal["completed", "incomplete"]


class ModelResponse(BaseModel):
    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["completed", "incomplete"]
    error: None
    incomplete_details: IncompleteDetails | None
    model: str
    output: list[OutputMessage | OutputCall | OutputReasoning]
    usage: ResponseUsage
    instructions: str | None
    previous_response_id: str | None
    store: bool
    metadata: dict[str, str]
    temperature: float
    top_p: float
    top_logprobs: int
    max_output_tokens: int | None
    tools: list[dict[str, Any]]
    tool_choice: str | dict[str, Any]
    parallel_tool_calls: bool
    text: dict[str, Any]
    reasoning: dict[str, Any]
    truncation: Literal["disabled"]
    background: bool


class InputTokens(BaseModel):
    object: Literal["response.input_tokens"]
    input_tokens: int


class Deleted(BaseModel):
    """A response that is kept no more."""

    id: str
    object: Literal["response"]
    deleted: bool


class Items(BaseModel):
    object: Literal["list"]
    data: list[dict[str, Any]]
    first_id: str
    last_id: str
    has_more: bool
