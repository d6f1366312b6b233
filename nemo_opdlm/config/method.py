"""Keys of the method: `model.opdlm`. Its defaults are the published recipe and live here alone."""

from dataclasses import dataclass, field
from typing import Literal

Divergence = Literal["forward_kl", "reverse_kl", "mixed", "jsd", "nll"]
TailMode = Literal["tail_bucket", "partial", "renormalize"]
StateSelection = Literal["one_state_per_block", "all_states", "random_mask"]
Responses = Literal["student", "teacher", "dataset"]
NormalizationName = Literal["sequence", "token"]
BlockGrid = Literal["absolute", "response"]
AttentionKernel = Literal["auto", "flex", "sdpa", "split"]
Remasking = Literal["low_confidence_static", "low_confidence_dynamic", "entropy_bounded", "sequential", "random"]


@dataclass(frozen=True)
class ThresholdScheduleConfig:
    """Confidence threshold over the rollout steps: hold, then ramp.

    Attributes:
        type: shape of the ramp; null = the threshold stays at `rollout.threshold`.
        start: threshold before the ramp; null = `rollout.threshold`.
        end: threshold after the ramp.
        hold_steps: rollout steps before the ramp.
        ramp_steps: rollout steps of the ramp; null = until the end of training.
    """

    type: Literal["linear", "cos", "sin"] | None = None
    start: float | None = None
    end: float = 0.7
    hold_steps: int = 150
    ramp_steps: int | None = None


@dataclass(frozen=True)
class MaxNewTokensScheduleConfig:
    """Rollout-length curriculum, counted in rollout steps from 1.

    Attributes:
        type: shape of the ramp; null = no curriculum, `rollout.max_new_tokens` from the start.
        start: length limit at step 0, in tokens.
        end: length limit after the ramp, in tokens.
        ramp_steps: rollout steps of the ramp.
    """

    type: Literal["cos", "linear"] | None = "cos"
    start: int = 100
    end: int = 4000
    ramp_steps: int = 100


@dataclass(frozen=True)
class RolloutConfig:
    """How the student generates.

    Attributes:
        num_prompts_per_step: prompts of one rollout step, over all ranks.
        num_responses_per_prompt: responses to each of them.
        temperature: of the proposals; 0 = greedy.
        top_p: nucleus filter of the proposals; 1 = off.
        top_k: filter of the proposals; 0 = off. (The teacher's support is `opdlm.divergence_top_k`.)
        denoising_steps: forwards a block may take; null = block_size.
        remasking: which masked positions a forward reveals.
        threshold: confidence above which `low_confidence_dynamic` reveals.
        entropy_bound: running entropy below which `entropy_bounded` reveals, in nats.
        threshold_schedule: `threshold` over the run, off by default.
        max_new_tokens: limit on top of the curriculum, in tokens; null = the curriculum alone.
        max_new_tokens_schedule: rollout-length curriculum.
        domain_caps: length limits by the prompts' `domain`, in tokens.
        max_batch_size: sequences denoised together on one data-parallel rank, and pipeline stage.
        max_batch_tokens: tokens that the cache of one rank may hold; null = as many as max_batch_size sequences need. With
            FlexAttention a sequence counts with its length rounded up to one of four to each doubling, at least 128.
        cuda_graphs: answer a rollout's forwards from CUDA graphs; "auto" = where one GPU holds the whole network.
        end_token_ids: ids that end a response; null = the tokenizer's.
        max_garbage_frac: share of responses that are empty or repeat one token throughout, above which the run stops; null =
            never. Responses that are cut at their length limit are not among them.
        garbage_warmup_steps: rollout steps before that is looked at: an AR model that has just become a student writes many.
    """

    num_prompts_per_step: int = 128
    num_responses_per_prompt: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    denoising_steps: int | None = None
    remasking: Remasking = "low_confidence_dynamic"
    threshold: float = 0.9
    entropy_bound: float = 0.35
    threshold_schedule: ThresholdScheduleConfig = field(default_factory=ThresholdScheduleConfig)
    max_new_tokens: int | None = None
    max_new_tokens_schedule: MaxNewTokensScheduleConfig = field(default_factory=MaxNewTokensScheduleConfig)
    domain_caps: dict[str, int] | None = None
    max_batch_size: int = 128
    max_batch_tokens: int | None = None
    cuda_graphs: bool | Literal["auto"] = "auto"
    end_token_ids: tuple[int, ...] | None = None
    max_garbage_frac: float | None = 0.5
    garbage_warmup_steps: int = 20

    @property
    def num_samples_per_step(self) -> int:
        """Responses of one rollout step, over all ranks."""
        return self.num_prompts_per_step * self.num_responses_per_prompt


