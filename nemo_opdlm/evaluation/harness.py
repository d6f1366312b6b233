"""The model `nemo_opdlm` of EleutherAI's lm-evaluation-harness, for archives and exported Hugging Face folders.

    python -m nemo_opdlm.evaluation.harness --model nemo_opdlm --model_args pretrained=student.nemo,mode=dynamic --tasks ...

is the harness's own command line (``lm_eval``) with this model registered: lm-eval 0.4.13 looks for no plug-ins, so its own
command cannot find it. In Python, importing this module is enough for ``lm_eval.simple_evaluate(model="nemo_opdlm", ...)``.

Texts are written by block diffusion (``mode=dynamic``, ``static``) or from left to right (``autoregressive``,
``speculative``), with the same weights. Log-likelihoods are causal in the latter modes; in the former they are lower bounds.
The results' ``config`` says which, with the bound's standard error where its states are drawn, and tokens per forward.
"""

import logging
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from tqdm import tqdm

from nemo_opdlm.config.evaluate import EvaluateConfig
from nemo_opdlm.config.generate import GenerateConfig, Mode, validate_decoding
from nemo_opdlm.data.tokenizer import text_of
from nemo_opdlm.evaluation.generation import Generator
from nemo_opdlm.evaluation.likelihood import LogLikelihood, Text
from nemo_opdlm.evaluation.scorer import Scorer

_logger = logging.getLogger(__name__)
_SAMPLING = {"do_sample", "temperature", "top_k", "top_p", "until", "max_gen_toks"}

#: A request of the harness: its strings (None in a window of a longer text), context and continuation.
TokenRequest = tuple[tuple[str, str] | None, list[int], list[int]]


