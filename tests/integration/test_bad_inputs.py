"""Bad input ends a command with one line that names the culprit, before any work, and leaves every file as it was."""

import json
import re
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from nemo_opdlm.models.conversion import convert_hf_to_nemo
from nemo_opdlm.testing import tiny
from tests.integration.training_runs import COMMON, TINY, run_script, write_prompts, write_tiny_archive


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    exit_code: int
    stderr: str

    @property
    def message(self) -> str:
        """The one line that is for the user."""
        assert "Traceback" not in self.stderr, self.stderr
        (line,) = (line for line in self.stderr.splitlines() if "error: " in line)
        return line.partition("error: ")[2]


Command = Callable[..., Outcome]


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str]) -> Command:
    """Run a script of `examples/` with arguments, in this process."""

    def execute(script: str, *arguments: str) -> Outcome:
        capfd.readouterr()
        code = run_script(script, *arguments)
        stderr = capfd.readouterr().err
        # A text as exit code is printed by the interpreter, and the code is 1.
        return Outcome(1, f"{stderr}{code}\n") if isinstance(code, str) else Outcome(code, stderr)

    return execute


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@dataclass(frozen=True)
class Inputs:
    """A folder of good and bad inputs; `{folder}` in arguments stands for it."""

    folder: Path

    def fill(self, arguments: Sequence[str]) -> list[str]:
        return [argument.replace("{folder}", str(self.folder)) for argument in arguments]


def write_rows(path: Path, *rows: str) -> None:
    path.write_text("".join(row + "\n" for row in rows))


def repack(source: Path, target: Path, leave_out: str = "", replace: tuple[str, str] = ("", "")) -> None:
    """Copy an archive without some members, or with another text in its settings."""
    with tarfile.open(source) as old, tarfile.open(target, "w") as new:
        for member in old.getmembers():
            if leave_out and leave_out in member.name:
                continue
            stream = old.extractfile(member)
            if member.name.endswith("model_config.yaml") and replace[0]:
                text = old.extractfile(member).read().decode().replace(*replace)  # type: ignore[union-attr]
                (target.parent / "edited.yaml").write_text(text)
                new.add(target.parent / "edited.yaml", member.name)
                (target.parent / "edited.yaml").unlink()
            else:
                new.addfile(member, stream)


def write_bad_archives(folder: Path, good: Path) -> None:
    (folder / "text.nemo").write_text("not an archive")
    (folder / "truncated.nemo").write_bytes(good.read_bytes()[:-30000])
    repack(good, folder / "no_weights.nemo", leave_out="model_weights")
    repack(good, folder / "no_settings.nemo", leave_out="model_config")
    repack(good, folder / "no_tokenizer.nemo", leave_out="tokenizer.json")
    repack(good, folder / "other_class.nemo", replace=("opdlm_model.OPDLMModel", "nemo_asr.ConformerModel"))
    repack(good, folder / "no_layers.nemo", replace=("num_layers: 2", "num_layers: 0"))
    padding = "make_vocab_size_divisible_by: 128"
    repack(good, folder / "padding.nemo", replace=(padding, padding + "000000"))
    repack(good, folder / "student.nemo", replace=("num_layers: 2", "num_layers: 2\noptim: {}"))
    repack(good, folder / "wrong_shape.nemo", replace=("ffn_hidden_size: 24", "ffn_hidden_size: 32"))
    with tarfile.open(folder / "outside.nemo", "w") as tar:
        tar.add(good, "../evil")


def write_bad_prompts(folder: Path) -> None:
    write_rows(folder / "empty.jsonl")
    write_rows(folder / "malformed.jsonl", '{"prompt": "w4"}', '{"prompt": "w5"')
    write_rows(folder / "no_prompt.jsonl", '{"text": "w4"}')
    write_rows(folder / "number.jsonl", '{"prompt": 4}')
    write_rows(folder / "blank.jsonl", '{"prompt": "w4"}', '{"prompt": "  "}')
    write_rows(folder / "long.jsonl", json.dumps({"prompt": " ".join(["w4"] * 9)}))
    write_rows(folder / "mask.jsonl", '{"prompt": "w4 <|MASK|> w5"}')
    write_rows(folder / "chat.jsonl", '{"messages": [{"role": "user", "content": "w4"}]}')
    write_rows(folder / "prompts.txt", "w4 w5")


