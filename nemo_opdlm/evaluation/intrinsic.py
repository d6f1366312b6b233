"""What a student is worth in the eyes of its AR original, on held-out prompts: measures that need no answers, and no NeMo."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nemo_opdlm.config import ValidationFileConfig
from nemo_opdlm.config.generate import GenerateConfig
from nemo_opdlm.data.collate import collate
from nemo_opdlm.data.prompts import load_prompts
from nemo_opdlm.diffusion.masks import AttentionRule
from nemo_opdlm.diffusion.requests import Requests
from nemo_opdlm.diffusion.trajectory import Trajectory
from nemo_opdlm.evaluation.decoding import divergences, judge
from nemo_opdlm.evaluation.generation import Generator
from nemo_opdlm.evaluation.scorer import OnProgress, Scorer
from nemo_opdlm.megatron.teacher import Teacher
from nemo_opdlm.models.heldout import HeldoutSet
from nemo_opdlm.models.settings import HELDOUT_SAMPLING, HELDOUT_SEED

#: Is told which teacher judges what a scorer wrote.
OnWritten = Callable[[Teacher, Scorer, Trajectory], None]
#: Rollouts over the prompts that the figures of a student take at most, for a progress bar.
NUM_ROLLOUTS = 2


@dataclass(frozen=True)
class HeldoutPrompts:
    """Held-out prompts, the AR original that judges, and its own answers: the set that training validates on.

    Attributes:
        teacher: the AR original.
        prompts: int64 ``[P]`` each.
        response_length: tokens of each answer.
        heldout: the original's answers, randomly masked once.
    """

    teacher: Teacher
    prompts: list[Tensor]
    response_length: int
    heldout: HeldoutSet

    @staticmethod
    def build(
        original: Generator, student: Generator, data: ValidationFileConfig, decoding: GenerateConfig
    ) -> "HeldoutPrompts":
        """Read the prompts and let the original answer them, as training does with the student's block size.

        Raises:
            ValueError, OSError: a prompt cannot be used, or the two models do not belong together; one line.
        """
        if original.network.arch.vocab_size != student.network.arch.vocab_size:
            raise ValueError(
                f"model.kd_teacher_restore_from_path has {original.network.arch.vocab_size} vocabulary rows, the student "
                f"{student.network.arch.vocab_size}: they must have the same vocabulary"
            )
        prompts = _read(student, data)
        prompt_ids, prompt_len = collate(prompts, student.tokens.pad_id)
        limits = torch.full_like(prompt_len, data.response_length)
        requests = Requests(prompt_ids, prompt_len, limits, torch.arange(len(prompts)))
        teacher = Teacher.around(original.network, decoding.batch_size)
        heldout = HeldoutSet.build(
            teacher,
            replace(student, network=original.network).engine(HELDOUT_SAMPLING, len(prompts)),
            requests.to(original.network.parallel.device),
            student.rollout_settings(_as_heldout(decoding)),
        )
        return HeldoutPrompts(teacher, prompts, data.response_length, heldout)

    def of_original(self, scorer: Scorer, on_progress: OnProgress | None = None) -> dict[str, float]:
        """Figures of the original's own greedy text."""
        return judge(self.teacher, self._write(scorer, 0.0, on_progress)).as_dict()

    def of_student(
        self, scorer: Scorer, on_progress: OnProgress | None = None, on_written: OnWritten | None = None
    ) -> dict[str, float]:
        """Figures of a student in one mode; the divergences only where it writes by block diffusion.

        ``on_written`` gets its greedy text.
        """
        written = self._write(scorer, 0.0, on_progress)
        if on_written is not None:
            on_written(self.teacher, scorer, written)
        figures = judge(self.teacher, written).as_dict()
        if scorer.is_causal:
            return figures
        sampled = self._write(scorer, HELDOUT_SAMPLING.temperature, on_progress)
        network, mask_token_id = scorer.generator.network, scorer.generator.tokens.mask_token_id
        with network.attention.use_rule(AttentionRule.BLOCK_DIFFUSION):
            on_states = divergences(
                self.teacher, network, self.heldout, sampled, mask_token_id, scorer.config.batch_size
            )
        return {**on_states, **figures}

    @torch.no_grad()
    def _write(self, scorer: Scorer, temperature: float, on_progress: OnProgress | None) -> Trajectory:
        config = replace(_as_heldout(scorer.config), temperature=temperature, max_new_tokens=self.response_length)
        return scorer.write(self.prompts, config, on_progress=on_progress)


def _as_heldout(decoding: GenerateConfig) -> GenerateConfig:
    """With the seed that figures of different runs share."""
    return replace(decoding, seed=HELDOUT_SEED)


def _read(student: Generator, data: ValidationFileConfig) -> list[Tensor]:
    prompts = load_prompts(
        str(data.file_path),
        tokenizer=student.tokenizer,
        max_prompt_length=data.max_prompt_length,
        chat_template=data.chat_template,
        enable_thinking=data.enable_thinking,
        domain_suffixes=data.domain_suffixes,
        truncate_prompt_to=data.truncate_prompt_to,
        mask_token_id=student.tokens.mask_token_id,
    )
    chosen = [prompts[number] for number in range(min(data.num_samples, len(prompts)))]
    longest = max(len(prompt) for prompt in chosen) + data.response_length
    if longest > student.context_len:
        raise ValueError(
            f"validation_ds: prompt and response_length make {longest} tokens, the model's context has {student.context_len}"
        )
    return chosen
