"""What a memory plan consists of: a run's longest row, and the moments of each pipeline stage."""

from dataclasses import dataclass, fields

from nemo_opdlm.config import ModelConfig, OPDLMConfig


@dataclass(frozen=True)
class Moment:
    """Bytes on one rank at a moment at which they may be most.

    Attributes:
        name: of the moment.
        parameters: the student's weights, and the head's copy in bf16 under autocast.
        gradients: Megatron's fp32 buffers, and the gradient of the vocabulary's weights while it is summed up.
        optimizer: moments, and fp32 master weights beside bf16 ones.
        teacher: its weights.
        targets: hidden states or top-k targets of a rollout batch, and the records of the rollouts.
        cache: keys and values of the rows that are decoded together.
        activations: what layers keep for the backward pass, and what a layer needs at work.
        logits: of one chunk of the head, or of one forward of a rollout.
    """

    name: str
    parameters: int = 0
    gradients: int = 0
    optimizer: int = 0
    teacher: int = 0
    targets: int = 0
    cache: int = 0
    activations: int = 0
    logits: int = 0

    @property
    def items(self) -> dict[str, int]:
        """Bytes by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)[1:]}

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self.items.values())


@dataclass(frozen=True)
class StagePlan:
    """A rank of one pipeline stage: its moments in the order of a training step."""

    stage: int
    moments: tuple[Moment, ...]

    @property
    def peak(self) -> Moment:
        """The moment that needs most."""
        return max(self.moments, key=lambda moment: moment.total)

    def phase(self, name: str) -> Moment | None:
        """The largest moment of a phase: `rollout`, `teacher` or `update`; None where the run has no such phase."""
        moments = [moment for moment in self.moments if moment.name.startswith(name)]
        return max(moments, key=lambda moment: moment.total, default=None)


@dataclass(frozen=True)
class RowLimits:
    """The longest row of a run.

    Attributes:
        prompt: tokens of a prompt.
        response: tokens of a response.
        copies: states of a response that are trained side by side.
        block_size: tokens denoised together.
        has_causal_copy: whether prompt and response are trained under causal attention, too.
    """

    prompt: int
    response: int
    copies: int
    block_size: int
    has_causal_copy: bool = False

    @staticmethod
    def of(config: ModelConfig, context_len: int) -> "RowLimits":
        """The limits of prompts, responses and curriculum, within the student's context."""
        opdlm, rollout, data = config.opdlm, config.opdlm.rollout, config.data.train_ds
        schedule, block = rollout.max_new_tokens_schedule, opdlm.block_size
        limits = [context_len - 1]
        if schedule.type is not None:
            limits.append(-(-schedule.end // block) * block)
        if rollout.max_new_tokens is not None:
            limits.append(rollout.max_new_tokens)
        response = min(limits)
        # Where prompt and response do not fit together, a shorter prompt leaves room for a longer response.
        prompt = min(data.truncate_prompt_to or data.max_prompt_length, context_len - response)
        return RowLimits(prompt, response, _copies(opdlm), block, opdlm.ar_loss_weight > 0)

    @property
    def total(self) -> int:
        """Prompt and response."""
        return self.prompt + self.response

    @property
    def blocks(self) -> int:
        """The same in whole blocks, in tokens."""
        return -(-self.total // self.block_size) * self.block_size

    @property
    def two_stream(self) -> int:
        """Prompt, clean response and its states, and their causal copy."""
        prefix = self.prompt // self.block_size * self.block_size
        return self.blocks + self.copies * (self.blocks - prefix) + self.total * self.has_causal_copy

    @property
    def supervised(self) -> int:
        """Supervised tokens."""
        return (self.copies + self.has_causal_copy) * self.response


@dataclass(frozen=True)
class RunPlan:
    """The plan of a run: its longest row, and every pipeline stage."""

    row: RowLimits
    stages: tuple[StagePlan, ...]

    @property
    def worst(self) -> StagePlan:
        """The stage that needs most."""
        return max(self.stages, key=lambda stage: stage.peak.total)


def _copies(opdlm: OPDLMConfig) -> int:
    return opdlm.denoising_steps if opdlm.state_selection == "all_states" else opdlm.states_per_rollout
