"""What a run tells beside metrics.jsonl, and that the loggers of exp_manager tell the same."""

import io
import itertools
import json
import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.flop_counter import FlopCounterMode

from nemo_opdlm.benchmark.training_cost import UNKNOWN_TO_TORCH
from nemo_opdlm.benchmark.training_workload import TrainingBatch
from nemo_opdlm.config import Architecture
from nemo_opdlm.diffusion.work import rollout_work
from nemo_opdlm.distillation.divergence import DivergenceKind, DivergenceSpec
from nemo_opdlm.distillation.loss import Normalization
from nemo_opdlm.lightning import callbacks
from nemo_opdlm.lightning.callbacks import StepProgressBar
from nemo_opdlm.lightning.samples import as_text
from nemo_opdlm.megatron.forward import forward_backward
from nemo_opdlm.megatron.optimizer import wrap
from nemo_opdlm.megatron.parallel import ParallelContext
from nemo_opdlm.megatron.step import distillation_loss, micro_batches
from nemo_opdlm.megatron.teacher import Teacher
from nemo_opdlm.models.flops import forward_flops
from nemo_opdlm.models.peak_flops import known_peak
from nemo_opdlm.testing import tiny
from tests.integration.toy_model import Killed, ToyModel
from tests.integration.toy_runs import fit
from tests.integration.training_runs import TINY, read_metrics, run, tiny_inputs

CHECKPOINTS = (
    "exp_manager.create_checkpoint_callback=true",
    "exp_manager.checkpoint_callback_params.every_n_train_steps=1",
    "exp_manager.checkpoint_callback_params.save_top_k=1",
)
#: Keeps its length when a run is cut short.
SCHEDULE = "model.optim.sched.max_steps=10"


def in_files(rows: list[dict[str, Any]]) -> dict[str, dict[int, float]]:
    """Metric -> step -> value of the lines of `metrics.jsonl`."""
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        for name in row.keys() - {"global_step"}:
            found.setdefault(name, {})[row["global_step"]] = float("nan") if row[name] is None else row[name]
    return found