@register_model("nemo_opdlm")
class OPDLMEvalModel(TemplateLM):  # type: ignore[misc]
    """A model of this package, as the harness asks it.

    Args:
        pretrained: a `.nemo` file or another checkpoint that training starts from.
        mode: of decoding; see `nemo_opdlm/config/generate.py`, also for the next three.
        block_size, denoising_steps, threshold: of block diffusion.
        num_samples: of the bound; see `nemo_opdlm/config/evaluate.py`.
        seed: key of all randomness.
        max_length: longest row in tokens; None = the model's context.
        max_gen_toks: longest response where a task names none.
        add_bos_token: whether texts start with the tokenizer's BOS; None = as the tokenizer does.
        prefix_token_id: stands before a text without context; None = BOS, or end of text.
        enable_thinking: passed to the chat template.
        batch_size: rows judged or decoded together, at most; "auto" = as `examples/evaluate.py`.
        max_batch_size: ignored, there is nothing to tune.
        device: "cpu" hides the GPUs; else there is a choice of one.

    Raises:
        ValueError, OSError: the model or a setting is refused; one line.
    """

    def __init__(
        self,
        pretrained: str,
        mode: Mode = GenerateConfig.mode,
        block_size: int | None = GenerateConfig.block_size,
        denoising_steps: int | None = GenerateConfig.denoising_steps,
        threshold: float = GenerateConfig.threshold,
        num_samples: int = EvaluateConfig.num_samples,
        seed: int = GenerateConfig.seed,
        max_length: int | None = None,
        max_gen_toks: int = EvaluateConfig.max_new_tokens,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        enable_thinking: bool = False,
        batch_size: int | str = "auto",
        max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        super().__init__()
        if device == "cpu":
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        decoding = GenerateConfig(
            mode=mode,
            block_size=block_size,
            denoising_steps=denoising_steps,
            threshold=threshold,
            max_new_tokens=max_gen_toks,
            seed=seed,
            batch_size=GenerateConfig.batch_size if str(batch_size).startswith("auto") else int(batch_size),
        )
        validate_decoding(decoding)
        self.scorer = Scorer(Generator.load(pretrained), decoding, num_samples)
        self.tokenizer = self.scorer.generator.tokenizer
        self.max_length = min(max_length or self.scorer.generator.context_len, self.scorer.generator.context_len)
        self._add_bos_token, self._prefix_token_id = add_bos_token, prefix_token_id
        self._enable_thinking = enable_thinking
        self._errors: list[Tensor] = []
        self._num_tokens = self._num_forwards = 0

    @property
    def eot_token_id(self) -> int:
        """The tokenizer's end token."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """Stands before a text without context."""
        known = (self._prefix_token_id, self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        # A special token that nothing used may have become the mask, BOS among them: no text may hold it then.
        mask_token_id = None if self.scorer.is_causal else self.scorer.generator.tokens.mask_token_id
        return int(next(token_id for token_id in known if token_id is not None and token_id != mask_token_id))

    @property
    def tokenizer_name(self) -> str:
        """Key of the harness's caches of requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as the text that the model continues."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
                enable_thinking=self._enable_thinking,
            )
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; special tokens as the tokenizer adds them, unless the text brings its own BOS."""
        add = self._add_bos_token if add_special_tokens is None else add_special_tokens
        if add_special_tokens is None and string.startswith(text_of(self.tokenizer, [self.prefix_token_id])):
            add = False
        return list(self.tokenizer.encode(string, **({} if add is None else {"add_special_tokens": add})))

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """ln p of whole texts, cut into windows of the model's context without overlap."""
        # A causal pass needs no place for the last token.
        window = self.max_length if self.scorer.is_causal else self.max_length - 1
        windows = [
            [make_disjoint_window(pair) for pair in self._windows(request.args[0], window)] for request in requests
        ]
        flat: list[TokenRequest] = [(None, context, text) for parts in windows for context, text in parts]
        values = iter(self._loglikelihood_tokens(flat, disable_tqdm) if flat else [])
        totals = [sum(next(values)[0] for _ in parts) for parts in windows]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Responses up to the first of a task's stop strings; each is written to its end or limit before it is cut."""
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(number)
        texts = [""] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="Running generate_until requests") as bar:
            for numbers in groups.values():
                contexts = [requests[number].args[0] for number in numbers]
                settings = requests[numbers[0]].args[1]
                for number, text in zip(numbers, self._generate(contexts, settings), strict=True):
                    texts[number] = text
                    self.cache_hook.add_partial("generate_until", requests[number].args, text)
                    bar.update()
        return texts

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes beside the results."""
        config = self.scorer.config
        info: dict[str, Any] = {
            "mode": config.mode,
            "block_size": self.scorer.block_size,
            "likelihood": self.scorer.likelihood,
        }
        if self._errors:
            errors = torch.cat(self._errors)
            info["likelihood_standard_error"] = {"mean": float(errors.mean()), "max": float(errors.max())}
        if self._num_forwards:
            info["tokens_per_forward"] = self._num_tokens / self._num_forwards
        return info

    def _windows(self, text: str, size: int) -> list[tuple[list[int], list[int]]]:
        return list(
            get_rolling_token_windows(
                token_list=self.tok_encode(text), prefix_token=self.prefix_token_id, max_seq_len=size, context_len=1
            )
        )

    def _loglikelihood_tokens(
        self, requests: Sequence[TokenRequest], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        texts = [self._text(number, *request[1:]) for number, request in enumerate(requests)]
        is_greedy = torch.zeros(len(texts), dtype=torch.bool)
        if any(strings is not None for strings, _, _ in requests):
            likelihood, is_greedy = self.scorer.log_likelihood_and_greedy(texts)
        else:
            likelihood = self.scorer.log_likelihood(texts)
        self._report_errors(likelihood)
        answers = list(zip(likelihood.total.tolist(), is_greedy.tolist(), strict=True))
        for request, answer in zip(requests, answers, strict=True):
            if (strings := request[0]) is not None:
                self.cache_hook.add_partial("loglikelihood", strings, answer)
        return answers

    def _text(self, number: int, context: list[int], continuation: list[int]) -> Text:
        """A request as a text that fits the context, cut from the left."""
        room = self.max_length + self.scorer.is_causal - len(continuation)
        if room < 1:
            raise ValueError(f"a continuation of {len(continuation)} tokens does not fit max_length={self.max_length}")
        return Text(torch.tensor(context[-room:]), torch.tensor(continuation), number)

    def _report_errors(self, likelihood: LogLikelihood) -> None:
        if bool((likelihood.standard_error > 0).any()):
            self._errors.append(likelihood.standard_error)
            error = likelihood.standard_error
            _logger.info(
                "%s: standard error %.3g nats on average, %.3g at most",
                self.scorer.likelihood,
                error.mean(),
                error.max(),
            )

    def _generate(self, contexts: Sequence[str], settings: Mapping[str, Any]) -> list[str]:
        wanted: dict[str, Any] = dict(normalize_gen_kwargs(dict(settings), self.scorer.config.max_new_tokens))
        if ignored := sorted(wanted.keys() - _SAMPLING):
            _logger.warning("generation settings %s have no meaning for this model", ignored)
        until = handle_stop_sequences(wanted["until"], eos=text_of(self.tokenizer, [self.eot_token_id]))
        room = self.max_length - wanted["max_gen_toks"]
        if room < 1:
            raise ValueError(
                f"max_gen_toks={wanted['max_gen_toks']} must be less than the model's context of {self.max_length} tokens"
            )
        config = replace(
            self.scorer.config,
            max_new_tokens=wanted["max_gen_toks"],
            temperature=float(wanted.get("temperature", 1.0)) if wanted["do_sample"] else 0.0,
            top_k=int(wanted.get("top_k", 0)) if wanted["do_sample"] else 0,
            top_p=float(wanted.get("top_p", 1.0)) if wanted["do_sample"] else 1.0,
        )
        prompts = [torch.tensor(self.tok_encode(context)[-room:]) for context in contexts]
        trajectory = self.scorer.write(prompts, config)
        self._num_tokens += int(trajectory.response_len.sum())
        self._num_forwards += int(trajectory.num_forwards.sum())
        texts = self.scorer.generator.texts(trajectory)
        return [postprocess_generated_text(text, until, think_end_token=None) for text in texts]


def main() -> None:
    """The harness's command line; a mistake is one line."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
