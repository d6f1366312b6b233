"""Prompt text to token ids: the chat template, raw text, what is dropped and what is refused."""

import copy

import pytest
import torch

from nemo_opdlm.data.prompts import PUBLISHED_DOMAIN_SUFFIXES, load_prompts

LONG = 10_000


def decode(tokenizer, dataset):
    return [tokenizer.decode(prompt.tolist()) for prompt in dataset]


def test_a_chat_prompt_is_one_user_turn_without_system_message_and_an_open_assistant_turn(write_jsonl, chat_tokenizer):
    dataset = load_prompts(write_jsonl([{"prompt": "Hi"}]), tokenizer=chat_tokenizer, max_prompt_length=LONG)
    assert dataset.uses_chat_template
    assert decode(chat_tokenizer, dataset) == [
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    ]
    start = chat_tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert dataset[0][0] == start, "the template's special tokens are ids, not text"


def test_enable_thinking_reaches_the_template(write_jsonl, chat_tokenizer):
    path = write_jsonl([{"prompt": "Hi"}])
    dataset = load_prompts(path, tokenizer=chat_tokenizer, max_prompt_length=LONG, enable_thinking=True)
    assert decode(chat_tokenizer, dataset)[0].endswith("<|im_start|>assistant\n")


def test_messages_keep_their_turns(write_jsonl, chat_tokenizer):
    turns = [{"role": r, "content": c} for r, c in (("system", "Be brief."), ("user", "Hi"))]
    dataset = load_prompts(write_jsonl([{"messages": turns}]), tokenizer=chat_tokenizer, max_prompt_length=LONG)
    assert decode(chat_tokenizer, dataset)[0].startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")


def test_auto_falls_back_to_raw_text_and_true_refuses(write_jsonl, raw_tokenizer, chat_tokenizer):
    path = write_jsonl([{"prompt": "Hi"}])
    dataset = load_prompts(path, tokenizer=raw_tokenizer, max_prompt_length=LONG)
    assert not dataset.uses_chat_template and decode(raw_tokenizer, dataset) == ["Hi"]
    forced = load_prompts(path, tokenizer=chat_tokenizer, max_prompt_length=LONG, chat_template=False)
    assert decode(chat_tokenizer, forced) == ["Hi"]
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        load_prompts(path, tokenizer=raw_tokenizer, max_prompt_length=LONG, chat_template=True)
    with pytest.raises(ValueError, match="must be true, false or 'auto', got 'chatml'"):
        load_prompts(path, tokenizer=raw_tokenizer, max_prompt_length=LONG, chat_template="chatml")


def test_raw_text_starts_like_a_document_and_stays_open(write_jsonl, bos_eos_tokenizer):
    dataset = load_prompts(write_jsonl([{"prompt": "Hi"}]), tokenizer=bos_eos_tokenizer, max_prompt_length=LONG)
    assert decode(bos_eos_tokenizer, dataset) == ["<bos>Hi"]


def test_messages_without_a_chat_template_are_refused(write_jsonl, raw_tokenizer):
    path = write_jsonl([{"prompt": "a"}, {"messages": [{"role": "user", "content": "b"}]}])
    with pytest.raises(ValueError, match=r"jsonl:2: 'messages' need a chat template"):
        load_prompts(path, tokenizer=raw_tokenizer, max_prompt_length=LONG)


def test_a_row_that_the_template_refuses_is_named(write_jsonl, raw_tokenizer):
    strict = copy.deepcopy(raw_tokenizer)
    strict.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match=r"jsonl:1: the chat template refuses this row: roles must alternate"):
        load_prompts(write_jsonl([{"prompt": "a"}]), tokenizer=strict, max_prompt_length=LONG)


@pytest.mark.parametrize(
    "template",
    [
        "{{ 1 / 0 }}",
        "{{ messages[0].content + 1 }}",
        "{{ 'a' * 10**15 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_a_template_that_fails_in_any_way_names_the_row(write_jsonl, raw_tokenizer, template):
    tokenizer = copy.copy(raw_tokenizer)
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=r"jsonl:1: the chat template refuses this row: ") as caught:
        load_prompts(write_jsonl([{"prompt": "a"}]), tokenizer=tokenizer, max_prompt_length=9)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_that_cannot_encode_names_the_rows(write_jsonl):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"a": 0}, unk_token="[UNK]"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    with pytest.raises(ValueError, match=r"jsonl:1 to .*jsonl:2: the tokenizer cannot encode the prompts: .*UNK"):
        load_prompts(write_jsonl([{"prompt": "a"}, {"prompt": "b"}]), tokenizer=tokenizer, max_prompt_length=9)


def test_domain_suffixes_are_off_by_default_and_follow_the_domain(write_jsonl, chat_tokenizer):
    path = write_jsonl([{"question": "1+1?", "domain": "math"}, {"question": "Hi", "domain": "chat"}, {"prompt": "x"}])
    plain = load_prompts(path, tokenizer=chat_tokenizer, max_prompt_length=LONG)
    assert "\\boxed{}" not in "".join(decode(chat_tokenizer, plain))
    suffixed = load_prompts(
        path, tokenizer=chat_tokenizer, max_prompt_length=LONG, domain_suffixes=PUBLISHED_DOMAIN_SUFFIXES
    )
    math, chat, unknown = decode(chat_tokenizer, suffixed)
    expected = "1+1?\nPlease reason step by step, and put your final answer within \\boxed{}.<|im_end|>"
    assert expected in math
    assert [chat, unknown] == decode(chat_tokenizer, plain)[1:]
    assert suffixed.domains == ("math", "chat", None)


