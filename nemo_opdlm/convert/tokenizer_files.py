"""A Hugging Face tokenizer as a set of files: what it knows, and adding or removing a mask token.

Files are edited as JSON, not re-saved by transformers: every other setting keeps its exact value, and serving engines
on older transformers versions can still read the result.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nemo_opdlm.convert.hf_folder import dump_json
from nemo_opdlm.convert.plain_settings import one_line
from nemo_opdlm.data.bounded import parse_json

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS_MAP = "special_tokens_map.json"
ADDED_TOKENS = "added_tokens.json"
CHAT_TEMPLATE = "chat_template.jinja"
_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")
NAMED_TOKENS = (*_ROLES, "mask_token")
# transformers 4 and 5 call the same list by different names.
_SPECIAL_LISTS = _TRANSFORMERS_4, _TRANSFORMERS_5 = ("additional_special_tokens", "extra_special_tokens")

#: Characters; what is called the end of a text has a few.
_LONGEST_TOKEN = 200

Files = Mapping[str, bytes]


@dataclass(frozen=True)
class TokenizerFacts:
    """What the choice of a mask token depends on.

    Attributes:
        ids: token -> id, added tokens included.
        special_ids: ids of tokens registered as special.
        named: `bos_token` ... `mask_token` -> token, where set.
        inserted_ids: ids that the tokenizer puts into every text by itself.
        chat_template: text of the chat template(s), empty without one.
    """

    ids: dict[str, int]
    special_ids: frozenset[int]
    named: dict[str, str]
    inserted_ids: frozenset[int]
    chat_template: str

    def id_of(self, name: str) -> int | None:
        """Id of a named token such as `eos_token`, None where unset."""
        return self.ids.get(self.named.get(name, ""))


def read_facts(files: Files) -> TokenizerFacts:
    """Read the facts.

    Raises:
        ValueError: tokenizer.json or its config cannot be read.
    """
    _tokenizer_json(files)
    config = _read(files, TOKENIZER_CONFIG)
    named = {**_read(files, SPECIAL_TOKENS_MAP), **config}
    tokens = {name: _content(named[name], name) for name in NAMED_TOKENS if named.get(name)}
    ids, special_ids, inserted = _vocabulary(files[TOKENIZER])
    if not ids:
        raise ValueError(f"{TOKENIZER} has no tokens")
    if config.get("add_bos_token") and "bos_token" in tokens:
        inserted |= {ids.get(tokens["bos_token"], -1)}
    return TokenizerFacts(
        ids=ids,
        special_ids=frozenset(special_ids),
        named=tokens,
        inserted_ids=frozenset(inserted),
        chat_template=_text(files, CHAT_TEMPLATE) + json.dumps(config.get("chat_template")),
    )


def _vocabulary(tokenizer_json: bytes) -> tuple[dict[str, int], set[int], set[int]]:
    """Token -> id, the ids of special tokens, and those that are put into every text."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_buffer(tokenizer_json)
        inserted = set(tokenizer.encode("a").ids) - set(tokenizer.encode("a", add_special_tokens=False).ids)
        special = {id for id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        return tokenizer.get_vocab(with_added_tokens=True), special, inserted
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the Rust library raises plain Exception, and its panics are not even that
        raise ValueError(f"{TOKENIZER} cannot be read: {one_line(error)}") from error


def register_mask_token(files: Files, token: str, token_id: int) -> dict[str, bytes]:
    """Make `token` the mask token of a tokenizer, adding it where it is new.

    Returns:
        New files; every id of the old tokenizer is unchanged.

    Raises:
        ValueError: the tokenizer cannot hold a token of that id.
    """
    edited = dict(files)
    if token not in read_facts(files).ids:
        edited[TOKENIZER] = _with_token(files, token, token_id)
    added = {entry["id"]: entry for entry in _tokenizer_json(edited)["added_tokens"]}

    config = _read(files, TOKENIZER_CONFIG)
    config["mask_token"] = token
    tokens = {**_read(files, SPECIAL_TOKENS_MAP), **config}
    decoder = config["added_tokens_decoder"] = dict(_section(config, "added_tokens_decoder", TOKENIZER_CONFIG))
    for id, entry in added.items():
        decoder.setdefault(str(id), {key: value for key, value in entry.items() if key != "id"})
    special_list = next((name for name in _SPECIAL_LISTS if isinstance(config.get(name), list)), _SPECIAL_LISTS[0])
    config[special_list] = specials = list(config.get(special_list) or ())
    roles = {_content(tokens[name], name) for name in _ROLES if tokens.get(name)}
    if token not in roles | {_content(entry, special_list) for entry in specials}:
        specials.append(token)
    edited[TOKENIZER_CONFIG] = dump_json(config).encode()

    named = {name: tokens[name] for name in NAMED_TOKENS if tokens.get(name)}
    special_map = {**_read(files, SPECIAL_TOKENS_MAP), **named, _SPECIAL_LISTS[0]: specials}
    edited[SPECIAL_TOKENS_MAP] = dump_json(special_map).encode()
    vocabulary = _words(_tokenizer_json(files)["model"].get("vocab"))
    if token not in vocabulary:
        outside = {entry["content"]: id for id, entry in added.items() if entry["content"] not in vocabulary}
        edited[ADDED_TOKENS] = dump_json({**outside, **_read(files, ADDED_TOKENS)}).encode()
    return edited


def readable_by_transformers_4(files: Files) -> dict[str, bytes]:
    """Files with the names that transformers 4, and the serving engines built on it, understand."""
    config = _read(files, TOKENIZER_CONFIG)
    if isinstance(config.get(_TRANSFORMERS_5), list):
        config[_TRANSFORMERS_4] = config.pop(_TRANSFORMERS_5)
    if config.get("tokenizer_class") in (None, "TokenizersBackend"):
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    return {**files, TOKENIZER_CONFIG: dump_json(config).encode()}


def unregister_mask_token(files: Files, token: str, token_id: int) -> dict[str, bytes]:
    """Remove a token that `register_mask_token` added."""
    edited = dict(files)
    content = _tokenizer_json(files)
    content["added_tokens"] = [entry for entry in content["added_tokens"] if entry["content"] != token]
    if isinstance(content["model"].get("vocab"), dict):
        content["model"]["vocab"].pop(token, None)
    edited[TOKENIZER] = dump_json(content).encode()
    for name in (TOKENIZER_CONFIG, SPECIAL_TOKENS_MAP, ADDED_TOKENS):
        settings = _read(files, name)
        settings.pop(token, None)
        _section(settings, "added_tokens_decoder", name).pop(str(token_id), None)
        for special_list in _SPECIAL_LISTS:
            if isinstance(settings.get(special_list), list):
                kept = [entry for entry in settings[special_list] if _content(entry, special_list) != token]
                settings[special_list] = kept
        if settings.get("mask_token") and _content(settings["mask_token"], "mask_token") == token:
            del settings["mask_token"]
        if name in files:
            edited[name] = dump_json(settings).encode()
    return edited


def _with_token(files: Files, token: str, token_id: int) -> bytes:
    """Add a special token under a given id, and prove by reading it back that nothing else moved."""
    content = _tokenizer_json(files)
    before, *_ = _vocabulary(files[TOKENIZER])
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    entry = {"id": token_id, "content": token, **flags, "special": True}
    content["added_tokens"] = sorted([*content["added_tokens"], entry], key=lambda added: added["id"])
    for has_gap in (False, True):
        if has_gap and isinstance(content["model"].get("vocab"), dict):
            # Added tokens are numbered consecutively unless the model's own vocabulary fixes their ids.
            for added in content["added_tokens"]:
                content["model"]["vocab"].setdefault(added["content"], added["id"])
        edited = dump_json(content).encode()
        if _vocabulary(edited)[0] == {**before, token: token_id}:
            return edited
    raise ValueError(f"the tokenizer cannot hold the mask token {token!r} as id {token_id}: its ids would move")


def _tokenizer_json(files: Files) -> dict[str, Any]:
    """tokenizer.json with the parts that are looked at here."""
    content = _read(files, TOKENIZER)
    added = content.setdefault("added_tokens", [])
    _section(content, "model", TOKENIZER)
    content.setdefault("model", {})
    for entry in added if isinstance(added, list) else [added]:
        if not isinstance(entry, dict) or type(entry.get("id")) is not int or not isinstance(entry.get("content"), str):
            raise ValueError(f"{TOKENIZER}: added_tokens must be a list of objects with id and content")
    return content


def _words(vocabulary: Any) -> set[str]:
    """The tokens of a model's own vocabulary, which is a table of ids or, for Unigram, a list of scores."""
    if isinstance(vocabulary, dict):
        return set(vocabulary)
    entries = vocabulary if isinstance(vocabulary, list) else ()
    return {entry[0] for entry in entries if isinstance(entry, list) and entry and isinstance(entry[0], str)}


def _read(files: Files, name: str) -> dict[str, Any]:
    try:
        content = parse_json(files.get(name, b"{}"))
    except ValueError as error:
        raise ValueError(f"{name} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{name} must hold a JSON object")
    return content


def _section(content: Mapping[str, Any], key: str, name: str) -> dict[str, Any]:
    section = content.get(key)
    if section is None:
        return {}
    if not isinstance(section, dict):
        raise ValueError(f"{name}: {key} must be a JSON object")
    return section


def _text(files: Files, name: str) -> str:
    try:
        return files.get(name, b"").decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 ({error.reason} at byte {error.start})") from None


def _content(token: Any, key: str) -> str:
    """Text of a token, which is written either plainly or as a dict with its flags."""
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str) or len(text) > _LONGEST_TOKEN:
        raise ValueError(f"{key} must be the text of a token, or an object with its content")
    return text