def write_bad_hugging_face_folders(folder: Path) -> None:
    def copy(name: str, source: str = "hf-qwen3-tied-wide-heads-0") -> Path:
        (folder / name).mkdir()
        for file in (folder / source).iterdir():
            (folder / name / file.name).write_bytes(file.read_bytes())
        return folder / name

    def edit_config(name: str, **changes: object) -> None:
        path = copy(name) / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    (copy("hf-no-config") / "config.json").unlink()
    (copy("hf-no-weights") / "model.safetensors").unlink()
    (copy("hf-no-tokenizer") / "tokenizer.json").unlink()
    damaged = copy("hf-damaged") / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1000])
    edit_config("hf-gpt2", model_type="gpt2", architectures=["GPT2LMHeadModel"])
    edit_config("hf-more-layers", num_hidden_layers=3, layer_types=["full_attention"] * 3)
    edit_config("hf-other-width", intermediate_size=40)
    edit_config("hf-yarn", rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0})


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """Good and bad archives, prompt files and Hugging Face folders."""
    folder = tmp_path_factory.mktemp("inputs")
    good = write_tiny_archive(folder)
    good.rename(folder / "good.nemo")
    write_prompts(folder / "prompts.jsonl")
    write_bad_archives(folder, folder / "good.nemo")
    write_bad_prompts(folder)
    write_bad_hugging_face_folders(folder)
    tiny.write_hf_folder(folder / "hf-llama", "llama")
    write_tiny_archive(folder, "llama").rename(folder / "llama.nemo")
    # The same words and seven rows fewer.
    convert_hf_to_nemo(tiny.write_hf_folder(folder / "hf-small", vocab_size=41), folder / "small.nemo")
    return Inputs(folder)


def train_arguments(*overrides: str) -> tuple[str, ...]:
    """A good command line, and what is changed in it."""
    good = (
        *COMMON,
        *TINY,
        "model.restore_from_path={folder}/good.nemo",
        "model.data.train_ds.file_path={folder}/prompts.jsonl",
        "exp_manager.explicit_log_dir={folder}/log",
    )
    changed = {override.lstrip("~+").partition("=")[0] for override in overrides}
    return *(argument for argument in good if argument.partition("=")[0] not in changed), *overrides


