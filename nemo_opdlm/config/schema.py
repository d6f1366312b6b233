"""Keys of a run under the names NeMo users know; the one home of their defaults (the method's: `method.py`)."""

from dataclasses import dataclass, field
from typing import Any, Literal

from nemo_opdlm.config.exp_manager import ExpManagerConfig
from nemo_opdlm.config.method import OPDLMConfig

Precision = Literal["32", "bf16", "bf16-mixed", "16-mixed"]
ChatTemplate = bool | Literal["auto"]
OptimizerName = Literal[
    "adamw", "adam", "fused_adam", "megatron_fused_adam", "distributed_fused_adam", "mcore_distributed_optim"
]
SchedulerName = Literal[
    "CosineAnnealing",
    "PolynomialDecayAnnealing",
    "InverseSquareRootAnnealing",
    "WarmupHoldPolicy",
    "WarmupAnnealing",
]


@dataclass(frozen=True)
class TrainerConfig:
    """Keys of Lightning's Trainer.

    Attributes:
        devices: ranks per node; "auto" or -1 = as launched by torchrun or Slurm, else all visible GPUs.
        num_nodes: nodes with so many ranks each; both must agree with the launcher.
        precision: `32`; `bf16` = bf16 parameters with fp32 master weights; `bf16-mixed` = fp32 parameters under
            autocast.
        logger, enable_checkpointing, use_distributed_sampler: must stay false, exp_manager and the data schedule do it.
        max_steps: optimizer steps of the whole run; required.
        max_time: wall-clock limit DD:HH:MM:SS.
        val_check_interval: optimizer steps between validations, if there is a `model.data.validation_ds.file_path`.
        accumulate_grad_batches: must stay 1, `model.global_batch_size` decides.
        gradient_clip_val: global gradient norm; null or 0 = no clipping.
    """

    devices: int | Literal["auto"] = 1
    num_nodes: int = 1
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    precision: Precision = "bf16"
    logger: bool = False
    enable_checkpointing: bool = False
    use_distributed_sampler: bool = False
    max_epochs: int | None = None
    max_steps: int | None = None
    max_time: str | None = None
    log_every_n_steps: int = 10
    val_check_interval: int | None = 100
    check_val_every_n_epoch: int | None = None
    num_sanity_val_steps: int = 0
    limit_train_batches: int | float | None = None
    limit_val_batches: int | float | None = None
    limit_test_batches: int | float | None = None
    accumulate_grad_batches: int = 1
    gradient_clip_val: float | None = 1.0
    benchmark: bool = False
    deterministic: bool = False
    detect_anomaly: bool = False
    enable_model_summary: bool = False
    enable_progress_bar: bool = True
    default_root_dir: str | None = None

    @property
    def world_size(self) -> int | None:
        """Number of ranks, None where the machine decides (`devices` "auto" or -1)."""
        if self.devices == "auto" or self.devices == -1:
            return None
        return self.devices * self.num_nodes


@dataclass(frozen=True)
class SchedConfig:
    """Learning-rate schedule, counted in optimizer steps.

    Attributes:
        name: NeMo's scheduler.
        warmup_steps: linear warm-up from 0; 80 = five rollout steps of 16 updates.
        constant_steps: steps at the full rate between warm-up and decay.
        min_lr: rate at the end.
        max_steps: end of the decay; null = `trainer.max_steps`.
    """

    name: SchedulerName = "CosineAnnealing"
    warmup_steps: int = 80
    constant_steps: int = 0
    min_lr: float = 1e-6
    max_steps: int | None = None


@dataclass(frozen=True)
class OptimConfig:
    """Megatron's Adam, under NeMo's names.

    Attributes:
        name: the `distributed` ones, and `mcore_distributed_optim`, shard the optimizer state on GPUs.
        overlap_grad_sync: data-parallel ranks sum gradients while the backward pass goes on.
        overlap_param_sync: they gather what a sharded optimizer has updated while the next forward pass goes on.
    """

    name: OptimizerName = "adamw"
    lr: float = 1e-5
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    overlap_grad_sync: bool = False
    overlap_param_sync: bool = False
    sched: SchedConfig = field(default_factory=SchedConfig)

    @property
    def decoupled_weight_decay(self) -> bool:
        """AdamW rather than Adam."""
        return self.name != "adam"

    @property
    def distributed(self) -> bool:
        """Whether the optimizer state is sharded over data-parallel ranks."""
        return self.name in ("distributed_fused_adam", "mcore_distributed_optim")


@dataclass(frozen=True)
class TokenizerConfig:
    """Tokenizer of the run.

    Attributes:
        library: only Hugging Face tokenizers.
        type: folder of a tokenizer; null = the one stored with the model.
        trust_remote_code: run code of the tokenizer's folder.
    """

    library: Literal["huggingface"] = "huggingface"
    type: str | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True)
