"""The choice of the mask token: its order, and every clash it must refuse."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from nemo_opdlm.convert.mask_token import MaskToken, append_mask_row, choose_mask_token

Files = dict[str, bytes]
MakeFiles = Callable[..., Files]


def choose(files: Files, given: str | None = None, rows: int = 48, family: str = "llama", **config: Any) -> MaskToken:
    return choose_mask_token(files, family, rows, config, {}, given)


def test_the_tokenizers_own_mask_token_comes_first(make_tokenizer_files: MakeFiles) -> None:
    assert choose(make_tokenizer_files(mask_token="<unused>")) == MaskToken("<unused>", 3)


def test_an_sdar_config_names_the_mask_row(make_tokenizer_files: MakeFiles) -> None:
    assert choose(make_tokenizer_files(), mask_token_id=44) == MaskToken("<|MASK|>", 44)
    assert choose(make_tokenizer_files(), mask_token_id=3) == MaskToken("<unused>", 3)


def test_qwen3_uses_the_row_that_engines_expect(make_tokenizer_files: MakeFiles) -> None:
    assert choose(make_tokenizer_files(), rows=151936, family="qwen3") == MaskToken("<|MASK|>", 151669)


def test_other_models_use_the_first_row_without_a_tokenizer_entry(make_tokenizer_files: MakeFiles) -> None:
    assert choose(make_tokenizer_files(words=40)) == MaskToken("<|MASK|>", 40)
    assert choose(make_tokenizer_files(words=40), rows=151936, family="qwen2") == MaskToken("<|MASK|>", 40)


def test_a_full_vocabulary_gets_one_more_row(make_tokenizer_files: MakeFiles) -> None:
    assert choose(make_tokenizer_files(words=48)) == MaskToken("<|MASK|>", 48, added_rows=1)


def test_a_given_new_name_takes_the_free_row(make_tokenizer_files: MakeFiles) -> None:
    assert choose(make_tokenizer_files(), given="<blank>") == MaskToken("<blank>", 40)


@pytest.mark.parametrize(("given", "row"), [("<unused>", 3), ("<bos>", 2)])
def test_a_given_special_token_is_reused(make_tokenizer_files: MakeFiles, given: str, row: int) -> None:
    assert choose(make_tokenizer_files(), given=given) == MaskToken(given, row)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("<pad>", r"mask token '<pad>' \(id 0\) is also the pad token"),
        ("<eos>", r"mask token '<eos>' \(id 1\) is also the eos token"),
        ("w7", r"mask token 'w7' \(id 7\) is an ordinary token of text"),
    ],
)
def test_a_given_token_with_another_role_is_refused(make_tokenizer_files: MakeFiles, given: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose(make_tokenizer_files(), given=given)


def test_the_mask_token_that_a_folder_declares_counts_like_a_given_one(make_tokenizer_files: MakeFiles) -> None:
    # An export whose mask token reuses the beginning of text can be imported again.
    assert choose(make_tokenizer_files(mask_token="<bos>")).token_id == 2


@pytest.mark.parametrize("config", [{"eos_token_id": [1, 3]}, {"pad_token_id": 3}])
def test_roles_that_only_the_config_knows_count_too(make_tokenizer_files: MakeFiles, config: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"mask token '<unused>' \(id 3\) is also the (eos|pad) token"):
        choose(make_tokenizer_files(), given="<unused>", **config)


def test_a_token_of_the_chat_template_is_refused(make_tokenizer_files: MakeFiles) -> None:
    with pytest.raises(ValueError, match="occurs in every prompt"):
        choose(make_tokenizer_files(chat_template="{{ '<unused>' + messages[0]['content'] }}"), given="<unused>")
    with pytest.raises(ValueError, match="occurs in every prompt"):
        choose({**make_tokenizer_files(), "chat_template.jinja": b"<unused>{{ messages }}"}, given="<unused>")


def test_a_token_that_the_tokenizer_inserts_is_refused(make_tokenizer_files: MakeFiles) -> None:
    from tokenizers import Tokenizer, processors

    files = make_tokenizer_files()
    tokenizer = Tokenizer.from_buffer(files["tokenizer.json"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    with pytest.raises(ValueError, match=r"'<bos>' \(id 2\) occurs in every prompt"):
        choose({**files, "tokenizer.json": tokenizer.to_str().encode()}, given="<bos>")
    with pytest.raises(ValueError, match=r"'<bos>' \(id 2\) occurs in every prompt"):
        choose(make_tokenizer_files(add_bos_token=True), given="<bos>")


def test_a_row_outside_the_table_is_refused(make_tokenizer_files: MakeFiles) -> None:
    with pytest.raises(ValueError, match=r"mask token '<\|MASK\|>' \(id 48\) is outside the embedding of 48 rows"):
        choose(make_tokenizer_files(), mask_token_id=48)


def test_a_config_that_contradicts_the_tokenizer_is_refused(make_tokenizer_files: MakeFiles) -> None:
    with pytest.raises(ValueError, match="mask_token_id=44, but the tokenizer's mask token '<unused>' is 3"):
        choose(make_tokenizer_files(mask_token="<unused>"), mask_token_id=44)


def test_a_tokenizer_larger_than_the_embedding_is_refused(make_tokenizer_files: MakeFiles) -> None:
    with pytest.raises(ValueError, match="the tokenizer has ids up to 39, but the embedding only 32 rows"):
        choose(make_tokenizer_files(), rows=32)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_broken_tokenizer_file_is_named(make_tokenizer_files: MakeFiles, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} cannot be read"):
        choose({**make_tokenizer_files(), name: b"{"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_added_row_is_the_mean_of_all_rows(dtype: torch.dtype) -> None:
    table = torch.randn(48, 8).to(dtype)
    longer = append_mask_row(table, 1)
    assert torch.equal(longer[:48], table)
    torch.testing.assert_close(longer[48], table.double().mean(0).to(dtype))


def test_no_row_is_added_where_one_is_free() -> None:
    table = torch.randn(4, 2)
    assert append_mask_row(table, 0) is table


def test_special_tokens_written_with_flags_are_understood(make_tokenizer_files: MakeFiles) -> None:
    files = make_tokenizer_files()
    config = json.loads(files["tokenizer_config.json"]) | {"mask_token": {"content": "<unused>", "lstrip": True}}
    assert choose({**files, "tokenizer_config.json": json.dumps(config).encode()}).token_id == 3
