"""Keys of `examples/evaluate.py`; the one home of their defaults."""

from dataclasses import dataclass, field
from pathlib import Path

from nemo_opdlm.config.generate import GenerateConfig, GenerateModelConfig, Mode, check_range, validate_decoding
from nemo_opdlm.config.rules import RANGES
from nemo_opdlm.config.schema import ChatTemplate, ValidationFileConfig
from nemo_opdlm.config.validation import check_apex

#: The task whose answers are programs.
HUMAN_EVAL = "humaneval"


@dataclass(frozen=True)
class EvaluateModelConfig:
    """The models that are evaluated, each a `.nemo` file or another checkpoint that training starts from.

    Attributes:
        restore_from_path: the student; required.
        kd_teacher_restore_from_path: the AR original, which gets a column of its own and judges the student's texts; null =
            none of that.
    """

    restore_from_path: str | None = None
    kd_teacher_restore_from_path: str | None = None


@dataclass(frozen=True)
class SandboxConfig:
    """Limits of each program that a model has written (see `nemo_opdlm/evaluation/sandbox.py`).

    Attributes:
        timeout_s: seconds it may take.
        memory_mib: address space it may use, in MiB.
    """

    timeout_s: float = 3.0
    memory_mib: int = 512


@dataclass(frozen=True)
class EvaluateConfig:
    """AR original and converted student on the same tasks, in one table.

    Attributes:
        model: the models.
        modes: ways in which the student decodes, a column each: `dynamic`, `static`, `autoregressive`, `speculative`.
        tasks: `humaneval`, or jsonl files of questions: with `choices` as in ARC, else with a final `answer` as in GSM8K; a
            file is called by its name without folder and ending.
        num_questions: of each task, the first so many; null = all.
        validation_ds: prompts of the measures that need no answers, as for training; they need the AR original.
        chat_template: apply the tokenizer's to questions and programs; "auto" = if it has one.
        block_size, denoising_steps, threshold, seed, batch_size: as for `examples/generate.py`.
        max_new_tokens: longest answer.
        num_samples: states drawn for each number of masks where a block has too many to judge all (likelihoods).
        sandbox: limits of programs.
        confirm_run_unsafe_code: run programs that a model has written; without it, `humaneval` is refused.
        json: a file to write all figures to.
        recording: a file to write the student's first answers to the held-out prompts to, token by token in the order in
            which they were unmasked, and how well its confidence is calibrated; `examples/report.py` shows it.
    """

    model: EvaluateModelConfig = field(default_factory=EvaluateModelConfig)
    modes: tuple[Mode, ...] = (GenerateConfig.mode,)
    tasks: tuple[str, ...] = ()
    num_questions: int | None = None
    validation_ds: ValidationFileConfig = field(default_factory=ValidationFileConfig)
    chat_template: ChatTemplate = GenerateConfig.chat_template
    block_size: int | None = GenerateConfig.block_size
    denoising_steps: int | None = GenerateConfig.denoising_steps
    threshold: float = GenerateConfig.threshold
    max_new_tokens: int = 256
    num_samples: int = 4
    seed: int = GenerateConfig.seed
    batch_size: int = GenerateConfig.batch_size
    sandbox: SandboxConfig = field(default_factory=SandboxConfig)
    confirm_run_unsafe_code: bool = False
    json: str | None = None
    recording: str | None = None

    def decoding(self, mode: Mode) -> GenerateConfig:
        """Greedy decoding in one of the modes."""
        return GenerateConfig(
            model=GenerateModelConfig(self.model.restore_from_path),
            chat_template=self.chat_template,
            mode=mode,
            block_size=self.block_size,
            denoising_steps=self.denoising_steps,
            threshold=self.threshold,
            max_new_tokens=self.max_new_tokens,
            seed=self.seed,
            batch_size=self.batch_size,
        )


def task_name(task: str) -> str:
    """What a task is called in tables."""
    return Path(task).stem


def validate_evaluate(config: EvaluateConfig) -> EvaluateConfig:
    """Check a configuration before anything is loaded.

    Raises:
        ValueError: a value is out of range or contradicts another.
        FileNotFoundError: a file or folder does not exist.
    """
    check_apex()
    validate_decoding(config.decoding(GenerateConfig.mode))
    check_range("num_samples", config.num_samples, lambda v: v >= 2, "at least 2, for an error to be stated")
    check_range("num_questions", config.num_questions, lambda v: v >= 1, "at least 1, or null")
    check_range("sandbox.timeout_s", config.sandbox.timeout_s, lambda v: v > 0, "above 0")
    check_range("sandbox.memory_mib", config.sandbox.memory_mib, lambda v: v >= 64, "at least 64")
    for key in ("max_prompt_length", "num_samples", "response_length"):
        training_key = f"model.data.validation_ds.{key}"
        check_range(f"validation_ds.{key}", getattr(config.validation_ds, key), *RANGES[training_key])
    check_range("modes", config.modes, lambda v: len(set(v)) == len(v) > 0, "different modes, at least one")
    if config.model.restore_from_path is None:
        raise ValueError("model.restore_from_path=None must be given: a .nemo file")
    _check_work(config)
    _check_files(config)
    return config


def _check_work(config: EvaluateConfig) -> None:
    if not config.tasks and config.validation_ds.file_path is None:
        raise ValueError("nothing to do: give tasks or validation_ds.file_path")
    if config.validation_ds.file_path is not None and config.model.kd_teacher_restore_from_path is None:
        raise ValueError(
            "validation_ds.file_path needs model.kd_teacher_restore_from_path, the AR original that judges"
        )
    if config.recording is not None and config.validation_ds.file_path is None:
        raise ValueError(f"recording={config.recording!r} needs validation_ds.file_path, the prompts that are answered")
    names = [task_name(task) for task in config.tasks]
    check_range(
        "tasks", list(config.tasks), lambda _: len(set(names)) == len(names), f"tasks of different names, not {names}"
    )
    if HUMAN_EVAL in config.tasks and not config.confirm_run_unsafe_code:
        raise ValueError(
            f"tasks={list(config.tasks)} runs programs that a model has written: read what the sandbox contains and what not "
            "(nemo_opdlm/evaluation/sandbox.py), then set confirm_run_unsafe_code=true"
        )


def _check_files(config: EvaluateConfig) -> None:
    files = {
        "model.restore_from_path": config.model.restore_from_path,
        "model.kd_teacher_restore_from_path": config.model.kd_teacher_restore_from_path,
        "validation_ds.file_path": config.validation_ds.file_path,
        **{f"tasks[{i}]": task for i, task in enumerate(config.tasks) if task != HUMAN_EVAL},
    }
    for key, path in files.items():
        if path is not None and not Path(path).exists():
            hint = f"; the only task that is no file is {HUMAN_EVAL}" if key.startswith("tasks") else ""
            raise FileNotFoundError(f"{key}={path!r} does not exist{hint}")
    for key, path in (("json", config.json), ("recording", config.recording)):
        if path is not None and not Path(path).absolute().parent.is_dir():
            raise FileNotFoundError(f"{key}={path!r}: the folder does not exist")
