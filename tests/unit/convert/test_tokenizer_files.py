"""Registering a mask token changes nothing else in a tokenizer, and can be undone."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_opdlm.convert.tokenizer_files import (
    read_facts,
    readable_by_transformers_4,
    register_mask_token,
    unregister_mask_token,
)

MakeFiles = Callable[..., dict[str, bytes]]


@pytest.mark.parametrize("row", [40, 47, 151669], ids=["next", "gap", "far"])
def test_a_new_token_gets_its_row_and_every_other_id_stays(make_tokenizer_files: MakeFiles, row: int) -> None:
    files = make_tokenizer_files()
    registered = read_facts(register_mask_token(files, "<|MASK|>", row))
    assert registered.ids == {**read_facts(files).ids, "<|MASK|>": row}
    assert row in registered.special_ids and registered.named["mask_token"] == "<|MASK|>"


def test_a_new_token_is_written_to_all_four_files(make_tokenizer_files: MakeFiles) -> None:
    edited = {
        name: json.loads(content)
        for name, content in register_mask_token(make_tokenizer_files(), "<|MASK|>", 40).items()
    }
    assert edited["tokenizer.json"]["added_tokens"][-1]["id"] == 40
    assert edited["tokenizer_config.json"]["added_tokens_decoder"]["40"]["content"] == "<|MASK|>"
    assert edited["added_tokens.json"] == {"<|MASK|>": 40}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        assert edited[name]["mask_token"] == "<|MASK|>"
        assert "<|MASK|>" in edited[name]["additional_special_tokens"]
    assert edited["special_tokens_map.json"]["eos_token"] == "<eos>"


@pytest.mark.parametrize("token", ["<|MASK|>", "<bos>"])
def test_registering_twice_is_registering_once(make_tokenizer_files: MakeFiles, token: str) -> None:
    row = read_facts(make_tokenizer_files()).ids.get(token, 40)
    once = register_mask_token(make_tokenizer_files(), token, row)
    assert register_mask_token(once, token, row) == once


def test_transformers_finds_the_mask_token(make_tokenizer_files: MakeFiles, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    for name, content in register_mask_token(make_tokenizer_files(), "<|MASK|>", 40).items():
        (tmp_path / name).write_bytes(content)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert (tokenizer.mask_token, tokenizer.mask_token_id, tokenizer.eos_token_id) == ("<|MASK|>", 40, 1)
    assert tokenizer("w7 <|MASK|> w8").input_ids == [7, 40, 8]


@pytest.mark.parametrize("row", [40, 47])
def test_unregistering_restores_the_tokenizer(make_tokenizer_files: MakeFiles, row: int) -> None:
    files = make_tokenizer_files(additional_special_tokens=["<unused>"])
    restored = unregister_mask_token(register_mask_token(files, "<|MASK|>", row), "<|MASK|>", row)
    assert read_facts(restored) == read_facts(files)
    assert all(b"<|MASK|>" not in content for content in restored.values())


def test_a_tokenizer_that_would_renumber_its_tokens_is_refused() -> None:
    from tokenizers import Tokenizer, models

    unigram = Tokenizer(models.Unigram([("a", 0.0), ("b", -1.0)], unk_id=0))
    with pytest.raises(ValueError, match=r"cannot hold the mask token '<\|MASK\|>' as id 7"):
        register_mask_token({"tokenizer.json": unigram.to_str().encode()}, "<|MASK|>", 7)


def test_names_of_transformers_5_are_translated_for_engines(make_tokenizer_files: MakeFiles) -> None:
    files = make_tokenizer_files(extra_special_tokens=["<unused>"], tokenizer_class="TokenizersBackend")
    registered = register_mask_token(files, "<|MASK|>", 40)
    config = json.loads(readable_by_transformers_4(registered)["tokenizer_config.json"])
    assert config["additional_special_tokens"] == ["<unused>", "<|MASK|>"]
    assert "extra_special_tokens" not in config and config["tokenizer_class"] == "PreTrainedTokenizerFast"