class PromptFileConfig:
    """A file of prompts.

    Attributes:
        file_path: jsonl or parquet, rows `{"prompt": ...}` (or `question`, `input`) or `{"messages": [...]}`, optional
            `domain`; with `opdlm.responses=dataset` also `response` or `output`, or a last assistant turn.
        max_prompt_length: longer prompts are dropped, in tokens.
        truncate_prompt_to: raw text only: keep the first so many tokens of every prompt.
        chat_template: apply the tokenizer's; "auto" = if it has one.
        enable_thinking: passed to the chat template.
        domain_suffixes: text appended to the user turn, by the prompt's `domain`.
    """

    file_path: str | None = None
    max_prompt_length: int = 2000
    truncate_prompt_to: int | None = None
    chat_template: ChatTemplate = "auto"
    enable_thinking: bool = False
    domain_suffixes: dict[str, str] | None = None


@dataclass(frozen=True)
class ValidationFileConfig(PromptFileConfig):
    """Held-out prompts: the teacher answers, the student denoises randomly masked blocks of the answers.

    Attributes:
        num_samples: prompts used, the first of the file.
        response_length: tokens the teacher writes to each.
    """

    num_samples: int = 32
    response_length: int = 32


@dataclass(frozen=True)
class DataConfig:
    """Prompt files of the run; without `validation_ds.file_path` there is no validation."""

    train_ds: PromptFileConfig = field(default_factory=PromptFileConfig)
    validation_ds: ValidationFileConfig = field(default_factory=ValidationFileConfig)


