"""Prompt files as token ids, made once at set-up."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from nemo_opdlm.data.rows import PromptRow, read_rows
from nemo_opdlm.data.shown import shortened

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# User-text endings of the published general recipe; its code and chat prompts have none.
PUBLISHED_DOMAIN_SUFFIXES: Mapping[str, str] = {
    "math": "\nPlease reason step by step, and put your final answer within \\boxed{}.",
    "science": '\nPlease show your choice in the answer field with only the choice letter, e.g., "answer": "C".',
}
_ROWS_PER_TOKENIZER_CALL = 1024


@dataclass(frozen=True)
class PromptDataset:
    """Tokenised prompts, in file order.

    token_ids   int64 [sum P]   all prompts end to end
    offsets     int64 [n + 1]   prompt i is token_ids[offsets[i]:offsets[i + 1]]
    row_ids     n names: the row's `id`, else its line or row number in the file
    domains     n names, None where the row names none
    """

    token_ids: Tensor
    offsets: Tensor
    row_ids: tuple[str, ...]
    domains: tuple[str | None, ...]
    num_dropped_too_long: int
    uses_chat_template: bool

    def __len__(self) -> int:
        """Number of prompts kept."""
        return len(self.row_ids)

    def __getitem__(self, index: int) -> Tensor:
        """Prompt `index` as int64 [P], a view. Negative indices raise IndexError: a schedule never makes one."""
        if not 0 <= index < len(self):
            raise IndexError(f"prompt {index} of {len(self)}")
        return self.token_ids[self.offsets[index] : self.offsets[index + 1]]

    def __iter__(self) -> Iterator[Tensor]:
        """Every prompt in file order."""
        return (self[i] for i in range(len(self)))

    @property
    def prompt_len(self) -> Tensor:
        """Tokens per prompt, int64 [n]."""
        return self.offsets.diff()

    def checksum(self) -> str:
        """SHA-256 over ids, lengths and domains: equal if and only if a run would see the same prompts."""
        digest = hashlib.sha256(repr(self.domains).encode())
        for tensor in (self.offsets, self.token_ids):
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
) -> PromptDataset:
    """Read a prompt file (see `rows.read_rows`) and tokenise it.

    With a chat template a row becomes its turns plus the generation prompt, and no system message is added; without
    one it is raw text, encoded as the tokenizer encodes a document's start. "auto" uses the template if there is one.

    max_prompt_length    prompts with more tokens are dropped, before any rollout, and counted
    truncate_prompt_to   raw text only: keep the first N tokens of each prompt
    domain_suffixes      domain -> text appended to the last user turn, e.g. PUBLISHED_DOMAIN_SUFFIXES
    mask_token_id        refuse prompts holding this id: a sampler could not tell it from a position to fill

    Raises FileNotFoundError or ValueError, one line naming the culprit.
    """
    templated = resolve_chat_template(chat_template, tokenizer)
    _check_lengths(max_prompt_length, truncate_prompt_to, cuts_allowed=not templated and not domain_suffixes)
    rows = read_rows(path)
    ids = encode_rows(
        rows, tokenizer, templated=templated, enable_thinking=enable_thinking, domain_suffixes=domain_suffixes
    )
    if truncate_prompt_to is not None:
        ids = [prompt[:truncate_prompt_to] for prompt in ids]
    for row, prompt in zip(rows, ids, strict=True):
        if not prompt:
            raise ValueError(f"{row.where}: the prompt has no tokens")
        if mask_token_id in prompt:
            raise ValueError(f"{row.where}: the prompt contains the mask token (id {mask_token_id})")
    kept = [i for i, prompt in enumerate(ids) if len(prompt) <= max_prompt_length]
    if not kept:
        shortest = min(map(len, ids))
        raise ValueError(f"{path}: no prompt fits max_prompt_length={max_prompt_length}, the shortest has {shortest}")
    return PromptDataset(
        token_ids=torch.tensor([token for i in kept for token in ids[i]], dtype=torch.int64),
        offsets=torch.tensor(list(accumulate((len(ids[i]) for i in kept), initial=0)), dtype=torch.int64),
        row_ids=tuple(rows[i].row_id for i in kept),
        domains=tuple(rows[i].domain for i in kept),
        num_dropped_too_long=len(rows) - len(kept),
        uses_chat_template=templated,
    )


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
    suffixes = [(domain_suffixes or {}).get(row.domain or "", "") for row in rows]
    if templated:
        texts = [_render(row, suffix, tokenizer, enable_thinking) for row, suffix in zip(rows, suffixes, strict=True)]
    else:
        texts = [_raw_text(row) + suffix for row, suffix in zip(rows, suffixes, strict=True)]
    texts = [text + opening for text, opening in zip(texts, openings or [""] * len(texts), strict=True)]
    try:
        return _tokenize(texts, tokenizer, templated)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the tokenizers library raises bare Exception, and its panics are not even that
        where = f"{rows[0].where} to {rows[-1].where}" if len(rows) > 1 else rows[0].where
        reason = shortened(" ".join(str(error).split()) or type(error).__name__)
        raise ValueError(f"{where}: the tokenizer cannot encode the prompts: {reason}") from error


def resolve_chat_template(requested: bool | str, tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether to apply the tokenizer's chat template; "auto" = if it has one. Raises ValueError if true and it has none."""
    if requested not in (True, False, "auto"):
        raise ValueError(f"chat_template must be true, false or 'auto', got {requested!r}")
    available = bool(tokenizer.chat_template)
    if requested is True and not available:
        raise ValueError("chat_template is true, but the tokenizer has no chat template; use 'auto' or false")
    return available if requested == "auto" else bool(requested)


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


def _render(row: PromptRow, suffix: str, tokenizer: "PreTrainedTokenizerBase", enable_thinking: bool) -> str:
    try:
        text = tokenizer.apply_chat_template(
            row.conversation(suffix), tokenize=False, add_generation_prompt=True, enable_thinking=enable_thinking
        )
    except Exception as error:  # templates refuse e.g. two user turns in a row; a faulty one raises anything
        reason = shortened(" ".join(str(error).split()) or type(error).__name__)
        raise ValueError(f"{row.where}: the chat template refuses this row: {reason}") from None
    return str(text)


def _raw_text(row: PromptRow) -> str:
    if row.text is None:
        raise ValueError(f"{row.where}: 'messages' need a chat template, and none is in use; give 'prompt' instead")
    return row.text


def _tokenize(texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase", templated: bool) -> list[list[int]]:
    """Token ids per text. A template writes its own special tokens; raw text gets the tokenizer's (BOS, if any)."""
    ids: list[list[int]] = []
    for start in range(0, len(texts), _ROWS_PER_TOKENIZER_CALL):
        chunk = list(texts[start : start + _ROWS_PER_TOKENIZER_CALL])
        # verbose=False: "longer than the model's maximum length" is ours to judge, by max_prompt_length.
        ids += tokenizer(chunk, add_special_tokens=not templated, verbose=False)["input_ids"]
    if not templated:
        # A few tokenizers close every text with the end token; a prompt must stay open.
        ids = [prompt[:-1] if prompt and prompt[-1] == tokenizer.eos_token_id else prompt for prompt in ids]
    return ids