def in_tensorboard(log_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """Metric -> what TensorBoard shows of it, in the order in which it was written."""
    events = EventAccumulator(str(log_dir), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def assert_tensorboard_is(log_dir: Path, rows: list[dict[str, Any]]) -> None:
    shown = in_tensorboard(log_dir)
    for name, values in in_files(rows).items():
        steps = [step for step, _ in shown[name]]
        assert steps == sorted(values), name
        assert [value for _, value in shown[name]] == pytest.approx(list(values.values()), rel=1e-5, nan_ok=True), name


def test_tensorboard_shows_each_step_once_also_where_a_killed_run_was_ahead_of_its_checkpoint(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"tensorboard": True, "every_n_train_steps": 3, "every_n_epochs": None}
    fit(tmp_path, 8, killed_before=5, **settings)
    assert [step for step, _ in in_tensorboard(tmp_path)["train/loss"]] == [1, 2, 3, 4, 5]
    fit(tmp_path, 8, **settings)
    rows = read_metrics(tmp_path)
    assert [row["global_step"] for row in rows] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [row["global_step"] for row in rows if "time/checkpoint_s" in row] == [2, 3, 4, 6, 8]
    assert all(row["train/grad_norm"] is None for row in rows), "NaN"
    assert_tensorboard_is(tmp_path, rows)


def test_a_run_killed_in_a_validation_adds_its_figures_to_the_line_from_before(tmp_path: Path) -> None:
    """The checkpoint of step 4 is saved ahead of the validation that is due then."""
    settings: dict[str, Any] = {"tensorboard": True, "every_n_train_steps": 4, "every_n_epochs": None}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ToyModel, "validation_step", killed_at(4, ToyModel.validation_step))
        with pytest.raises(Killed):
            fit(tmp_path, 6, **settings)
    assert "val_loss" not in read_metrics(tmp_path)[-1]
    fit(tmp_path, 6, **settings)
    rows = read_metrics(tmp_path)
    assert [row["global_step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["global_step"] for row in rows if "val_loss" in row] == [2, 4, 6]
    assert_tensorboard_is(tmp_path, rows)


def killed_at(step: int, validation_step: Callable[..., None]) -> Callable[..., None]:
    def validate(model: ToyModel, *arguments: Any) -> None:
        if model.trainer.global_step == step:
            raise Killed
        validation_step(model, *arguments)

    return validate


# -- Weights & Biases --


def wandb_history(file: Path) -> list[dict[str, Any]]:
    """What an offline run has logged: LevelDB's log format, in blocks of 32 KiB behind a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    def records() -> Iterator[Any]:
        data, place, record = file.read_bytes(), 7, b""
        while place + 7 <= len(data):
            if 32768 - place % 32768 < 7:
                place += 32768 - place % 32768
                continue
            _, length, kind = struct.unpack_from("<IHB", data, place)
            record += data[place + 7 : place + 7 + length]
            place += 7 + length
            if kind in (1, 4):  # whole, or the last part
                yield wandb_internal_pb2.Record.FromString(record)
                record = b""

    return [
        {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        for record in records()
        if record.WhichOneof("record_type") == "history"
    ]


def test_a_resumed_run_goes_on_in_its_weights_and_biases_run(tmp_path: Path) -> None:
    wandb = pytest.importorskip("wandb", reason="wandb is not installed: it comes with nemo-toolkit[core]")
    log_dir = tmp_path / "log"
    settings = (
        "exp_manager.create_wandb_logger=true",
        "exp_manager.wandb_logger_kwargs={project: tests, name: tiny, offline: true}",
    )
    overrides = (*TINY, *tiny_inputs(tmp_path), *CHECKPOINTS, *settings, SCHEDULE)
    run(log_dir, *overrides, "trainer.max_steps=3")
    run(log_dir, *overrides, "trainer.max_steps=5")
    rows = read_metrics(log_dir)
    wandb.teardown()  # its own process writes the files, and need not be through when a run is finished
    first, second = sorted((log_dir / "wandb").glob("offline-run-*/*.wandb"))
    assert first.name == second.name, "one id"
    for file, steps in ((first, (1, 2, 3)), (second, (4, 5))):
        history = wandb_history(file)
        for name, values in in_files([row for row in rows if row["global_step"] in steps]).items():
            logged = {row["trainer/global_step"]: row[name] for row in history if name in row}
            assert logged == pytest.approx(values), name
            assert sum(name in row for row in history) == len(values), name


# -- progress --


def test_every_phase_of_a_step_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(callbacks, "_FILE_SECONDS", 0.0)
    overrides = (*TINY, *tiny_inputs(tmp_path), *CHECKPOINTS, "trainer.enable_progress_bar=true")
    run(tmp_path, *overrides, "exp_manager.checkpoint_callback_params.every_n_train_steps=2")
    told = re.findall(r"^Training, ([^:\n]*)", capsys.readouterr().err, re.MULTILINE)
    phases = [name for name, _ in itertools.groupby(told)]
    step = ["student", "optimizer"]
    expected = ["rollout", "teacher", *step, *step, "checkpoint", "held-out answers", "validation"]
    assert phases == expected
    assert told.count("rollout") > 3 and told.count("held-out answers") > 3, "how far they are"


def test_other_ranks_show_no_progress() -> None:
    stream, module = io.StringIO(), SimpleNamespace()
    bar = StepProgressBar(stream=stream)
    trainer: Any = SimpleNamespace(is_global_zero=False, max_steps=4, global_step=0)
    bar.setup(trainer, module, "fit")  # type: ignore[arg-type]
    bar.on_train_start(trainer, module)  # type: ignore[arg-type]
    assert not stream.getvalue() and not vars(module)


# -- samples --


def test_samples_of_the_current_rollouts_are_logged_and_a_resumed_run_logs_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = (
        "model.log_samples_every_n_steps=2",
        "model.num_logged_samples=3",
        "exp_manager.create_tensorboard_logger=true",
    )
    overrides = (*TINY, *tiny_inputs(tmp_path), *CHECKPOINTS, SCHEDULE, *settings)
    model = run(tmp_path / "whole", *overrides, "trainer.max_steps=4")
    run(tmp_path / "legs", *overrides, "trainer.max_steps=3")
    run(tmp_path / "legs", *overrides, "trainer.max_steps=4")
    whole, legs = ((tmp_path / name / "samples.jsonl").read_text() for name in ("whole", "legs"))
    assert whole == legs
    samples = [json.loads(line) for line in whole.splitlines()]
    assert [(sample["global_step"], sample["rollout_step"]) for sample in samples] == [
        *[(1, 1)] * 3,
        *[(2, 1)] * 3,
        *[(4, 2)] * 3,
    ]
    assert samples[:3] == [{**sample, "global_step": 1} for sample in samples[3:6]], "the same rollouts"
    batch = model.distiller.batch
    assert batch is not None
    for row, sample in enumerate(samples[6:]):
        end = int(batch.trajectory.prompt_len[row])
        words = [f"w{i}" for i in batch.trajectory.token_ids[row, :end].tolist()]
        assert sample["prompt"].split() == words
        assert sample["response_len"] == int(batch.trajectory.response_len[row]) == len(sample["response"].split())
        assert sample["num_forwards"] == int(batch.trajectory.num_forwards[row]) >= 1
        assert sample["finish_reason"] in ("end_of_turn", "length")
    (table,) = [text for text in caplog.messages if text.startswith("Samples after update 1\n")][:1]
    assert all(word in table for word in samples[0]["prompt"].split())
    events = EventAccumulator(str(tmp_path / "legs"))
    events.Reload()
    shown = events.Tensors("samples/text_summary")
    assert [event.step for event in shown] == [1, 2, 4]
    assert samples[6]["prompt"] in shown[-1].tensor_proto.string_val[0].decode()


def test_nothing_in_a_sample_is_a_command_of_the_terminal_or_markup() -> None:
    text = as_text(("prompt", "response"), [("[red]a\x1b[31mb\rc", "\u202e" + "d" * 1000)])
    assert "[red]a\\x1b[31mb\\rc" in text and "\\u202e" in text and "…" in text
    assert text.isascii() or set(text) <= {*text.encode("ascii", "ignore").decode(), *"┏━┳┓┃┡╇┩│├┼┤└┴┘─…"}


# -- speed and cost --


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_the_peak_of_a_gpu_is_known_by_its_name(name: str, tflops: float | None) -> None:
    assert known_peak(name) == tflops


def test_a_forward_pass_has_the_flops_of_its_matrix_products() -> None:
    arch = Architecture(
        num_layers=2,
        hidden_size=8,
        ffn_hidden_size=12,
        num_attention_heads=4,
        vocab_size=10,
        max_position_embeddings=9,
        num_query_groups=2,
        kv_channels=4,
    )
    # One token that sees five: query and output 8 x 16 each, key and value 8 x 8 each, SwiGLU 3 x 8 x 12, head 8 x 10.
    layer = 2 * (2 * 8 * 16 + 2 * 8 * 8 + 3 * 8 * 12) + 2 * 2 * 16 * 5
    assert forward_flops(arch, (1, 5, 1)) == 2 * layer + 2 * 8 * 10


def test_an_update_has_the_flops_of_three_forward_passes(parallel: ParallelContext) -> None:
    """As torch counts them, once it knows products that are added in place; attention is left out on both sides."""
    arch = tiny.architecture()
    batch = TrainingBatch.of_lengths(
        torch.tensor([5, 3]), torch.tensor([9, 12]), arch.vocab_size, tiny.MASK_TOKEN_ID, block_size=4
    )
    network = wrap(tiny.random_network(arch, parallel), tiny.optimizer_settings())
    targets, rows = Teacher.own_tokens(batch.trajectory), torch.arange(2)
    parts = micro_batches(batch.trajectory, batch.states, targets, rows, Normalization.sequence, 1)
    added = {operator: count for operator, count in UNKNOWN_TO_TORCH.items() if operator is torch.ops.aten.addmm_}
    with FlopCounterMode(display=False, custom_mapping=added) as counter:
        forward_backward(network, parts, distillation_loss(network.head, DivergenceSpec(DivergenceKind.nll)))
    assert counter.get_total_flops() == 3 * forward_flops(arch, (batch.num_useful, 0, batch.num_supervised))


def assert_documented(rows: list[dict[str, Any]]) -> None:
    text = (Path(__file__).parents[2] / "docs" / "logs.md").read_text(encoding="utf-8")
    known = set(re.findall(r"`([a-z_/]+)`", text)) | {"train/kl_at_mask_ratio_"}
    found = {name.rstrip("0123456789.") for row in rows for name in row}
    assert found <= known


MODES: dict[str, tuple[str, ...]] = {
    "published": (),
    "top_k_with_causal_copies": ("model.opdlm.divergence_top_k=4", "model.opdlm.ar_loss_weight=0.5"),
    "two_epochs": ("model.opdlm.epochs_per_rollout=2",),
    "off_policy": ("+experiment=off_policy",),
    "nll": ("model.opdlm.divergence=nll",),
    "sft_dataset": ("+experiment=sft_dataset",),
}


@pytest.mark.parametrize("mode", MODES)
def test_each_step_says_what_it_cost(mode: str, tmp_path: Path) -> None:
    overrides = (*TINY, *tiny_inputs(tmp_path), *MODES[mode])
    model = run(tmp_path, *overrides, "trainer.max_steps=3", "model.device_peak_tflops=0.5")
    rows = read_metrics(tmp_path)
    assert_documented(rows)
    hours = [row["device_hours"] for row in rows]
    assert 0 < hours[0] < hours[1] < hours[2]
    for row in rows:
        phases = sum(row.get(f"time/{name}_s", 0.0) for name in ("rollout", "teacher", "student", "optimizer"))
        assert 0 < phases <= row["time/step_s"] and phases > 0.5 * row["time/step_s"]
        assert row["throughput/mfu"] == pytest.approx(row["throughput/tflops_per_device"] / 0.5)
        assert row["train/tokens_per_s"] > 0 and 0.05 < row["memory/peak_gib"] < 100
    batch = model.distiller.batch
    assert batch is not None
    cost = model._throughput.cost(batch)
    tokens = sum(cost.row_tokens)
    clean = int((batch.trajectory.prompt_len + batch.trajectory.response_len).sum())
    assert (2 if mode == "top_k_with_causal_copies" else 1) * clean < tokens < 4 * clean
    index = 2 % model.config.updates_per_epoch
    flops = rows[2]["throughput/tflops_per_device"] * 1e12 * rows[2]["time/step_s"]
    is_first = "time/rollout_s" in rows[2]
    assert flops == pytest.approx(cost.update_flops[index] + is_first * cost.rollout_flops)
    assert (cost.rollout_flops == 0) == (mode == "sft_dataset"), "responses that are read cost nothing"
    if mode == "nll":  # the student alone: no teacher is asked
        of_rollout = rollout_work(batch.trajectory).stack().sum(1).tolist()
        assert cost.rollout_flops == forward_flops(model.arch, of_rollout)


def test_without_a_peak_there_is_no_mfu_and_device_hours_survive_a_restart(tmp_path: Path) -> None:
    overrides = (*TINY, *tiny_inputs(tmp_path), *CHECKPOINTS, SCHEDULE)
    model = run(tmp_path / "log", *overrides, "trainer.max_steps=2")
    model._throughput.device_hours += 100
    model.trainer.save_checkpoint(next((tmp_path / "log" / "checkpoints").glob("*last")))
    run(tmp_path / "log", *overrides, "trainer.max_steps=3")
    rows = read_metrics(tmp_path / "log")
    assert rows[1]["device_hours"] < 1 and 100 < rows[2]["device_hours"] < 101
    assert not any("throughput/mfu" in row for row in rows)