@dataclass(frozen=True)
class TeacherConfig:
    """How the frozen teacher is held.

    Attributes:
        precision: of its weights, and of everything it computes but the final logits; null = what the student computes in.
            It never runs in FP8.
        offload: its weights wait in host memory between its passes. The head stays, as every update projects with it.
    """

    precision: Literal["32", "bf16"] | None = None
    offload: bool = False


@dataclass(frozen=True)
class OPDLMConfig:
    """On-policy distillation of a block-diffusion language model.

    Attributes:
        block_size: tokens denoised together.
        block_grid: where blocks start; only `absolute` (counted from the first prompt token) is available.
        mask_token_id: null = the one stored with the model.
        divergence: of the student from the teacher, per supervised token; `nll` needs no teacher.
        reverse_kl_weight: weight of the reverse term of `mixed`.
        jsd_alpha: weight of the teacher in the mixture of `jsd`.
        divergence_top_k: teacher tokens the divergence looks at; 0 = the full vocabulary.
        tail: what happens to the mass outside them.
        responses: who writes the responses. `student` = on-policy; `teacher` and `dataset` need `random_mask` states. `dataset`
            = the prompt file, whose rows then have a `response` or `output`, or `messages` that end with an assistant turn;
            the limits of a rollout's responses cut them.
        state_selection: which partly masked states of a response are trained.
        states_per_rollout: states drawn per response, sharing its clean stream.
        epochs_per_rollout: passes over the responses of a rollout step, each with states drawn anew.
        ar_loss_weight: weight of the same divergence under causal attention, on all tokens of a response, beside its states; it
            keeps the weights good at writing from left to right, and at judging drafts. 0 = none; else a causal copy of
            prompt and response is trained with the states.
        normalization: mean over a row's supervised tokens, then over rows (`sequence`), or over all tokens (`token`).
        exclude_end_token: leave the end-of-turn token out of the loss, as the published recipe's code does.
        attention: kernel of training, teacher passes and rollouts. `flex` = FlexAttention, compiled, on a GPU; `sdpa` = short
            rows at once, others chunk by chunk, over the keys that a chunk sees; `auto` = `flex` on a GPU, for heads of at
            least 16, else `sdpa`. Rows that context-parallel ranks share and a rollout's prompts use `sdpa` always; `split` is
            not available.
        pack_to_tokens: rows of different lengths share a micro-batch of at most so many tokens, end to end, and
            `micro_batch_size` has no say; it has to hold the longest row. null = rows are padded to the longest of their
            micro-batch.
        max_trained_tokens: the run ends after the update that has trained so many supervised tokens (`trained_tokens` in
            metrics.jsonl), with the validation and the checkpoint of its last step; null = `trainer.max_steps` alone. Baselines
            of equal cost have it in common; the learning rate still follows the steps.
        max_consecutive_skips: skipped updates in a row (loss or gradients not finite, nothing supervised) before the run stops.
        rollout: how the student generates.
        teacher: how the teacher is held.
    """

    block_size: int = 4
    block_grid: BlockGrid = "absolute"
    mask_token_id: int | None = None
    divergence: Divergence = "forward_kl"
    reverse_kl_weight: float = 0.5
    jsd_alpha: float = 0.5
    divergence_top_k: int = 0
    tail: TailMode = "tail_bucket"
    responses: Responses = "student"
    state_selection: StateSelection = "one_state_per_block"
    states_per_rollout: int = 1
    epochs_per_rollout: int = 1
    ar_loss_weight: float = 0.0
    normalization: NormalizationName = "sequence"
    exclude_end_token: bool = False
    attention: AttentionKernel = "auto"
    pack_to_tokens: int | None = None
    max_trained_tokens: int | None = None
    max_consecutive_skips: int = 10
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)

    @property
    def denoising_steps(self) -> int:
        """Forwards a block may take."""
        steps = self.rollout.denoising_steps
        return self.block_size if steps is None else steps

    @property
    def max_states_per_rollout(self) -> int:
        """State copies that a row may have: every forward of a block leaves one more of `all_states` behind."""
        return self.denoising_steps if self.state_selection == "all_states" else self.states_per_rollout

    @property
    def needs_teacher(self) -> bool:
        """Whether a training step asks the teacher for anything."""
        return self.divergence != "nll" or self.responses == "teacher"

    @property
    def generates(self) -> bool:
        """Whether training responses are generated, rather than read."""
        return self.responses != "dataset"