#: Overrides of a good training command -> what the message must name.
TRAIN: dict[str, tuple[tuple[str, ...], str]] = {
    "no-archive": (("model.restore_from_path=null",), r"model\.restore_from_path=None must be given"),
    "missing-archive": (("model.restore_from_path={folder}/none.nemo",), r"none\.nemo' does not exist"),
    "text-as-archive": (("model.restore_from_path={folder}/text.nemo",), r"text\.nemo: .*no tar file"),
    "truncated-archive": (("model.restore_from_path={folder}/truncated.nemo",), r"truncated\.nemo: .*truncated"),
    "no-weights": (
        ("model.restore_from_path={folder}/no_weights.nemo",),
        r"no_weights\.nemo: model_weights/ is missing",
    ),
    "no-settings": (
        ("model.restore_from_path={folder}/no_settings.nemo",),
        r"no_settings\.nemo: model_config\.yaml is miss",
    ),
    "no-tokenizer": (("model.restore_from_path={folder}/no_tokenizer.nemo",), r"no_tokenizer\.nemo: .*tokenizer\.json"),
    "other-class": (("model.restore_from_path={folder}/other_class.nemo",), r"other_class\.nemo: .*ConformerModel"),
    "no-layers": (("model.restore_from_path={folder}/no_layers.nemo",), r"no_layers\.nemo: .*num_layers=0"),
    "padding": (
        ("model.restore_from_path={folder}/padding.nemo",),
        r"padding\.nemo: .*_by=128000000 must be at most 65536",
    ),
    "wrong-shape": (("model.restore_from_path={folder}/wrong_shape.nemo",), r"wrong_shape\.nemo.*linear_fc1.*shape"),
    "member-outside": (
        ("model.restore_from_path={folder}/outside.nemo",),
        r"outside\.nemo: member '\.\./evil' points outside",
    ),
    "teacher-of-another-vocabulary": (
        ("model.kd_teacher_restore_from_path={folder}/small.nemo",),
        r"small\.nemo: the teacher has 41 vocabulary rows, the student 48",
    ),
    "unknown-key": (("model.opdlm.blocksize=4",), r"blocksize.*block_size"),
    "unknown-experiment": (("+experiment=nothing",), r"nothing"),
    "override-without-value": (("model.opdlm.block_size",), r"model\.opdlm\.block_size"),
    "wrong-type": (("trainer.max_steps=many",), r"trainer\.max_steps"),
    "unknown-choice": (("model.opdlm.divergence=kl",), r"model\.opdlm\.divergence='kl'.*forward_kl"),
    "no-max-steps": (("trainer.max_steps=null",), r"trainer\.max_steps=None must be given"),
    "block-size-0": (("model.opdlm.block_size=0",), r"model\.opdlm\.block_size=0 must be from 1 to 64"),
    "denoising-steps-beyond-the-block": (
        ("model.opdlm.rollout.denoising_steps=5",),
        r"denoising_steps=5",
    ),
    "nll-with-top-k": (
        ("model.opdlm.divergence=nll", "model.opdlm.divergence_top_k=4"),
        r"contradicts divergence='nll'",
    ),
    "tail-without-top-k": (
        ("model.opdlm.tail=partial",),
        r"model\.opdlm\.tail='partial' contradicts divergence_top_k=0",
    ),
    "teacher-responses-with-own-states": (("model.opdlm.responses=teacher",), r"state_selection='one_state_per_block'"),
    "data-set-responses-with-own-states": (
        ("model.opdlm.responses=dataset",),
        r"state_selection='one_state_per_block'",
    ),
    "no-responses": (
        ("+experiment=sft_dataset", "model.data.train_ds.file_path={folder}/long.jsonl"),
        r"long\.jsonl:1: a row needs exactly one response, 'response' or 'output' or a last assistant turn",
    ),
    "prompts-cut-off-from-their-responses": (
        ("+experiment=sft_dataset", "model.data.train_ds.truncate_prompt_to=4"),
        r"train_ds\.truncate_prompt_to=4 would cut a prompt off from its response; use null",
    ),
    "no-tokens-to-train": (("model.opdlm.max_trained_tokens=0",), r"max_trained_tokens=0 must be at least 1, or null"),
    "student-as-its-own-teacher": (
        ("model.restore_from_path={folder}/student.nemo",),
        r"kd_teacher_restore_from_path=None must be given: .*student\.nemo is a trained student",
    ),
    "response-grid": (("model.opdlm.block_grid=response",), r"block_grid='response' is not available yet"),
    "batch-sizes": (
        ("model.micro_batch_size=3",),
        r"model\.global_batch_size=4 must be a multiple of micro_batch_size=3",
    ),
    "pack-below-the-longest-row": (
        ("model.opdlm.pack_to_tokens=27",),
        r"model\.opdlm\.pack_to_tokens=27 cannot hold a row of \d+ tokens .*; it must be at least \d+, or null$",
    ),
    "cache-below-the-longest-rollout": (
        ("model.opdlm.rollout.max_batch_tokens=7",),
        r"model\.opdlm\.rollout\.max_batch_tokens=7 cannot hold 1 rows of \d+ tokens, .*: at least \d+ are needed$",
    ),
    "cache-below-the-longest-held-out-answer": (
        (
            "model.data.validation_ds.file_path={folder}/prompts.jsonl",
            "model.data.validation_ds.response_length=32",
            "model.opdlm.rollout.max_batch_tokens=32",
        ),
        r"model\.opdlm\.rollout\.max_batch_tokens=32 cannot hold 1 rows of \d+ tokens, .*: at least \d+ are needed$",
    ),
    "rollout-size": (
        ("model.opdlm.rollout.num_prompts_per_step=6",),
        r"must be a multiple of model\.global_batch_size=4",
    ),
    "learning-rates": (("model.optim.sched.min_lr=1",), r"min_lr=1.* must be at most model\.optim\.lr"),
    "endless-warm-up": (("model.optim.sched.warmup_steps=2",), r"warmup_steps=2 must be below trainer\.max_steps=2"),
    "fp16-on-a-cpu": (("trainer.precision=16-mixed",), r"trainer\.precision='16-mixed' is not available yet"),
    "attention-kernel": (("model.opdlm.attention=split",), r"attention='split' is not available yet; use 'auto'"),
    "fp8-without-transformer-engine": (
        ("model.fp8=true", "model.fp8_hybrid=true", "model.transformer_engine=true"),
        r"model\.fp8=True .* needs Transformer Engine .* found no Transformer Engine and no GPU",
    ),
    "recomputation-without-method": (
        ("model.activations_checkpoint_granularity=full",),
        r"needs model\.activations_checkpoint_method",
    ),
    "tensor-parallel-on-one-device": (
        ("model.tensor_model_parallel_size=2",),
        r"= 1 ranks must be a multiple of model\.tensor_model_parallel_size=2 .* trainer\.devices that work: 2$",
    ),
    "ranks-that-hold-half-a-model": (
        ("trainer.devices=3", "model.pipeline_model_parallel_size=2"),
        r"= 3 ranks must be a multiple of .*pipeline_model_parallel_size=2 .* trainer\.devices that work: 2, 4$",
    ),
    "heads-that-do-not-split": (
        ("trainer.devices=6", "model.tensor_model_parallel_size=3"),
        r"model\.tensor_model_parallel_size=3 must divide num_attention_heads=4 and num_query_groups=2 of .*good\.nemo; "
        r"nearest values that work: 2 \(",
    ),
    "key-value-groups-that-do-not-split": (
        ("trainer.devices=4", "model.tensor_model_parallel_size=4"),
        r"tensor_model_parallel_size=4 must divide num_query_groups=2 of .*good\.nemo; nearest values that work: 2 \(",
    ),
    "layers-that-do-not-split": (
        ("trainer.devices=4", "model.pipeline_model_parallel_size=4"),
        r"pipeline_model_parallel_size=4 must divide num_layers=2 of .*good\.nemo; nearest values that work: 2 \(",
    ),
    "more-pipeline-chunks-than-layers": (
        ("trainer.devices=2", "model.pipeline_model_parallel_size=2", "model.virtual_pipeline_model_parallel_size=2"),
        r"virtual_pipeline_model_parallel_size=2 .* must divide num_layers=2 of .*; nearest values that work: null$",
    ),
    "pipeline-chunks-without-a-pipeline": (
        ("model.virtual_pipeline_model_parallel_size=2",),
        r"virtual_pipeline_model_parallel_size=2 needs several pipeline stages, not pipeline_model_parallel_size=1",
    ),
    "batch-that-does-not-split": (
        ("trainer.devices=4", "model.micro_batch_size=1", "model.global_batch_size=2"),
        r"global_batch_size=2 must be a multiple of micro_batch_size=1 x 4 data-parallel ranks; nearest values that work: 4$",
    ),
    "dropout": (("+model.hidden_dropout=0.1",), r"model\.hidden_dropout=0\.1 is not supported"),
    "other-architecture": (("model.num_layers=3",), r"model\.num_layers=3 contradicts 2 of .*good\.nemo"),
    "no-prompts": (("model.data.train_ds.file_path=null",), r"train_ds\.file_path=None must be given"),
    "missing-prompts": (("model.data.train_ds.file_path={folder}/none.jsonl",), r"none\.jsonl' does not exist"),
    "folder-as-prompts": (("model.data.train_ds.file_path={folder}",), r"must be a file, not a folder"),
    "empty-prompts": (("model.data.train_ds.file_path={folder}/empty.jsonl",), r"empty\.jsonl holds no rows"),
    "malformed-row": (("model.data.train_ds.file_path={folder}/malformed.jsonl",), r"malformed\.jsonl:2: invalid JSON"),
    "row-without-prompt": (
        ("model.data.train_ds.file_path={folder}/no_prompt.jsonl",),
        r"no_prompt\.jsonl:1: .*\['text'\]",
    ),
    "number-as-prompt": (
        ("model.data.train_ds.file_path={folder}/number.jsonl",),
        r"number\.jsonl:1: 'prompt' must be a st",
    ),
    "blank-prompt": (("model.data.train_ds.file_path={folder}/blank.jsonl",), r"blank\.jsonl:2: 'prompt' is empty"),
    "prompts-of-another-format": (("model.data.train_ds.file_path={folder}/prompts.txt",), r"prompts\.txt .*\.jsonl"),
    "messages-without-template": (
        ("model.data.train_ds.file_path={folder}/chat.jsonl",),
        r"chat\.jsonl:1: .*chat template",
    ),
    "template-that-is-not-there": (("model.data.train_ds.chat_template=true",), r"tokenizer has no chat template"),
    "only-long-prompts": (
        ("model.data.train_ds.file_path={folder}/long.jsonl",),
        r"long\.jsonl: no prompt fits .*=8, .* 9",
    ),
    "prompts-beyond-the-context": (
        ("model.data.train_ds.max_prompt_length=253",),
        r"253 .*max_position_embeddings=256",
    ),
    "mask-token-in-a-prompt": (
        ("model.data.train_ds.file_path={folder}/mask.jsonl",),
        r"mask\.jsonl:1: .*mask token \(id 40\)",
    ),
    "mask-token-is-padding": (("model.opdlm.mask_token_id=0",), r"mask_token_id 0 is also the padding"),
    "mask-token-ends-turns": (("model.opdlm.mask_token_id=1",), r"mask_token_id 1 is also an end-of-turn"),
    "mask-token-outside": (("model.opdlm.mask_token_id=48",), r"mask_token_id=48 lies outside the vocabulary of 48"),
    "end-token-outside": (("model.opdlm.rollout.end_token_ids=[99]",), r"end_token_ids=99 lies outside the vocabulary"),
    "top-k-beyond-the-vocabulary": (
        ("model.opdlm.divergence_top_k=49",),
        r"divergence_top_k=49 exceeds the vocabulary",
    ),
}


