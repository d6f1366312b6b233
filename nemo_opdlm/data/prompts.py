"""Prompt files as token ids, made once at set-up."""

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from nemo_opdlm.data.encoding import encode_responses, encode_rows, resolve_chat_template
from nemo_opdlm.data.rows import PromptRow, read_rows
from nemo_opdlm.data.texts import Texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# User-text endings of the published general recipe; its code and chat prompts have none.
PUBLISHED_DOMAIN_SUFFIXES: Mapping[str, str] = {
    "math": "\nPlease reason step by step, and put your final answer within \\boxed{}.",
    "science": '\nPlease show your choice in the answer field with only the choice letter, e.g., "answer": "C".',
}


@dataclass(frozen=True)
class PromptDataset(Texts):
    """Tokenised prompts, in file order.

    row_ids     n names: the row's `id`, else its line or row number in the file
    domains     n names, None where the row names none
    responses   n texts that go on behind the prompts; None unless they were asked for
    """

    row_ids: tuple[str, ...]
    domains: tuple[str | None, ...]
    num_dropped_too_long: int
    uses_chat_template: bool
    responses: Texts | None = None

    @property
    def prompt_len(self) -> Tensor:
        """Tokens per prompt, int64 [n]."""
        return self.lengths

    def checksum(self) -> str:
        """SHA-256 over ids, lengths and domains: equal if and only if a run would see the same prompts and responses."""
        digest = hashlib.sha256(repr(self.domains).encode())
        for texts in (self, self.responses) if self.responses is not None else (self,):
            for tensor in (texts.offsets, texts.token_ids):
                digest.update(tensor.numpy().astype("<i8").tobytes())
        return digest.hexdigest()


def load_prompts(
    path: str | Path,
    *,
    tokenizer: "PreTrainedTokenizerBase",
    max_prompt_length: int,
    chat_template: bool | Literal["auto"] = "auto",
    enable_thinking: bool = False,
    domain_suffixes: Mapping[str, str] | None = None,
    truncate_prompt_to: int | None = None,
    mask_token_id: int | None = None,
    response_end_ids: Collection[int] | None = None,
) -> PromptDataset:
    """Read a prompt file (see `rows.read_rows`) and tokenise it.

    With a chat template a row becomes its turns plus the generation prompt, and no system message is added; without
    one it is raw text, encoded as the tokenizer encodes a document's start. "auto" uses the template if there is one.

    max_prompt_length    prompts with more tokens are dropped, before any rollout, and counted
    truncate_prompt_to   raw text only: keep the first N tokens of each prompt
    domain_suffixes      domain -> text appended to the last user turn, e.g. PUBLISHED_DOMAIN_SUFFIXES
    mask_token_id        refuse texts holding this id: a sampler could not tell it from a position to fill
    response_end_ids     read the rows' responses, too, which end with one of these ids; None = prompts alone

    Raises FileNotFoundError or ValueError, one line naming the culprit.
    """
    templated = resolve_chat_template(chat_template, tokenizer)
    _check_lengths(max_prompt_length, truncate_prompt_to, cuts_allowed=not templated and not domain_suffixes)
    if truncate_prompt_to is not None and response_end_ids is not None:
        raise ValueError(
            f"truncate_prompt_to={truncate_prompt_to} would put a response behind a prompt without its end"
        )
    rows = read_rows(path, with_responses=response_end_ids is not None)
    options: dict[str, Any] = {
        "templated": templated,
        "enable_thinking": enable_thinking,
        "domain_suffixes": domain_suffixes,
    }
    ids = encode_rows(rows, tokenizer, **options)
    if truncate_prompt_to is not None:
        ids = [prompt[:truncate_prompt_to] for prompt in ids]
    for row, prompt in zip(rows, ids, strict=True):
        _check_tokens(row, "prompt", prompt, mask_token_id)
    kept = [i for i, prompt in enumerate(ids) if len(prompt) <= max_prompt_length]
    if not kept:
        shortest = min(map(len, ids))
        raise ValueError(f"{path}: no prompt fits max_prompt_length={max_prompt_length}, the shortest has {shortest}")
    num_dropped, rows, ids = len(rows) - len(kept), [rows[i] for i in kept], [ids[i] for i in kept]
    responses = None
    if response_end_ids is not None:
        responses = _responses(rows, ids, tokenizer, mask_token_id, **options, end_token_ids=response_end_ids)
    return PromptDataset.of(
        ids,
        row_ids=tuple(row.row_id for row in rows),
        domains=tuple(row.domain for row in rows),
        num_dropped_too_long=num_dropped,
        uses_chat_template=templated,
        responses=responses,
    )


def _responses(
    rows: Sequence[PromptRow],
    prompts: Sequence[list[int]],
    tokenizer: "PreTrainedTokenizerBase",
    mask_token_id: int | None,
    *,
    end_token_ids: Collection[int],
    **options: Any,
) -> Texts:
    responses = encode_responses(rows, prompts, tokenizer, end_token_ids=end_token_ids, **options)
    for row, response in zip(rows, responses, strict=True):
        _check_tokens(row, "response", [token for token in response if token not in end_token_ids], mask_token_id)
    return Texts.of(responses)


def _check_tokens(row: PromptRow, name: str, ids: list[int], mask_token_id: int | None) -> None:
    if not ids:
        raise ValueError(f"{row.where}: the {name} has no tokens")
    if mask_token_id in ids:
        raise ValueError(f"{row.where}: the {name} contains the mask token (id {mask_token_id})")


def _check_lengths(max_prompt_length: int, truncate_prompt_to: int | None, *, cuts_allowed: bool) -> None:
    if max_prompt_length < 1:
        raise ValueError(f"max_prompt_length must be at least 1, got {max_prompt_length}")
    if truncate_prompt_to is None:
        return
    if not 1 <= truncate_prompt_to <= max_prompt_length:
        raise ValueError(
            f"truncate_prompt_to must be in [1, max_prompt_length={max_prompt_length}], got {truncate_prompt_to}"
        )
    if not cuts_allowed:
        # Both would be cut away: the generation prompt, and a suffix.
        raise ValueError("truncate_prompt_to is for raw text: set chat_template to false and give no domain_suffixes")
