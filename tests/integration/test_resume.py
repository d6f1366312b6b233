"""An interrupted run that is started again becomes the run that was never interrupted, bit for bit."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_opdlm.models.conversion import convert_hf_to_nemo
from nemo_opdlm.models.opdlm_model import OPDLMModel
from nemo_opdlm.testing.metrics import without_measured
from tests.integration.training_runs import TINY, read_metrics, run, tiny_inputs, write_tiny_archive

PROMPTS = Path(__file__).parents[2] / "examples" / "prompts"
CHECKPOINTS = (
    "exp_manager.create_checkpoint_callback=true",
    "exp_manager.checkpoint_callback_params.every_n_train_steps=1",
    "exp_manager.checkpoint_callback_params.save_top_k=1",
)
#: Keeps its length when a run is cut short.
SCHEDULE = "model.optim.sched.max_steps=10"
#: The quickstart's model and settings, cut to two updates per rollout batch and short responses.
QUICKSTART = (
    "+experiment=quickstart",
    f"model.data.train_ds.file_path={PROMPTS / 'passages_train.jsonl'}",
    f"model.data.validation_ds.file_path={PROMPTS / 'passages_heldout.jsonl'}",
    "model.data.validation_ds.num_samples=4",
    "model.data.validation_ds.response_length=8",
    "model.data.train_ds.truncate_prompt_to=10",
    "model.opdlm.rollout.num_prompts_per_step=16",
    "model.opdlm.rollout.max_new_tokens=8",
    "model.global_batch_size=8",
    "model.micro_batch_size=8",
    "model.optim.sched.warmup_steps=2",
    "trainer.val_check_interval=2",
    *CHECKPOINTS,
)


@pytest.fixture(scope="module")
def archive(glassllm_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The override that names the quickstart's AR model."""
    path = tmp_path_factory.mktemp("glassllm") / "glassllm.nemo"
    convert_hf_to_nemo(glassllm_folder, path)
    return f"model.restore_from_path={path}"


def everything(model: OPDLMModel) -> dict[str, Any]:
    """Weights, fp32 master weights, moments, step counts, learning rate and schedule."""
    optimizer = model.distiller.optimizer
    state: dict[str, Any] = {f"weights.{name}": tensor for name, tensor in model.model.state_dict().items()}
    for name, parameter in model.model.named_parameters():
        if hasattr(parameter, "main_param"):
            state[f"master.{name}"] = parameter.main_param
    for part in optimizer.megatron.chained_optimizers:
        for number, moments in enumerate(part.optimizer.state.values()):
            state |= {f"moments.{number}.{name}": value for name, value in moments.items()}
    return {**state, "lr": optimizer.lr, **optimizer.scheduler.state_dict()}


def assert_identical(left: dict[str, Any], right: dict[str, Any]) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        same = torch.equal(value, right[name]) if isinstance(value, Tensor) else value == right[name]
        assert same, name