@pytest.mark.parametrize("case", TRAIN)
def test_training_refuses(case: str, inputs: Inputs, command: Command) -> None:
    overrides, pattern = TRAIN[case]
    before = contents(inputs.folder)
    outcome = command("train_opdlm.py", *inputs.fill(train_arguments(*overrides)))
    assert outcome.exit_code == 2
    assert_matches(outcome.message, pattern)
    assert contents(inputs.folder) == before


def test_training_refuses_to_be_several_runs_of_one_rank(
    inputs: Inputs, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    before = contents(inputs.folder)
    outcome = command("train_opdlm.py", *inputs.fill(train_arguments()))
    assert outcome.exit_code == 2
    assert_matches(outcome.message, r"trainer\.devices=1 .*WORLD_SIZE=4: set trainer\.devices=4 trainer\.num_nodes=1$")
    assert contents(inputs.folder) == before


def assert_matches(message: str, pattern: str) -> None:
    assert re.search(pattern, message), message


TO_NEMO = ("--output_path", "{folder}/new.nemo", "--input_name_or_path")
#: Arguments of the converter -> what the message must name.
CONVERT_TO_NEMO: dict[str, tuple[tuple[str, ...], str]] = {
    "missing-folder": ((*TO_NEMO, "{folder}/none"), r"folder/none|none"),
    "no-config": ((*TO_NEMO, "{folder}/hf-no-config"), r"hf-no-config.*config\.json"),
    "no-weights": ((*TO_NEMO, "{folder}/hf-no-weights"), r"hf-no-weights.*safetensors"),
    "no-tokenizer": ((*TO_NEMO, "{folder}/hf-no-tokenizer"), r"hf-no-tokenizer.*tokenizer"),
    "damaged-weights": ((*TO_NEMO, "{folder}/hf-damaged"), r"hf-damaged/model\.safetensors"),
    "unknown-architecture": ((*TO_NEMO, "{folder}/hf-gpt2"), r"hf-gpt2/config\.json.*GPT2LMHeadModel"),
    "missing-tensors": ((*TO_NEMO, "{folder}/hf-more-layers"), r"hf-more-layers.*model\.layers\.2"),
    "wrong-shape": ((*TO_NEMO, "{folder}/hf-other-width"), r"hf-other-width.*mlp.*24"),
    "unsupported-rope": ((*TO_NEMO, "{folder}/hf-yarn"), r"rope_type='yarn' is not supported"),
    "existing-output": (
        ("--input_name_or_path", "{folder}/hf-llama", "--output_path", "{folder}/good.nemo"),
        r"good\.nemo exists already",
    ),
    "mask-token-is-padding": (
        (*TO_NEMO, "{folder}/hf-llama", "--mask_token", "<pad>"),
        r"mask token '<pad>' .*pad token",
    ),
    "mask-token-is-text": ((*TO_NEMO, "{folder}/hf-llama", "--mask_token", "w7"), r"mask token 'w7'"),
    "block-size-0": ((*TO_NEMO, "{folder}/hf-llama", "--block_size", "0"), r"--block_size 0: must be at least 1"),
    "unknown-precision": ((*TO_NEMO, "{folder}/hf-llama", "--precision", "fp8"), r"--precision: invalid choice: 'fp8'"),
}
TO_HF = ("--hf_output_path", "{folder}/new", "--input_name_or_path")
CONVERT_TO_HF: dict[str, tuple[tuple[str, ...], str]] = {
    "missing-archive": ((*TO_HF, "{folder}/none.nemo"), r"none\.nemo does not exist"),
    "text-as-archive": ((*TO_HF, "{folder}/text.nemo"), r"text\.nemo: .*no tar file"),
    "truncated-archive": ((*TO_HF, "{folder}/truncated.nemo"), r"truncated\.nemo: .*truncated"),
    "other-class": ((*TO_HF, "{folder}/other_class.nemo"), r"other_class\.nemo: .*ConformerModel"),
    "wrong-shape": ((*TO_HF, "{folder}/wrong_shape.nemo"), r"linear_fc1.*shape"),
    "existing-output": (
        ("--input_name_or_path", "{folder}/good.nemo", "--hf_output_path", "{folder}/hf-llama"),
        r"hf-llama.*exist",
    ),
    "sdar-of-another-family": (
        (*TO_HF, "{folder}/llama.nemo", "--format", "sdar"),
        r"(?i)sdar.*qwen3.*llama|llama.*qwen3",
    ),
}


@pytest.mark.parametrize("case", CONVERT_TO_NEMO)
def test_the_converter_to_nemo_refuses(case: str, inputs: Inputs, command: Command) -> None:
    arguments, pattern = CONVERT_TO_NEMO[case]
    before = contents(inputs.folder)
    outcome = command("convert_hf_to_nemo.py", *inputs.fill(arguments))
    assert outcome.exit_code != 0
    assert_matches(outcome.message, pattern)
    assert contents(inputs.folder) == before


@pytest.mark.parametrize("case", CONVERT_TO_HF)
def test_the_converter_to_hugging_face_refuses(case: str, inputs: Inputs, command: Command) -> None:
    arguments, pattern = CONVERT_TO_HF[case]
    before = contents(inputs.folder)
    outcome = command("convert_nemo_to_hf.py", *inputs.fill(arguments))
    assert outcome.exit_code != 0
    assert_matches(outcome.message, pattern)
    assert contents(inputs.folder) == before