@dataclass(frozen=True)
class ModelConfig:
    """Weights, layout, architecture, precision, memory, data and method of a run.

    Attributes:
        restore_from_path: the AR model, or a trained student to continue: a `.nemo` file of this package or of NeMo 1.x, or
            a NeMo 2.0, Megatron-Bridge or Hugging Face folder; required. `tokenizer.type` makes up for a missing tokenizer.
        kd_teacher_restore_from_path: the teacher, of any of these kinds; null = the weights of `restore_from_path`, which
            must be an AR model's then.
        seed: key of all randomness of the run.
        micro_batch_size: sequences of one forward and backward pass on one data-parallel rank, unless they are packed
            (`opdlm.pack_to_tokens`).
        global_batch_size: sequences of one update, over all ranks.
        tensor_model_parallel_size, pipeline_model_parallel_size, context_parallel_size: ranks that share each layer, the
            stack of layers, and each sequence; the rest of the ranks is data parallel.
        virtual_pipeline_model_parallel_size: pieces of the stack on each pipeline stage, at least 2; null = 1.
        sequence_parallel: tensor-parallel ranks also share the activations between layers.
        distributed_timeout_minutes: how long a rank waits for the others in one collective operation.
        num_layers ... init_method_std: see `Architecture`; null = as stored with the weights.
        make_vocab_size_divisible_by: see `Architecture`; null = its default.
        megatron_amp_O2: under `bf16-mixed`, too, bf16 parameters with fp32 master weights.
        transformer_engine: Transformer Engine's layers instead of Megatron's own; needs it and a GPU.
        fp8: the layers' matrix products in FP8; needs `transformer_engine` and one of `fp8_e4m3` and `fp8_hybrid`. Head,
            embedding, norms and attention keep the model's precision; so does the teacher.
        fp8_recipe: how FP8 is scaled: by the largest values of past steps (`delayed`) or of the present one
            (`tensorwise`), by blocks of 128 (`blockwise`) or of 32 values (`mxfp8`). Transformer Engine stores what `delayed`
            knows of past steps as a pickle, which no checkpoint may hold here: a resumed run gathers it anew.
        fp8_margin ... fp8_amax_compute_algo: of `delayed`.
        fp8_params: weights are kept in FP8 beside the optimizer's masters; needs a sharded optimizer.
        fp8_wgrad ... num_layers_at_end_in_bf16: further fields of Megatron's FP8, under its names.
        gradient_accumulation_fusion: weight gradients are added up by Apex's kernel, where it is installed.
        ub_tp_comm_overlap: in training, tensor-parallel ranks exchange activations while they multiply, through Transformer
            Engine's user buffers; these hold `opdlm.pack_to_tokens`, to which every pack is filled up. Without
            `sequence_parallel` it is switched off.
        activations_checkpoint_*: recomputation of activations, under NeMo's names.
        mcore_customization_config: further fields of Megatron's TransformerConfig.
        dist_ckpt_async_save: write checkpoints while training goes on: it stops only to copy weights and optimizer to
            host memory, which must have room for two copies (a best and a last checkpoint), and a checkpoint is there,
            whole, some updates later. If several ranks train and one fails meanwhile, the run resumes from the
            checkpoint before.
        log_samples_every_n_steps: prompts and responses of the current rollout batch are logged after the first update and
            after every so many: a table in the log and the loggers, whole texts in `samples.jsonl`; null = never.
        num_logged_samples: how many of them, the first of the batch.
        device_peak_tflops: dense peak of one device at this precision, in TFLOP/s, for `throughput/mfu`; null = known for
            A100, H100, H200 and B200 in bf16, else there is no such metric.
    """

    restore_from_path: str | None = None
    kd_teacher_restore_from_path: str | None = None
    seed: int = 1234

    micro_batch_size: int = 1
    global_batch_size: int = 8
    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int | None = None
    context_parallel_size: int = 1
    sequence_parallel: bool = False
    distributed_timeout_minutes: float = 30.0

    num_layers: int | None = None
    hidden_size: int | None = None
    ffn_hidden_size: int | None = None
    num_attention_heads: int | None = None
    num_query_groups: int | None = None
    kv_channels: int | None = None
    max_position_embeddings: int | None = None
    layernorm_epsilon: float | None = None
    rotary_base: float | None = None
    rope_scaling: dict[str, Any] | None = None
    qkv_bias: bool | None = None
    bias: bool | None = None
    qk_layernorm: bool | None = None
    share_embeddings_and_output_weights: bool | None = None
    vocab_size: int | None = None
    init_method_std: float | None = None
    make_vocab_size_divisible_by: int | None = None

    megatron_amp_O2: bool = False
    transformer_engine: bool = False
    fp8: bool = False
    fp8_e4m3: bool = False
    fp8_hybrid: bool = False
    fp8_recipe: Literal["delayed", "tensorwise", "blockwise", "mxfp8"] = "delayed"
    fp8_margin: int = 0
    fp8_interval: int = 1
    fp8_amax_history_len: int = 1024
    fp8_amax_compute_algo: Literal["max", "most_recent"] = "max"
    fp8_params: bool = False
    fp8_wgrad: bool = True
    tp_only_amax_red: bool = False
    first_last_layers_bf16: bool = False
    num_layers_at_start_in_bf16: int = 1
    num_layers_at_end_in_bf16: int = 1

    gradient_accumulation_fusion: bool = False
    ub_tp_comm_overlap: bool = False
    activations_checkpoint_granularity: Literal["selective", "full"] | None = None
    activations_checkpoint_method: Literal["uniform", "block"] | None = None
    activations_checkpoint_num_layers: int | None = None
    mcore_customization_config: dict[str, Any] = field(default_factory=dict)

    dist_ckpt_async_save: bool = False
    log_samples_every_n_steps: int | None = 100
    num_logged_samples: int = 4
    device_peak_tflops: float | None = None

    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig = field(default_factory=DataConfig)
    opdlm: OPDLMConfig = field(default_factory=OPDLMConfig)

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one copy of the network."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size

    @property
    def updates_per_epoch(self) -> int:
        """Optimizer steps of one pass over the responses of a rollout step."""
        return self.opdlm.rollout.num_samples_per_step // self.global_batch_size

    @property
    def updates_per_rollout(self) -> int:
        """Optimizer steps on the responses of one rollout step."""
        return self.opdlm.epochs_per_rollout * self.updates_per_epoch

    @property
    def has_teacher(self) -> bool:
        """Whether training or validation asks the teacher for anything."""
        return self.opdlm.needs_teacher or self.data.validation_ds.file_path is not None

    @property
    def teacher_path(self) -> str | None:
        """Where the teacher's weights come from."""
        return self.kd_teacher_restore_from_path or self.restore_from_path


@dataclass(frozen=True)
class RunConfig:
    """What a launcher knows of a run, as in NeMo-Framework-Launcher. Training itself reads none of it.

    Attributes:
        name: of the job; null = the experiment's `name`.
        results_dir: folder that `exp_manager.explicit_log_dir` may refer to; a launched run that names no folder of its own
            writes to `results` in it.
        time_limit: of one job, D-HH:MM:SS or HH:MM:SS.
        margin_minutes: so long before the time limit training stops at a step boundary, with a checkpoint
            (`exp_manager.max_time_per_run`), unless that key is given.
        dependency: of the job, in Slurm's words; `singleton` = never beside another job of this name.
        chain: jobs to submit, one after the other: each goes on where the one before it stopped. Needs `singleton`.
    """

    name: str | None = None
    results_dir: str | None = None
    time_limit: str = "0-04:00:00"
    margin_minutes: float = 15
    dependency: str | None = "singleton"
    chain: int = 1


@dataclass(frozen=True)
class Config:
    """A training run.

    Attributes:
        name: of the experiment, and of its folder unless `exp_manager.name` is given.
        run: what a launcher knows of the run.
        trainer: Lightning's Trainer.
        exp_manager: NeMo's experiment manager.
        model: the model and everything about its training.
    """

    name: str = "opdlm"
    run: RunConfig = field(default_factory=RunConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    exp_manager: ExpManagerConfig = field(default_factory=ExpManagerConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
