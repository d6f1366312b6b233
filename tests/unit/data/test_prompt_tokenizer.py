"""Loading a tokenizer from a folder, end-of-turn ids, and the rows that may never be proposed."""

import copy
import json

import pytest
import torch

from nemo_opdlm.data.tokenizer import forbidden_ids, load_tokenizer, resolve_end_token_ids

ENDOFTEXT, IM_START, IM_END = 256, 257, 258


def test_a_saved_tokenizer_comes_back_with_its_chat_template(tmp_path, chat_tokenizer):
    chat_tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.chat_template == chat_tokenizer.chat_template
    text = "Curious, <|im_end|>\n é"
    assert loaded(text)["input_ids"] == chat_tokenizer(text)["input_ids"]


def test_missing_and_broken_tokenizers_are_refused_in_one_line(tmp_path, raw_tokenizer):
    with pytest.raises(FileNotFoundError, match=r"tokenizer folder .*nowhere does not exist"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"holds no tokenizer: expected one of tokenizer\.json"):
        load_tokenizer(tmp_path)
    raw_tokenizer.save_pretrained(tmp_path)
    for broken in ("{", '{"model": 3}'):
        (tmp_path / "tokenizer.json").write_text(broken)
        with pytest.raises(ValueError, match=f"cannot read the tokenizer in {tmp_path}: ") as caught:
            load_tokenizer(tmp_path)
        assert "\n" not in str(caught.value)


def test_end_ids_come_from_tokenizer_generation_config_and_chatml(tmp_path, raw_tokenizer, chat_tokenizer):
    assert resolve_end_token_ids(raw_tokenizer) == (ENDOFTEXT,)
    assert resolve_end_token_ids(chat_tokenizer) == (IM_END,)
    assert resolve_end_token_ids(chat_tokenizer, tmp_path) == (IM_END,), "no generation_config.json is fine"
    config = tmp_path / "generation_config.json"
    for stored, expected in (
        (ENDOFTEXT, (ENDOFTEXT, IM_END)),
        ([IM_END, ENDOFTEXT], (ENDOFTEXT, IM_END)),
        (None, (IM_END,)),
    ):
        config.write_text(json.dumps({"eos_token_id": stored}))
        assert resolve_end_token_ids(chat_tokenizer, tmp_path) == expected


def test_a_chatml_end_of_turn_counts_even_if_the_tokenizer_names_another_end(chat_tokenizer):
    base = copy.deepcopy(chat_tokenizer)
    base.eos_token = "<|endoftext|>"
    assert resolve_end_token_ids(base) == (ENDOFTEXT, IM_END)
    base.eos_token = None
    assert resolve_end_token_ids(base) == (IM_END,)


@pytest.mark.parametrize(
    "content", ["{", '{"eos_token_id": "</s>"}', '{"eos_token_id": [1, -2]}', "[7]", '{"eos_token_id": true}']
)
def test_a_malformed_generation_config_is_refused_by_name(tmp_path, chat_tokenizer, content):
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(ValueError, match=r"generation_config\.json: "):
        resolve_end_token_ids(chat_tokenizer, tmp_path)


def test_mask_padding_and_empty_rows_are_forbidden_and_nothing_else(chat_tokenizer):
    table = forbidden_ids(chat_tokenizer, 264, mask_token_id=260, pad_id=ENDOFTEXT)
    assert table.dtype == torch.bool and table.shape == (264,)
    assert table.nonzero().flatten().tolist() == [ENDOFTEXT, 259, 260, 261, 262, 263]


def test_a_mask_token_with_a_tokenizer_entry_is_still_forbidden(chat_tokenizer):
    table = forbidden_ids(chat_tokenizer, 259, mask_token_id=IM_START, pad_id=None)
    assert table.nonzero().flatten().tolist() == [IM_START]


def test_padding_that_also_ends_a_turn_may_be_proposed(raw_tokenizer, chat_tokenizer):
    assert not forbidden_ids(raw_tokenizer, 260, mask_token_id=259, pad_id=ENDOFTEXT)[ENDOFTEXT]
    ends = (ENDOFTEXT, IM_END)
    assert not forbidden_ids(chat_tokenizer, 260, 259, ENDOFTEXT, end_token_ids=ends)[list(ends)].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 200}, "the tokenizer has id 258, outside the model's 200 vocabulary rows"),
        ({"mask_token_id": 264}, r"mask_token_id \[264\] lies outside the model's 264 vocabulary rows"),
        ({"mask_token_id": -1}, r"mask_token_id \[-1\] lies outside"),
        ({"pad_id": 300}, r"pad_id \[300\] lies outside"),
        ({"end_token_ids": (258, 999)}, r"end_token_ids \[258, 999\] lies outside"),
        ({"mask_token_id": ENDOFTEXT}, "mask_token_id 256 is also the padding token"),
        ({"mask_token_id": IM_END}, "mask_token_id 258 is also an end-of-turn token"),
    ],
)
def test_clashing_and_outside_ids_are_refused(chat_tokenizer, options, message):
    defaults = {"vocab_size": 264, "mask_token_id": 260, "pad_id": ENDOFTEXT}
    with pytest.raises(ValueError, match=message):
        forbidden_ids(chat_tokenizer, **(defaults | options))