@pytest.fixture(scope="module")
def uninterrupted(
    archive: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """State and metrics of a run of 6 updates in one go."""
    log_dir = tmp_path_factory.mktemp("uninterrupted")
    model = run(log_dir, *QUICKSTART, archive, "trainer.max_steps=6")
    return everything(model), read_metrics(log_dir)


@pytest.mark.parametrize("async_save", [False, True], ids=["waiting", "async"])
@pytest.mark.parametrize("first_leg", [3, 4])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(
    first_leg: int,
    async_save: bool,
    uninterrupted: tuple[dict[str, Any], list[dict[str, Any]]],
    archive: str,
    tmp_path: Path,
) -> None:
    """After 3 updates the second rollout batch is half used, after 4 a new one is due."""
    overrides = (*QUICKSTART, archive, f"model.dist_ckpt_async_save={async_save}")
    run(tmp_path, *overrides, f"trainer.max_steps={first_leg}")
    resumed = run(tmp_path, *overrides, "trainer.max_steps=6")
    state, rows = uninterrupted
    moments = [name for name in state if name.startswith("moments.")]
    assert len(moments) >= 2 * len(list(resumed.model.parameters()))
    assert_identical(state, everything(resumed))
    found = read_metrics(tmp_path)
    assert [row["global_step"] for row in found] == [1, 2, 3, 4, 5, 6]
    assert [row["rollout_step"] for row in found] == [1, 1, 2, 2, 3, 3]
    assert without_measured(found) == without_measured(rows)


def test_a_run_goes_on_with_another_padding_of_its_vocabulary(
    uninterrupted: tuple[dict[str, Any], list[dict[str, Any]]], archive: str, tmp_path: Path
) -> None:
    """True rows and their moments are found again; products of other widths may round otherwise."""
    run(tmp_path, *QUICKSTART, archive, "trainer.max_steps=3")
    resumed = run(tmp_path, *QUICKSTART, archive, "trainer.max_steps=4", "model.make_vocab_size_divisible_by=1")
    assert resumed.model.head_weight().shape[0] == resumed.vocab_size == 1025
    found, expected = read_metrics(tmp_path)[-1], uninterrupted[1][3]
    for name in ("global_step", "train/loss", "train/grad_norm", "train/lr"):
        assert found[name] == pytest.approx(expected[name], rel=1e-3), name


@pytest.mark.parametrize("first_leg", [2, 3])
def test_the_second_pass_over_a_rollout_batch_is_resumed_bitwise(first_leg: int, archive: str, tmp_path: Path) -> None:
    """After 2 updates the pass is due, after 3 it is half done; each pass trains states of its own."""
    overrides = (*QUICKSTART, archive, "model.opdlm.epochs_per_rollout=2")
    whole = run(tmp_path / "whole", *overrides, "trainer.max_steps=5")
    run(tmp_path / "legs", *overrides, f"trainer.max_steps={first_leg}")
    resumed = run(tmp_path / "legs", *overrides, "trainer.max_steps=5")
    assert_identical(everything(whole), everything(resumed))
    expected, found = (read_metrics(tmp_path / name) for name in ("whole", "legs"))
    assert [row["rollout_step"] for row in found] == [1, 1, 1, 1, 2]
    assert without_measured(found) == without_measured(expected)
    trained = [0.0, *(row["trained_tokens"] for row in expected)]
    assert trained[3] - trained[2] != trained[1] - trained[0], "the same states once more"


def test_a_run_on_a_data_set_ends_at_its_trained_tokens_and_resumes_bitwise(tmp_path: Path) -> None:
    """With the validation and the checkpoint of a last step; started again it has nothing to do, and with more it goes on."""
    settings = (
        *TINY,
        *tiny_inputs(tmp_path),
        *CHECKPOINTS,
        SCHEDULE,
        "+experiment=sft_dataset",
        "trainer.val_check_interval=5",
    )
    whole = run(tmp_path / "whole", *settings, "trainer.max_steps=5")
    expected = read_metrics(tmp_path / "whole")
    budget = int(expected[1]["trained_tokens"]) + 1
    for _ in range(2):
        cut = run(tmp_path / "cut", *settings, "trainer.max_steps=5", f"model.opdlm.max_trained_tokens={budget}")
        found = read_metrics(tmp_path / "cut")
        assert [row["global_step"] for row in found] == [1, 2, 3] and "val_loss" in found[2]
        assert found[1]["trained_tokens"] < budget <= found[2]["trained_tokens"] == cut.distiller.num_trained_tokens
        assert len(list((tmp_path / "cut" / "checkpoints").glob("*step=3*-last"))) == 1
        assert list((tmp_path / "cut" / "checkpoints").glob("*.nemo"))
    assert_identical(everything(whole), everything(run(tmp_path / "cut", *settings, "trainer.max_steps=5")))
    found = without_measured(read_metrics(tmp_path / "cut"))
    assert found[2].pop("val_loss") > 0 and found == without_measured(expected)


@pytest.mark.parametrize("precision", ["bf16", "bf16-mixed"])
def test_fp32_master_weights_and_moments_survive_an_interruption_in_bf16(precision: str, tmp_path: Path) -> None:
    overrides = (*TINY, *tiny_inputs(tmp_path), *CHECKPOINTS, f"trainer.precision={precision}")
    whole = everything(run(tmp_path / "whole", *overrides, "trainer.max_steps=5", SCHEDULE))
    run(tmp_path / "parts", *overrides, "trainer.max_steps=3", SCHEDULE)
    assert_identical(whole, everything(run(tmp_path / "parts", *overrides, "trainer.max_steps=5", SCHEDULE)))
    assert any(name.startswith("master.") for name in whole) == (precision == "bf16")


# -- checkpoints that do not fit --


@pytest.fixture
def begun(tmp_path: Path) -> tuple[Path, tuple[str, ...]]:
    """Log folder and overrides of a run of one update, with its checkpoint."""
    overrides = (*TINY, *tiny_inputs(tmp_path), *CHECKPOINTS)
    run(tmp_path / "log", *overrides, "trainer.max_steps=1")
    return tmp_path / "log", overrides


def checkpoint_files(log_dir: Path) -> dict[str, bytes]:
    folder = log_dir / "checkpoints"
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def assert_refused(log_dir: Path, pattern: str, *overrides: str) -> None:
    before = checkpoint_files(log_dir)
    with pytest.raises(ValueError, match=pattern) as error:
        run(log_dir, *overrides)
    assert "\n" not in str(error.value)
    assert checkpoint_files(log_dir) == before


def test_a_damaged_checkpoint_is_refused_by_name_and_left_as_it_is(begun: tuple[Path, tuple[str, ...]]) -> None:
    log_dir, overrides = begun
    for file in (log_dir / "checkpoints").glob("*/trainer_state.pt"):
        file.write_bytes(file.read_bytes()[:100])
    assert_refused(log_dir, r"checkpoints/.*trainer_state\.pt is damaged", *overrides)


def test_the_checkpoint_of_another_network_is_refused_by_tensor(
    begun: tuple[Path, tuple[str, ...]], tmp_path: Path
) -> None:
    log_dir, overrides = begun
    other = write_tiny_archive(tmp_path, "llama")
    assert_refused(log_dir, r"checkpoints/.*linear_proj.* shape", *overrides, f"model.restore_from_path={other}")


@pytest.mark.parametrize(
    "change",
    [
        "model.global_batch_size=8",
        "model.opdlm.rollout.num_prompts_per_step=16",
        "model.opdlm.epochs_per_rollout=2",
        "model.seed=7",
    ],
)
def test_changes_that_would_give_an_update_other_samples_are_refused(
    begun: tuple[Path, tuple[str, ...]], change: str
) -> None:
    log_dir, overrides = begun
    assert_refused(log_dir, rf"{re.escape(change)} differs from ", *overrides, change)
