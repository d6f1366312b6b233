"""Tiny byte-level tokenizers built in memory: one token per byte, so ids decode to exactly what was encoded."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

# Qwen3's shape: ChatML turns, and an empty think block after the generation prompt unless thinking is on.
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def build_tokenizer(*, chat_template: str | None = None, post_processor=None, specials=("<|endoftext|>",), eos=None):
    vocabulary = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(specials))
    if post_processor is not None:
        backend.post_processor = post_processor(backend)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=eos or specials[0], pad_token=specials[0], chat_template=chat_template
    )


@pytest.fixture(scope="session")
def raw_tokenizer():
    """No chat template; `<|endoftext|>` (256) ends and pads."""
    return build_tokenizer()


@pytest.fixture(scope="session")
def chat_tokenizer():
    """ChatML with `<|im_end|>` (258) as end of turn and `<|endoftext|>` (256) as padding."""
    return build_tokenizer(
        chat_template=CHATML, specials=("<|endoftext|>", "<|im_start|>", "<|im_end|>"), eos="<|im_end|>"
    )


@pytest.fixture(scope="session")
def bos_eos_tokenizer():
    """Puts its BOS before raw text and, like a few tokenizers, its end token after it."""

    def bracket(backend):
        bos, eos = (backend.token_to_id(token) for token in ("<bos>", "<eos>"))
        return processors.TemplateProcessing(single="<bos> $A <eos>", special_tokens=[("<bos>", bos), ("<eos>", eos)])

    return build_tokenizer(specials=("<eos>", "<bos>"), post_processor=bracket)


@pytest.fixture
def write_jsonl(tmp_path: Path):
    """write_jsonl(rows) -> path; a row that is already text is written as it is."""

    def write(rows, name="prompts.jsonl"):
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path = tmp_path / name
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return path

    return write
