"""Training from the configuration to the archive, in every mode of the method, on a random model of two layers."""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from nemo_opdlm.diffusion.trajectory import FinishReason
from nemo_opdlm.models.archive_format import open_nemo
from nemo_opdlm.models.health import UnhealthyRun
from nemo_opdlm.models.opdlm_model import OPDLMModel
from nemo_opdlm.testing import tiny
from tests.integration.plain_transformers import block_logits
from tests.integration.training_runs import TINY, read_metrics, run, tiny_inputs, write_prompts, write_tiny_archive

#: Name -> overrides; the names are those of the ablations and options of the method.
MODES: dict[str, tuple[str, ...]] = {
    "default": (),
    "random_mask": ("+experiment=random_mask",),
    "off_policy": ("+experiment=off_policy",),
    "sft": ("+experiment=sft_baseline",),
    "sft_dataset": ("+experiment=sft_dataset",),
    "dataset_responses": ("opdlm/states=dataset_responses", "model.opdlm.ar_loss_weight=0.5"),
    "nll_on_own_rollouts": ("model.opdlm.divergence=nll",),
    "all_states": ("model.opdlm.state_selection=all_states",),
    "two_states": ("model.opdlm.states_per_rollout=2",),
    "two_epochs": ("model.opdlm.epochs_per_rollout=2",),
    "ar_loss": ("model.opdlm.ar_loss_weight=0.5",),
    "tail_bucket": ("model.opdlm.divergence_top_k=4",),
    "partial": ("model.opdlm.divergence_top_k=4", "model.opdlm.tail=partial"),
    "renormalize": ("model.opdlm.divergence_top_k=4", "model.opdlm.tail=renormalize"),
    "jsd": ("model.opdlm.divergence=jsd",),
    "mixed": ("model.opdlm.divergence=mixed", "model.opdlm.reverse_kl_weight=0.3"),
    "reverse_kl": ("model.opdlm.divergence=reverse_kl",),
    "token_normalization": ("model.opdlm.normalization=token", "model.opdlm.exclude_end_token=true"),
    "block_size_1": ("model.opdlm.block_size=1",),
    "two_denoising_steps": ("model.opdlm.rollout.denoising_steps=2", "model.opdlm.rollout.remasking=random"),
    "two_responses": ("model.opdlm.rollout.num_prompts_per_step=4", "model.opdlm.rollout.num_responses_per_prompt=2"),
    "packed": ("model.opdlm.pack_to_tokens=64", "model.opdlm.states_per_rollout=2"),
    "bf16": ("trainer.precision=bf16",),
    "bf16-mixed": ("trainer.precision=bf16-mixed",),
    "megatron_amp_O2": ("trainer.precision=bf16-mixed", "model.megatron_amp_O2=true"),
    "exact_teacher": ("trainer.precision=bf16", "model.opdlm.teacher.precision=32"),
    "recomputation": (
        "model.activations_checkpoint_granularity=full",
        "model.activations_checkpoint_method=uniform",
        "model.activations_checkpoint_num_layers=1",
    ),
}
#: Modes that train other states than those the student visited.
UNVISITED = {"random_mask", "off_policy", "sft", "sft_dataset", "dataset_responses"}
#: Modes that read their responses.
READ = {"sft_dataset", "dataset_responses"}
#: Modes in which rounding decides how far the two forwards lie apart.
ROUNDED = {"bf16", "bf16-mixed", "megatron_amp_O2", "exact_teacher"}
ALWAYS = {
    "global_step",
    "rollout_step",
    "train/loss",
    "train/grad_norm",
    "train/lr",
    "train/skipped",
    "time/student_s",
    "time/optimizer_s",
    "generated_tokens",
    "trained_tokens",
}
ON_A_NEW_ROLLOUT = {
    "rollout/tokens_per_forward",
    "rollout/response_len",
    "rollout/tokens_per_s",
    "rollout/logprob_gap",
    "rollout/logprob_gap_max",
    "time/rollout_s",
    "time/teacher_s",
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Overrides that name a tiny archive and prompts."""
    return tiny_inputs(tmp_path_factory.mktemp("inputs"))


def network_weights(model: OPDLMModel) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.model.named_parameters()}


@pytest.fixture(scope="module")
def trained(inputs: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[OPDLMModel, Path]]:
    """A model after two updates of the default mode, and its log folder."""
    log_dir = tmp_path_factory.mktemp("trained")
    yield run(log_dir, *TINY, *inputs), log_dir


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_trains(mode: str, inputs: tuple[str, ...], tmp_path: Path) -> None:
    model = run(tmp_path, *TINY, *inputs, *MODES[mode])
    untrained = OPDLMModel.restore_from(inputs[0].partition("=")[2])
    rows = read_metrics(tmp_path)
    assert [row["global_step"] for row in rows] == [1, 2] and [row["rollout_step"] for row in rows] == [1, 1]
    for row in rows:
        assert math.isfinite(row["train/loss"]) and row["train/grad_norm"] > 0 and row["train/skipped"] == 0
        assert 0 <= row["train/agreement"] <= 1
    if mode not in UNVISITED:
        tolerance = 0.2 if mode in ROUNDED else 1e-4
        assert 0 < rows[0]["rollout/logprob_gap"] <= rows[0]["rollout/logprob_gap_max"] < tolerance
    assert all(("rollout/logprob_gap" in row) == (row is rows[0] and mode not in UNVISITED) for row in rows)
    assert 0 < rows[0]["trained_tokens"] < rows[1]["trained_tokens"]
    num_generated = 0 if mode in READ else 8 * rows[0]["rollout/response_len"]
    assert rows[0]["generated_tokens"] == rows[1]["generated_tokens"] == num_generated
    assert ("rollout/tokens_per_forward" in rows[0]) == (mode not in READ)
    before = network_weights(untrained)
    for name, tensor in network_weights(model).items():
        assert tensor.isfinite().all() and not torch.equal(tensor, before[name]), name


def test_each_line_of_metrics_says_what_happened(trained: tuple[OPDLMModel, Path]) -> None:
    first, second = read_metrics(trained[1])
    assert first.keys() >= ALWAYS | ON_A_NEW_ROLLOUT
    assert second.keys() >= ALWAYS and not ON_A_NEW_ROLLOUT & second.keys()
    assert first["train/lr"] == pytest.approx(1e-2) and second["train/lr"] < first["train/lr"]
    by_ratio = [value for key, value in first.items() if key.startswith("train/kl_at_mask_ratio_")]
    assert len(by_ratio) > 1 and min(by_ratio) <= first["train/kl"] <= max(by_ratio)


@pytest.mark.parametrize("responses", ["student", "teacher"])
def test_where_the_teacher_waits_and_when_gradients_are_summed_changes_nothing(
    responses: str, inputs: tuple[str, ...], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mode = MODES["off_policy"] if responses == "teacher" else ()
    run(tmp_path / "plain", *TINY, *inputs, *mode)
    caplog.clear()
    changed = ("model.opdlm.teacher.offload=true", "model.optim.overlap_grad_sync=true")
    model = run(tmp_path / "changed", *TINY, *inputs, *mode, *changed)
    assert model.teacher is not None and model.teacher.network.is_offloaded
    (said,) = [message for message in caplog.messages if message.startswith("Effective settings: ")]
    assert "overlap_grad_sync: on; " in said and said.endswith("teacher: fp32, offloaded")
    for row, plain in zip(*(read_metrics(tmp_path / name) for name in ("changed", "plain")), strict=True):
        for key in ("train/loss", "train/grad_norm", "val_loss", "generated_tokens"):
            assert (key in row) == (key in plain)
            # With overlap the head's gradient is added up apart, and rounded otherwise.
            assert row.get(key, 0.0) == pytest.approx(plain.get(key, 0.0), rel=1e-5), key


def test_sft_on_the_data_sets_responses_is_the_nll_of_transformers(tmp_path: Path) -> None:
    """Of the first update, token by token; a response is the row's words and the end token, up to the limit."""
    paths = tiny_inputs(tmp_path)[:2]
    model = run(tmp_path / "log", *TINY, *paths, *MODES["sft_dataset"], "trainer.max_steps=1")
    assert model.teacher is None
    batch = model.distiller.batch
    assert batch is not None
    source = tmp_path / "hf-qwen3-tied-wide-heads-0"
    reference = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float64, attn_implementation="eager")
    lines = [json.loads(line) for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    losses, reasons = [], set()
    for row, row_id in enumerate(model.distiller.row_ids(1)[:4]):
        prompt, response = (
            [int(word[1:]) for word in lines[int(row_id) - 1][key].split()] for key in ("prompt", "response")
        )
        clean = torch.tensor([*prompt, *[*response, tiny.END_TOKEN_ID][:10]])
        assert torch.equal(batch.trajectory.token_ids[row, : len(clean)], clean)
        reasons.add(FinishReason(int(batch.trajectory.finish_reason[row])))
        state = batch.states.state_ids[row, 0]
        losses.append(masked_nll(reference, clean, state, len(prompt)))
        assert len(losses[-1]) == int(batch.states.loss_mask[row].sum()) > 0
    assert reasons == {FinishReason.END_OF_TURN, FinishReason.LENGTH}
    (metrics,) = read_metrics(tmp_path / "log")
    assert metrics["train/loss"] == pytest.approx(float(torch.stack([x.mean() for x in losses]).mean()), rel=1e-5)
    assert metrics["trained_tokens"] == sum(map(len, losses)) and metrics["generated_tokens"] == 0


def masked_nll(reference: PreTrainedModel, clean: Tensor, state: Tensor, prompt_len: int) -> Tensor:
    """Of each masked response token, seen from its block's state and the clean blocks before it."""
    found = []
    for start in range(prompt_len // 4 * 4, len(clean), 4):
        log_probs = block_logits(reference, torch.cat([clean[:start], state[start : start + 4]]), 4).log_softmax(-1)
        for i in range(max(start, prompt_len), min(start + 4, len(clean))):
            if state[i] == tiny.MASK_TOKEN_ID:
                found.append(-log_probs[i - start, clean[i]])
    return torch.stack(found)


def test_two_states_train_about_twice_the_tokens_of_one(
    trained: tuple[OPDLMModel, Path], inputs: tuple[str, ...], tmp_path: Path
) -> None:
    run(tmp_path, *TINY, *inputs, *MODES["two_states"])
    one, two = (read_metrics(folder)[-1] for folder in (trained[1], tmp_path))
    assert one["generated_tokens"] == two["generated_tokens"]
    assert 1.5 < two["trained_tokens"] / one["trained_tokens"] < 2.5


def test_the_held_out_set_is_the_same_in_every_run(
    trained: tuple[OPDLMModel, Path], inputs: tuple[str, ...], tmp_path: Path
) -> None:
    other = run(tmp_path, *TINY, *inputs, "model.seed=77", "model.opdlm.rollout.temperature=0.5", "trainer.max_steps=1")
    assert other.heldout.checksum == trained[0].heldout.checksum
    assert float(trained[0].trainer.callback_metrics["val_loss"]) == pytest.approx(
        trained[0].heldout.divergence(trained[0].model, 4), abs=1e-6
    )


def test_validations_are_counted_in_updates_across_epochs(inputs: tuple[str, ...], tmp_path: Path) -> None:
    # 24 prompts are three rollout steps of two updates: an epoch has six.
    run(tmp_path, *TINY, *inputs, "trainer.max_steps=9", "trainer.val_check_interval=4")
    assert [row["global_step"] for row in read_metrics(tmp_path) if "val_loss" in row] == [4, 8]


# -- updates without a gradient to follow --


def test_updates_without_a_finite_gradient_are_counted_and_end_the_run_by_naming_the_samples(
    inputs: tuple[str, ...], tmp_path: Path
) -> None:
    model = run(tmp_path, *TINY, *inputs, "model.opdlm.max_consecutive_skips=3")
    distiller = model.distiller
    distiller.step = distiller.optimizer.step  # Lightning's own step ends with its fit loop
    assert distiller.teacher is not None
    embedding = distiller.teacher.network.head_weight()
    healthy = embedding.clone()
    before = network_weights(model)
    embedding[7] = torch.nan
    skipped: list[float] = [distiller.update(step)["train/skipped"] for step in (2, 3)]
    assert skipped == [1, 2]
    assert all(torch.equal(tensor, before[name]) for name, tensor in network_weights(model).items())
    embedding.copy_(healthy)
    assert distiller.update(4)["train/skipped"] == 2
    assert not torch.equal(
        network_weights(model)["0.decoder.final_layernorm.weight"], before["0.decoder.final_layernorm.weight"]
    )
    embedding[7] = torch.nan
    distiller.batch = None
    for step in (5, 6):
        distiller.update(step)
    with pytest.raises(
        UnhealthyRun,
        match=r"3 updates in a row were skipped .*grad_norm=nan .*loss=nan on rows \d+, \d+, \d+, \d+ of .* rollout step 4: ",
    ):
        distiller.update(7)


def test_a_loss_that_is_not_finite_skips_the_update_although_its_gradient_is(
    inputs: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizer = run(tmp_path, *TINY, *inputs).distiller.optimizer
    stepped: list[bool] = []
    monkeypatch.setattr(optimizer.megatron, "prepare_grads", lambda: False)
    monkeypatch.setattr(optimizer.megatron, "get_grad_norm", lambda: 1.0)
    monkeypatch.setattr(optimizer.megatron, "step_with_ready_grads", lambda: stepped.append(True))
    assert optimizer.step(loss=math.inf) == 1.0 and not stepped
    assert optimizer.step(loss=2.0) == 1.0 and stepped


def test_a_run_of_skipped_updates_ends_by_naming_the_prompts_that_are_to_blame(tmp_path: Path) -> None:
    """A token whose embedding has overflowed spoils the rows that hold it."""
    prompts = write_prompts(tmp_path / "prompts.jsonl")
    archive = write_tiny_archive(tmp_path, "llama-llama3-rope")
    files = [f"model.data.{part}_ds.file_path={prompts}" for part in ("train", "validation")]
    paths = (f"model.restore_from_path={archive}", *files)
    model = run(tmp_path / "log", *TINY, *paths, "model.opdlm.max_consecutive_skips=1")
    distiller, token = model.distiller, 9
    distiller.step = distiller.optimizer.step
    model.model.get_parameter("0.embedding.word_embeddings.weight").data[token] = torch.inf
    with pytest.raises(UnhealthyRun) as error:
        for step in range(2, 8):
            distiller.update(step)
    batch = distiller.batch
    assert batch is not None
    trajectory = batch.trajectory
    is_written = (
        torch.arange(trajectory.token_ids.shape[1]) < (trajectory.prompt_len + trajectory.response_len)[:, None]
    )
    holds = ((trajectory.token_ids == token) & is_written).any(-1)
    row_ids = distiller.row_ids(batch.rollout_step)
    guilty = [row_ids[row] for row in torch.nonzero(holds)[:, 0].tolist()]
    named = re.search(r"on rows (.*) of the prompts", str(error.value))
    assert named is not None and set(named[1].split(", ")) <= set(guilty) and len(guilty) < 8
    assert "\n" not in str(error.value)


# -- responses that are garbage --


def test_empty_responses_end_the_run_after_the_warm_up_with_advice(inputs: tuple[str, ...], tmp_path: Path) -> None:
    ends = f"model.opdlm.rollout.end_token_ids={list(range(4, 40))}"
    settings = (*TINY, *inputs, ends, "model.opdlm.rollout.garbage_warmup_steps=1", "trainer.max_steps=4")
    message = r"empty responses .* of rollout step 2 .*max_garbage_frac=0\.5 .*lower model\.optim\.lr"
    with pytest.raises(UnhealthyRun, match=message):
        run(tmp_path, *settings)
    rows = read_metrics(tmp_path)
    assert [row["global_step"] for row in rows] == [1, 2] and rows[0]["rollout/empty_frac"] > 0.5
    run(tmp_path, *settings, "model.opdlm.rollout.max_garbage_frac=null")


# -- archives --


def test_a_saved_model_is_restored_without_its_teacher(trained: tuple[OPDLMModel, Path], tmp_path: Path) -> None:
    model, archive_path = trained[0], tmp_path / "student.nemo"
    model.save_to(str(archive_path))
    restored = OPDLMModel.restore_from(str(archive_path))
    assert restored.teacher is None and model.teacher is not None
    expected, found = network_weights(model), network_weights(restored)
    assert expected.keys() == found.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    assert restored.tokenizer_files == model.tokenizer_files and restored.tokenizer_files
    assert restored.config.opdlm == model.config.opdlm and restored.arch == model.arch
    assert not any("teacher" in name for name in model.state_dict())


def test_an_archive_holds_the_students_tensors_and_no_others(trained: tuple[OPDLMModel, Path], tmp_path: Path) -> None:
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    trained[0].save_to(str(tmp_path / "student.nemo"))
    with open_nemo(tmp_path / "student.nemo") as archive:
        entries: dict[str, Any] = FileSystemReader(archive.weights).read_metadata().state_dict_metadata
        stored = {
            name: entry.size.numel() for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)
        }
        text = (archive.folder / "model_config.yaml").read_text()
    assert sum(stored.values()) == sum(parameter.numel() for parameter in trained[0].model.parameters())
    assert all(name.startswith("model.") for name in stored)
    assert str(tmp_path.parent) not in text and "file_path" not in text


def test_a_trained_student_is_its_own_teacher_for_nobody(
    trained: tuple[OPDLMModel, Path], inputs: tuple[str, ...], tmp_path: Path
) -> None:
    student = tmp_path / "student.nemo"
    trained[0].save_to(str(student))
    settings = (*TINY, *inputs, f"model.restore_from_path={student}", "trainer.max_steps=1")
    message = (
        f"model.kd_teacher_restore_from_path=None must be given: {student} is a trained student, .* its own teacher"
    )
    for mode in ("default", "sft_dataset"):  # training asks the teacher, or validation alone
        with pytest.raises(ValueError, match=message):
            run(tmp_path / mode, *settings, *MODES[mode])
        assert not (tmp_path / mode).exists()
    nobody = (*settings, *MODES["sft_dataset"], "model.data.validation_ds.file_path=null")
    assert run(tmp_path / "nobody", *nobody).teacher is None
    named = run(tmp_path / "named", *settings, f"model.kd_teacher_restore_from_path={student}")
    assert named.teacher is not None


def test_rows_that_pad_the_vocabulary_change_nothing(
    trained: tuple[OPDLMModel, Path], inputs: tuple[str, ...], tmp_path: Path
) -> None:
    padded, log_dir = trained
    plain = run(tmp_path / "plain", *TINY, *inputs, "model.make_vocab_size_divisible_by=1")
    assert plain.teacher is not None
    for network, rows in (
        (padded.model, 128),
        (plain.model, tiny.VOCAB_SIZE),
        (plain.teacher.network, tiny.VOCAB_SIZE),
    ):
        assert len(network.head_weight()) == rows
    assert not padded.model.head_weight()[tiny.VOCAB_SIZE :].any()
    for row, expected in zip(read_metrics(tmp_path / "plain"), read_metrics(log_dir), strict=True):
        for key in ("train/loss", "train/grad_norm", "val_loss", "generated_tokens"):
            assert row.get(key, 0.0) == pytest.approx(expected.get(key, 0.0), rel=1e-5), key
    plain.save_to(str(tmp_path / "plain.nemo"))
    restored = OPDLMModel.restore_from(str(tmp_path / "plain.nemo"))
    assert torch.equal(restored.model.head_weight()[: tiny.VOCAB_SIZE], plain.model.head_weight())


def test_a_trained_archive_trains_on_against_the_teacher_it_came_from(
    trained: tuple[OPDLMModel, Path], inputs: tuple[str, ...], tmp_path: Path
) -> None:
    trained[0].save_to(str(tmp_path / "student.nemo"))
    source = inputs[0].partition("=")[2]
    model = run(
        tmp_path / "log",
        *TINY,
        *inputs,
        f"model.restore_from_path={tmp_path / 'student.nemo'}",
        f"model.kd_teacher_restore_from_path={source}",
        "model.optim.lr=1e-9",
        "model.optim.sched.min_lr=0",
    )
    found = network_weights(model)
    for name, tensor in network_weights(trained[0]).items():
        torch.testing.assert_close(found[name], tensor, atol=1e-7, rtol=0)
    assert model.heldout.checksum == trained[0].heldout.checksum
