"""Rows of a prompt file as token ids: prompts, and the responses behind them, through the chat template or as raw text."""

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from nemo_opdlm.data.rows import Message, PromptRow
from nemo_opdlm.data.shown import shortened

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ROWS_PER_TOKENIZER_CALL = 1024


def encode_rows(
    rows: Sequence[PromptRow],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    templated: bool,
    enable_thinking: bool = False,
    domain_suffixes: Mapping[str, str] | None = None,
    openings: Sequence[str] | None = None,
) -> list[list[int]]:
    """Token ids of each row, through the chat template or as raw text. Raises ValueError naming a row it cannot encode.

    `openings`, one for each row, are what the answers begin with already.
    """
    texts = [_prompt(row, tokenizer, templated, enable_thinking, domain_suffixes) for row in rows]
    texts = [text + opening for text, opening in zip(texts, openings or [""] * len(texts), strict=True)]
    return _tokenize(rows, texts, tokenizer, is_document_start=not templated)


def encode_responses(
    rows: Sequence[PromptRow],
    prompts: Sequence[list[int]],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    templated: bool,
    enable_thinking: bool = False,
    domain_suffixes: Mapping[str, str] | None = None,
    end_token_ids: Collection[int],
) -> list[list[int]]:
    """Token ids of each row's response: with the prompt in front they are the whole conversation, or the whole raw text.

    A response ends as a sampled one does, at its first end token; one without gets the tokenizer's. Where no token of the
    whole text begins behind the prompt, the response is encoded by itself: a prompt has the same tokens in every mode.

    Args:
        rows: with responses.
        prompts: their prompts from `encode_rows`, with the same options.
        tokenizer: of the model.
        templated, enable_thinking, domain_suffixes: as for `encode_rows`.
        end_token_ids: tokens that end a response; a model without any has responses that stay open.

    Raises:
        ValueError: a row that cannot be encoded; one line.
    """
    beginnings = [_prompt(row, tokenizer, templated, enable_thinking, domain_suffixes) for row in rows]
    if templated:
        texts = [_conversation(row, tokenizer, enable_thinking, domain_suffixes) for row in rows]
    else:
        texts = [beginning + str(row.response) for row, beginning in zip(rows, beginnings, strict=True)]
    for row, text, beginning in zip(rows, texts, beginnings, strict=True):
        if not text.startswith(beginning):
            raise ValueError(
                f"{row.where}: the chat template writes the whole conversation otherwise than the prompt and the response "
                "behind it: a response that thinks needs enable_thinking=true, others may need it false"
            )
    behind = [text[len(beginning) :] for text, beginning in zip(texts, beginnings, strict=True)]
    wholes = _tokenize(rows, texts, tokenizer, is_document_start=not templated)
    alone = _tokenize(rows, behind, tokenizer, is_document_start=False)
    return [
        _closed(whole[len(prompt) :] if whole[: len(prompt)] == prompt else response, tokenizer, end_token_ids)
        for whole, prompt, response in zip(wholes, prompts, alone, strict=True)
    ]


def resolve_chat_template(requested: bool | str, tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether to apply the tokenizer's chat template; "auto" = if it has one. Raises ValueError if true and it has none."""
    if requested not in (True, False, "auto"):
        raise ValueError(f"chat_template must be true, false or 'auto', got {requested!r}")
    available = bool(tokenizer.chat_template)
    if requested is True and not available:
        raise ValueError("chat_template is true, but the tokenizer has no chat template; use 'auto' or false")
    return available if requested == "auto" else bool(requested)


def _prompt(
    row: PromptRow,
    tokenizer: "PreTrainedTokenizerBase",
    templated: bool,
    enable_thinking: bool,
    domain_suffixes: Mapping[str, str] | None,
) -> str:
    suffix = _suffix(row, domain_suffixes)
    if templated:
        return _render(row, row.conversation(suffix), tokenizer, enable_thinking, is_open=True)
    if row.text is None:
        raise ValueError(f"{row.where}: 'messages' need a chat template, and none is in use; give 'prompt' instead")
    return row.text + suffix


def _conversation(
    row: PromptRow,
    tokenizer: "PreTrainedTokenizerBase",
    enable_thinking: bool,
    domain_suffixes: Mapping[str, str] | None,
) -> str:
    turns = [*row.conversation(_suffix(row, domain_suffixes)), {"role": "assistant", "content": str(row.response)}]
    return _render(row, turns, tokenizer, enable_thinking, is_open=False)


def _suffix(row: PromptRow, domain_suffixes: Mapping[str, str] | None) -> str:
    return (domain_suffixes or {}).get(row.domain or "", "")


def _render(
    row: PromptRow, turns: list[Message], tokenizer: "PreTrainedTokenizerBase", enable_thinking: bool, *, is_open: bool
) -> str:
    try:
        text = tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=is_open, enable_thinking=enable_thinking
        )
    except Exception as error:  # templates refuse e.g. two user turns in a row; a faulty one raises anything
        reason = shortened(" ".join(str(error).split()) or type(error).__name__)
        raise ValueError(f"{row.where}: the chat template refuses this row: {reason}") from None
    return str(text)


def _tokenize(
    rows: Sequence[PromptRow], texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase", *, is_document_start: bool
) -> list[list[int]]:
    """Token ids per text; a document's start gets the tokenizer's special tokens (BOS, if any), a template writes its own."""
    ids: list[list[int]] = []
    try:
        for start in range(0, len(texts), _ROWS_PER_TOKENIZER_CALL):
            chunk = list(texts[start : start + _ROWS_PER_TOKENIZER_CALL])
            # verbose=False: "longer than the model's maximum length" is ours to judge, by max_prompt_length.
            ids += tokenizer(chunk, add_special_tokens=is_document_start, verbose=False)["input_ids"]
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the tokenizers library raises bare Exception, and its panics are not even that
        where = f"{rows[0].where} to {rows[-1].where}" if len(rows) > 1 else rows[0].where
        reason = shortened(" ".join(str(error).split()) or type(error).__name__)
        raise ValueError(f"{where}: the tokenizer cannot encode the prompts: {reason}") from error
    if is_document_start:
        # A few tokenizers close every text with the end token; a prompt must stay open.
        ids = [text[:-1] if text and text[-1] == tokenizer.eos_token_id else text for text in ids]
    return ids


def _closed(response: list[int], tokenizer: "PreTrainedTokenizerBase", end_token_ids: Collection[int]) -> list[int]:
    """Cut behind the first end token; the tokenizer's where there is none."""
    for place, token in enumerate(response):
        if token in end_token_ids:
            return response[: place + 1]
    if not end_token_ids:
        return response
    eos = tokenizer.eos_token_id
    return [*response, eos if eos in end_token_ids else min(end_token_ids)]
