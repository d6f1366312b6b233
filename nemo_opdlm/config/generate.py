"""Keys of `examples/generate.py`; the one home of their defaults."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from nemo_opdlm.config.rules import RANGES
from nemo_opdlm.config.schema import ChatTemplate
from nemo_opdlm.config.validation import check_apex, check_exists
from nemo_opdlm.data.shown import shown

Mode = Literal["dynamic", "static", "autoregressive", "speculative"]


@dataclass(frozen=True)
class GenerateModelConfig:
    """The model that writes.

    Attributes:
        restore_from_path: a `.nemo` file, or another checkpoint that training starts from; required.
    """

    restore_from_path: str | None = None


@dataclass(frozen=True)
class GenerateConfig:
    """Text from a model.

    Attributes:
        model: the model that writes.
        prompts: texts to continue or to answer.
        prompts_file: a file of prompts instead, as for training.
        chat_template: apply the tokenizer's; "auto" = if it has one.
        mode: `dynamic` reveals every token above `threshold`, `static` a fixed number per forward, and
            `autoregressive` writes token by token from left to right, with the same weights. `speculative` writes what
            `autoregressive` does in fewer forwards: it drafts `block_size` tokens and keeps what causal logits confirm.
        block_size: tokens denoised or drafted together; null = the model's own.
        denoising_steps: forwards a block may take; null = block_size. Fewer make `static` faster.
        threshold: confidence above which `dynamic` reveals a token.
        max_new_tokens: longest response; the model's context may cut it shorter.
        temperature: of the proposals; 0 = greedy.
        top_k: filter of the proposals; 0 = off.
        top_p: nucleus filter of the proposals; 1 = off.
        seed: key of all randomness.
        batch_size: prompts answered together.
        show_steps: print which forward revealed each token.
    """

    model: GenerateModelConfig = field(default_factory=GenerateModelConfig)
    prompts: tuple[str, ...] | None = None
    prompts_file: str | None = None
    chat_template: ChatTemplate = "auto"
    mode: Mode = "dynamic"
    block_size: int | None = None
    denoising_steps: int | None = None
    threshold: float = 0.9
    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 1234
    batch_size: int = 32
    show_steps: bool = False


#: Keys that mean what a key of training means, and have its range.
_LIKE_TRAINING = {
    "block_size": "model.opdlm.block_size",
    "threshold": "model.opdlm.rollout.threshold",
    "max_new_tokens": "model.opdlm.rollout.max_new_tokens",
    "temperature": "model.opdlm.rollout.temperature",
    "top_k": "model.opdlm.rollout.top_k",
    "top_p": "model.opdlm.rollout.top_p",
    "seed": "model.seed",
    "batch_size": "model.opdlm.rollout.max_batch_size",
}


def validate_generate(config: GenerateConfig) -> GenerateConfig:
    """Check a configuration before anything is loaded.

    Raises:
        ValueError: a value is out of range or contradicts another.
        FileNotFoundError: a file does not exist.
    """
    check_apex()
    for key, training_key in _LIKE_TRAINING.items():
        _check_range(key, getattr(config, key), *RANGES[training_key])
    _check_range("denoising_steps", config.denoising_steps, lambda v: v >= 1, "at least 1")
    if config.block_size is not None:
        check_denoising_steps(config.denoising_steps, config.block_size)
    if (config.prompts is None) == (config.prompts_file is None):
        found = "found neither" if config.prompts is None else "found both"
        raise ValueError(f"give the prompts in one of prompts and prompts_file, {found}")
    _check_prompts(config.prompts)
    if config.model.restore_from_path is None:
        raise ValueError("model.restore_from_path=None must be given: a .nemo file")
    for key, path in (
        ("model.restore_from_path", config.model.restore_from_path),
        ("prompts_file", config.prompts_file),
    ):
        check_exists(key, path)
    return config


def check_denoising_steps(denoising_steps: int | None, block_size: int) -> None:
    """Refuse more forwards than a block has tokens.

    Raises:
        ValueError: there are more.
    """
    if denoising_steps is not None and denoising_steps > block_size:
        raise ValueError(
            f"denoising_steps={denoising_steps} must be from 1 to block_size={block_size}: every forward reveals at "
            "least one token of a block"
        )


def _check_range(key: str, value: Any, accepts: Callable[[Any], bool], rule: str) -> None:
    if value is not None and not accepts(value):
        raise ValueError(f"{key}={shown(value)} must be {rule}")


def _check_prompts(prompts: tuple[str, ...] | None) -> None:
    if prompts is None:
        return
    if not prompts:
        raise ValueError("prompts=[] holds no prompt")
    for number, prompt in enumerate(prompts):
        if not prompt.strip():
            raise ValueError(f"prompts[{number}] is empty")