def test_too_long_prompts_are_dropped_and_counted_and_the_rest_keep_their_place(write_jsonl, raw_tokenizer):
    lengths = [3, 6, 5, 9, 1]
    path = write_jsonl([{"prompt": "x" * n, "domain": str(n)} for n in lengths])
    dataset = load_prompts(path, tokenizer=raw_tokenizer, max_prompt_length=5)
    assert dataset.num_dropped_too_long == 2
    assert dataset.prompt_len.tolist() == [3, 5, 1] == [len(prompt) for prompt in dataset]
    assert dataset.row_ids == ("1", "3", "5") and dataset.domains == ("3", "5", "1")
    with pytest.raises(ValueError, match="no prompt fits max_prompt_length=2, the shortest has 3"):
        load_prompts(write_jsonl([{"prompt": "abc"}]), tokenizer=raw_tokenizer, max_prompt_length=2)


def test_truncation_keeps_the_first_tokens_of_raw_text(write_jsonl, raw_tokenizer):
    path = write_jsonl([{"prompt": "abcdefgh"}, {"prompt": "ab"}])
    dataset = load_prompts(path, tokenizer=raw_tokenizer, max_prompt_length=4, truncate_prompt_to=4)
    assert decode(raw_tokenizer, dataset) == ["abcd", "ab"]
    assert dataset.num_dropped_too_long == 0


def test_truncation_is_refused_where_it_would_cut_the_template_or_a_suffix(write_jsonl, raw_tokenizer, chat_tokenizer):
    path = write_jsonl([{"prompt": "a"}])
    with pytest.raises(ValueError, match="truncate_prompt_to is for raw text"):
        load_prompts(path, tokenizer=chat_tokenizer, max_prompt_length=8, truncate_prompt_to=4)
    with pytest.raises(ValueError, match="give no domain_suffixes"):
        load_prompts(
            path, tokenizer=raw_tokenizer, max_prompt_length=8, truncate_prompt_to=4, domain_suffixes={"math": "?"}
        )
    with pytest.raises(ValueError, match=r"must be in \[1, max_prompt_length=8\], got 9"):
        load_prompts(path, tokenizer=raw_tokenizer, max_prompt_length=8, truncate_prompt_to=9)
    with pytest.raises(ValueError, match="max_prompt_length must be at least 1, got 0"):
        load_prompts(path, tokenizer=raw_tokenizer, max_prompt_length=0)


def test_a_prompt_holding_the_mask_token_is_refused(write_jsonl, chat_tokenizer):
    start = chat_tokenizer.convert_tokens_to_ids("<|im_start|>")
    path = write_jsonl([{"prompt": "fine"}, {"prompt": "a <|im_start|> b"}])
    options = {"tokenizer": chat_tokenizer, "max_prompt_length": LONG, "chat_template": False}
    assert len(load_prompts(path, **options, mask_token_id=None)) == 2
    with pytest.raises(ValueError, match=rf"jsonl:2: the prompt contains the mask token \(id {start}\)"):
        load_prompts(path, **options, mask_token_id=start)


def test_many_rows_equal_the_rows_one_by_one(write_jsonl, raw_tokenizer):
    texts = [f"row {i} " + "y" * (i % 7) for i in range(2500)]  # more than two tokenizer calls
    dataset = load_prompts(write_jsonl([{"prompt": t} for t in texts]), tokenizer=raw_tokenizer, max_prompt_length=LONG)
    assert decode(raw_tokenizer, dataset) == texts
    assert dataset.token_ids.dtype == dataset.offsets.dtype == torch.int64
    assert dataset.offsets[0] == 0 and dataset.offsets[-1] == dataset.token_ids.numel()


def test_indexing_past_the_end_raises(write_jsonl, raw_tokenizer):
    dataset = load_prompts(write_jsonl([{"prompt": "a"}]), tokenizer=raw_tokenizer, max_prompt_length=LONG)
    for index in (1, -1):
        with pytest.raises(IndexError):
            dataset[index]


def test_the_checksum_sees_every_part_of_the_prompts(write_jsonl, raw_tokenizer):
    def checksum(*rows, **options):
        path = write_jsonl(rows)
        return load_prompts(path, tokenizer=raw_tokenizer, max_prompt_length=LONG, **options).checksum()

    base = checksum({"prompt": "ab"}, {"prompt": "cd"})
    assert base == checksum({"question": "ab", "id": 9}, {"prompt": "cd"})
    changed = [
        checksum({"prompt": "ab"}, {"prompt": "ce"}),
        checksum({"prompt": "abc"}, {"prompt": "d"}),
        checksum({"prompt": "cd"}, {"prompt": "ab"}),
        checksum({"prompt": "ab", "domain": "math"}, {"prompt": "cd"}),
        checksum({"prompt": "ab"}, {"prompt": "cd"}, truncate_prompt_to=1),
    ]
    assert base not in changed and len(set(changed)) == len(changed)
