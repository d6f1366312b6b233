"""Responses of a prompt file as tokens: with the prompt they are the whole conversation, and they end as sampled ones do."""

import pytest

from nemo_opdlm.data.prompts import load_prompts

LONG = 10_000
END = 258  # <|im_end|>
SUFFIX = {"math": " Think."}
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": " 4 "},
]


def load(path, tokenizer, ends, **options):
    options = {"max_prompt_length": LONG, "response_end_ids": ends, **options}
    return load_prompts(path, tokenizer=tokenizer, **options)


def texts(tokenizer, dataset):
    return [tokenizer.decode(response.tolist()) for response in dataset.responses]


def test_prompt_and_response_are_the_template_of_the_whole_conversation(write_jsonl, chat_tokenizer):
    path = write_jsonl([{"messages": CONVERSATION}, {"prompt": "3*3?", "response": "9", "domain": "math"}])
    dataset = load(path, chat_tokenizer, (END,), enable_thinking=True, domain_suffixes=SUFFIX)
    asked = CONVERSATION, [{"role": "user", "content": "3*3? Think."}, {"role": "assistant", "content": "9"}]
    for number, turns in enumerate(asked):
        whole = chat_tokenizer.apply_chat_template(turns, tokenize=False)
        found = [*dataset[number].tolist(), *dataset.responses[number].tolist()]
        assert chat_tokenizer.decode(found) == whole.removesuffix("\n") and found[-1] == END
    assert texts(chat_tokenizer, dataset) == [" 4 <|im_end|>", "9<|im_end|>"]
    assert len(dataset.responses) == len(dataset) and dataset.responses.lengths.tolist() == [4, 2]


def test_the_prompt_is_the_one_of_every_other_mode(write_jsonl, chat_tokenizer, raw_tokenizer):
    path = write_jsonl([{"prompt": "Hi", "response": "you"}, {"input": "a", "output": "b"}])
    for tokenizer, options in ((chat_tokenizer, {"enable_thinking": True}), (raw_tokenizer, {})):
        alone = load_prompts(path, tokenizer=tokenizer, max_prompt_length=LONG, **options)
        beside = load(path, tokenizer, (256,), **options)
        assert [prompt.tolist() for prompt in alone] == [prompt.tolist() for prompt in beside]
        assert alone.responses is None and alone.checksum() != beside.checksum()


def test_raw_text_goes_on_as_it_stands_and_gets_the_end_token(write_jsonl, raw_tokenizer, bos_eos_tokenizer):
    path = write_jsonl([{"prompt": "Once", "response": " upon"}])
    assert texts(raw_tokenizer, load(path, raw_tokenizer, (256,))) == [" upon<|endoftext|>"]
    dataset = load(path, bos_eos_tokenizer, (256, 3))
    assert texts(bos_eos_tokenizer, dataset) == [" upon<eos>"] and bos_eos_tokenizer.decode(dataset[0]) == "<bos>Once"


def test_a_response_ends_at_its_first_end_token(write_jsonl, chat_tokenizer, raw_tokenizer):
    path = write_jsonl([{"prompt": "a", "response": "b<|im_end|>c"}])
    assert texts(chat_tokenizer, load(path, chat_tokenizer, (END,), enable_thinking=True)) == ["b<|im_end|>"]
    # Another end token than the tokenizer's; and a model that has none.
    assert load(path, raw_tokenizer, (7,)).responses[0][-1] == 7
    assert texts(raw_tokenizer, load(path, raw_tokenizer, ())) == ["b<|im_end|>c"]


def test_a_token_across_the_boundary_leaves_the_prompt_as_it_is(write_jsonl):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    merged = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2, "<eos>": 3}, [("a", "b")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=merged, eos_token="<eos>")
    dataset = load(
        write_jsonl([{"prompt": "aa", "response": "bb"}, {"prompt": "b", "response": "ab"}]), tokenizer, (3,)
    )
    assert [prompt.tolist() for prompt in dataset] == [[0, 0], [1]]
    assert [response.tolist() for response in dataset.responses] == [[1, 1, 3], [2, 3]]


def test_the_responses_of_dropped_prompts_are_dropped(write_jsonl, raw_tokenizer):
    path = write_jsonl([{"prompt": "x" * n, "response": "y" * n} for n in (3, 6, 1)])
    dataset = load(path, raw_tokenizer, (256,), max_prompt_length=5)
    assert dataset.num_dropped_too_long == 1 and dataset.responses.lengths.tolist() == [4, 2]


@pytest.mark.parametrize(
    ("response", "options", "message"),
    [
        ("<|im_end|>", {}, "the response has no tokens"),
        ("a<|endoftext|>", {}, r"the response contains the mask token \(id 256\)"),
        ("a", {"enable_thinking": False}, "writes the whole conversation otherwise .* needs enable_thinking=true"),
    ],
)
def test_a_response_that_cannot_be_trained_names_its_row(write_jsonl, chat_tokenizer, response, options, message):
    path = write_jsonl([{"prompt": "a", "response": "fine"}, {"prompt": "a", "response": response}])
    if options:
        path = write_jsonl([{"prompt": "a", "response": response}])
    with pytest.raises(ValueError, match=message) as caught:
        load(path, chat_tokenizer, (END,), **{"enable_thinking": True, "mask_token_id": 256, **options})
    assert str(caught.value).startswith(f"{path}:{1 if options else 2}: ") and "\n" not in str(caught.value)


def test_cut_prompts_have_no_responses(write_jsonl, raw_tokenizer):
    path = write_jsonl([{"prompt": "abcdef", "response": "g"}])
    with pytest.raises(ValueError, match="truncate_prompt_to=4 would put a response behind a prompt without its end"):
        load(path, raw_tokenizer, (256,), truncate_prompt_to=4)
