"""The tokenizer of a model folder, and which ids end a turn or may never be proposed."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nemo_opdlm.data.bounded import MAX_JSON_BYTES, parse_json, read_bounded
from nemo_opdlm.data.shown import shortened, shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHATML_END_OF_TURN = "<|im_end|>"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def load_tokenizer(path: str | Path, *, trust_remote_code: bool = False) -> "PreTrainedTokenizerBase":
    """Load the tokenizer of a local model folder; the network is never asked.

    Raises FileNotFoundError if the folder or its tokenizer files are missing, ValueError if they cannot be read.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"tokenizer folder {path} does not exist")
    if not any((path / name).is_file() for name in _TOKENIZER_FILES):
        raise FileNotFoundError(f"{path} holds no tokenizer: expected one of {', '.join(_TOKENIZER_FILES)}")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=trust_remote_code)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the tokenizers library raises bare Exception, and its panics are not even that
        reason = shortened((str(error).strip().splitlines() or [type(error).__name__])[0])
        raise ValueError(f"cannot read the tokenizer in {path}: {reason}") from error


def text_of(tokenizer: "PreTrainedTokenizerBase", token_ids: Tensor | list[int], **options: bool) -> str:
    """The text of one row of token ids; the tokenizer's own `decode` also takes many rows, and returns as many texts."""
    text = tokenizer.decode(token_ids, **options)
    assert isinstance(text, str)
    return text


def resolve_end_token_ids(
    tokenizer: "PreTrainedTokenizerBase", model_path: str | Path | None = None
) -> tuple[int, ...]:
    """Ids that end a response: the tokenizer's, those of `generation_config.json`, and ChatML's `<|im_end|>`.

    Sorted, without repeats; empty if the model has no end token (a response then runs to its length limit).
    `model_path` is the folder that may hold `generation_config.json`. Raises ValueError if that file is malformed.
    """
    ids = set() if tokenizer.eos_token_id is None else {int(tokenizer.eos_token_id)}
    if CHATML_END_OF_TURN in (vocabulary := tokenizer.get_vocab()):
        ids.add(vocabulary[CHATML_END_OF_TURN])
    if model_path is not None:
        ids.update(_generation_config_end_ids(Path(model_path) / "generation_config.json"))
    return tuple(sorted(ids))


def _generation_config_end_ids(path: Path) -> list[int]:
    if not path.is_file():
        return []
    content = read_bounded(path, MAX_JSON_BYTES)
    try:
        config: Any = parse_json(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path}: must be a JSON object, got {type(config).__name__}")
    ids = config.get("eos_token_id")
    ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise ValueError(f"{path}: eos_token_id must be a token id or a list of them, got {shown(ids)}")
    return ids


def forbidden_ids(
    tokenizer: "PreTrainedTokenizerBase",
    vocab_size: int,
    mask_token_id: int,
    pad_id: int | None,
    *,
    end_token_ids: tuple[int, ...] | None = None,
) -> Tensor:
    """Vocabulary rows the sampler must never propose: bool [vocab_size].

    True for the mask token, the padding token unless it also ends a turn, and rows without a tokenizer entry.
    `vocab_size` may include rows added by vocabulary padding. `end_token_ids` defaults to the tokenizer's own.

    Raises ValueError if an id lies outside the table or the mask token clashes with padding or an end token.
    """
    end_ids = set(resolve_end_token_ids(tokenizer) if end_token_ids is None else end_token_ids)
    known = set(tokenizer.get_vocab().values())
    if max(known) >= vocab_size:
        raise ValueError(f"the tokenizer has id {max(known)}, outside the model's {vocab_size} vocabulary rows")
    pad_ids = set() if pad_id is None else {pad_id}
    for name, ids in (("mask_token_id", {mask_token_id}), ("pad_id", pad_ids), ("end_token_ids", end_ids)):
        if not all(0 <= i < vocab_size for i in ids):
            raise ValueError(f"{name} {sorted(ids)} lies outside the model's {vocab_size} vocabulary rows")
    if mask_token_id in pad_ids | end_ids:
        clash = "the padding" if mask_token_id in pad_ids else "an end-of-turn"
        raise ValueError(f"mask_token_id {mask_token_id} is also {clash} token; choose an unused vocabulary row")
    forbidden = torch.ones(vocab_size, dtype=torch.bool)
    forbidden[torch.tensor(sorted(known))] = False
    forbidden[torch.tensor(sorted({mask_token_id} | (pad_ids - end_ids)))] = True
    return forbidden
