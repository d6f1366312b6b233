"""Which token stands for "masked". The choice is made once, at conversion, and written into the tokenizer."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nemo_opdlm.convert.setting_values import token_ids
from nemo_opdlm.convert.tokenizer_files import Files, TokenizerFacts, read_facts
from nemo_opdlm.data.shown import shown

DEFAULT_NAME = "<|MASK|>"
# The serving engines hard-code this row of the Qwen3 table, which no Qwen3 tokenizer uses.
QWEN3_MASK_ID = 151669


@dataclass(frozen=True)
class MaskToken:
    """The chosen mask token.

    Attributes:
        token: its text, registered as a special token.
        token_id: its row in the embedding.
        added_rows: 1 when the embedding had no free row and one is added, else 0.
    """

    token: str
    token_id: int
    added_rows: int = 0


def choose_mask_token(
    files: Files,
    family: str,
    vocab_size: int,
    config: Mapping[str, Any],
    generation_config: Mapping[str, Any],
    given: str | None = None,
) -> MaskToken:
    """Choose the mask token.

    In this order: the given token (an unused special token of the tokenizer, or a new name for one of the rows below);
    the tokenizer's own mask token, or the config's `mask_token_id` (SDAR folders); Qwen3's 151669; the first row
    without a tokenizer entry; one added row.

    Args:
        files: the tokenizer's files.
        family: `llama`, `qwen2` or `qwen3`.
        vocab_size: rows of the embedding.
        config: parsed `config.json`.
        generation_config: parsed `generation_config.json`, may be empty.
        given: the user's choice.

    Raises:
        ValueError: the token is outside the table, ordinary text, or has another role.
    """
    facts = read_facts(files)
    highest = max(facts.ids.values())
    if highest >= vocab_size:
        raise ValueError(f"the tokenizer has ids up to {highest}, but the embedding only {vocab_size} rows")
    if given is not None and given in facts.ids:
        mask = MaskToken(given, facts.ids[given])
    elif given is not None:
        mask = _free_row(facts, family, vocab_size, given)
    else:
        mask = _own_mask_token(facts, config) or _free_row(facts, family, vocab_size, DEFAULT_NAME)
    _check(
        mask, facts, vocab_size, (config, generation_config), allow_bos=given is not None or "mask_token" in facts.named
    )
    return mask


def append_mask_row(table: Tensor, added_rows: int) -> Tensor:
    """Add rows to an embedding or head [V, H]: the mean of all rows.

    The mean says "any token" without a seed; a zero row would stay zero through RMSNorm and say nothing at all.
    Computed in fp32, stored in the table's type.
    """
    if not added_rows:
        return table
    mean = table.float().mean(dim=0, keepdim=True).to(table.dtype)
    return torch.cat([table, mean.expand(added_rows, -1)])


def _own_mask_token(facts: TokenizerFacts, config: Mapping[str, Any]) -> MaskToken | None:
    """The mask token that the folder itself declares, None when it declares none."""
    name = facts.named.get("mask_token", DEFAULT_NAME)
    tokenizer_id, config_id = facts.ids.get(name), config.get("mask_token_id")
    if config_id is not None and type(config_id) is not int:
        raise ValueError(f"config.json has mask_token_id={shown(config_id)}, which is no token id")
    if tokenizer_id is not None and config_id is not None and tokenizer_id != config_id:
        raise ValueError(
            f"config.json has mask_token_id={config_id}, but the tokenizer's mask token {name!r} is {tokenizer_id}; "
            "name the right one with --mask_token"
        )
    token_id = config_id if tokenizer_id is None else tokenizer_id
    if token_id is None:
        return None
    return MaskToken(next((token for token, id in facts.ids.items() if id == token_id), name), token_id)


def _free_row(facts: TokenizerFacts, family: str, vocab_size: int, name: str) -> MaskToken:
    used = set(facts.ids.values())
    if family == "qwen3" and vocab_size > QWEN3_MASK_ID and QWEN3_MASK_ID not in used:
        return MaskToken(name, QWEN3_MASK_ID)
    free = next((row for row in range(vocab_size) if row not in used), None)
    return MaskToken(name, vocab_size, added_rows=1) if free is None else MaskToken(name, free)


def _check(
    mask: MaskToken,
    facts: TokenizerFacts,
    vocab_size: int,
    configs: tuple[Mapping[str, Any], ...],
    allow_bos: bool,
) -> None:
    what = f"mask token {shown(mask.token)} (id {mask.token_id})"
    if not isinstance(mask.token_id, int) or not 0 <= mask.token_id < vocab_size + mask.added_rows:
        raise ValueError(f"{what} is outside the embedding of {vocab_size} rows")
    for role in ("pad", "eos") if allow_bos else ("pad", "eos", "bos"):
        if mask.token_id in _ids_in_role(role, facts, configs):
            raise ValueError(f"{what} is also the {role} token; choose another with --mask_token")
    if mask.token not in facts.ids:
        return
    if mask.token_id not in facts.special_ids:
        raise ValueError(f"{what} is an ordinary token of text; give an unused special token or a new name")
    if mask.token_id in facts.inserted_ids or mask.token in facts.chat_template:
        raise ValueError(f"{what} occurs in every prompt (added by the tokenizer or its chat template); choose another")


def _ids_in_role(role: str, facts: TokenizerFacts, configs: tuple[Mapping[str, Any], ...]) -> set[Any]:
    """Every id that plays a role, in the tokenizer or in a config (which may list several)."""
    found = {facts.id_of(f"{role}_token")}
    for config in configs:
        found |= set(token_ids(config, f"{role}_token_id"))
    return found
