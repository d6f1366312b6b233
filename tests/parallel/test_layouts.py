"""The layout never changes the result: rollouts token for token, losses and gradients of one process."""

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from nemo_opdlm.diffusion.layout import BlockLayout
from nemo_opdlm.diffusion.packing import pack
from nemo_opdlm.diffusion.trajectory import Trajectory
from nemo_opdlm.models.conversion import convert_hf_to_nemo
from nemo_opdlm.models.distiller import rows_of_rank
from nemo_opdlm.testing import tiny
from nemo_opdlm.testing.ranks import Ranks
from tests.integration import training_runs
from tests.parallel import runs
from tests.parallel.runs import LAYOUTS, Layout, Outcome

NUM_UPDATES = 4
#: A prompt of 14 tokens, a response of 18 and one state of it, in whole blocks of 4.
LONGEST_ROW = 12 + 2 * 20


@pytest.fixture(scope="module")
def one_process(glassllm: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcome, Path]:
    """The updates of one process, and where its gradients lie."""
    folder = tmp_path_factory.mktemp("one")
    return runs.train(glassllm, Layout(), NUM_UPDATES, gradients=str(folder)), folder


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "1"])
def test_the_first_updates_are_those_of_one_process(
    name: str,
    one_process: tuple[Outcome, Path],
    glassllm: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    num_ranks, layout = LAYOUTS[name]
    ranks: Ranks = request.getfixturevalue({2: "two_ranks", 4: "four_ranks"}[num_ranks])
    outcomes: list[Outcome] = ranks.run(runs.train, glassllm, layout, NUM_UPDATES, (), str(tmp_path))
    expected, gradients = one_process
    for outcome in outcomes:
        assert_same_rollouts(outcome, expected)
        assert_same_losses(outcome, expected, 1e-5)
    assert_same_gradients(glassllm, tmp_path, gradients, NUM_UPDATES)


@pytest.mark.parametrize("name", ["1", "TP2+SP", "PP2", "VPP2", "CP2"])
def test_packed_updates_are_those_of_rows_apart_in_one_process(
    name: str,
    one_process: tuple[Outcome, Path],
    glassllm: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    num_ranks, layout = LAYOUTS[name]
    arguments = (glassllm, layout, 2, (f"model.opdlm.pack_to_tokens={2 * LONGEST_ROW + 5}",), str(tmp_path))
    is_alone = num_ranks == 1
    outcomes = (
        [runs.train(*arguments)] if is_alone else request.getfixturevalue("two_ranks").run(runs.train, *arguments)
    )
    apart, gradients = one_process
    for outcome in outcomes:
        assert_same_rollouts(outcome, Outcome(apart.metrics[:2], apart.rollouts[:1]))
        assert_same_losses(outcome, Outcome(apart.metrics[:2], []), 1e-5)
    assert_same_gradients(glassllm, tmp_path, gradients, 2)


def test_data_parallel_ranks_may_have_different_numbers_of_packs(
    glassllm: str, two_ranks: Ranks, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    rows = ({"prompt": "the old king and the sea " * (1 + number * number % 7)} for number in range(40))
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts_of_all_lengths = (
        f"model.data.train_ds.file_path={prompts}",
        "model.data.train_ds.truncate_prompt_to=null",
        "model.data.train_ds.max_prompt_length=100",
    )
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    expected = runs.train(glassllm, Layout(), 2, prompts_of_all_lengths, str(tmp_path / "one"))
    overrides = (*prompts_of_all_lengths, f"model.opdlm.pack_to_tokens={uneven_capacity(expected)}")
    for outcome in two_ranks.run(runs.train, glassllm, Layout(), 2, overrides, str(tmp_path / "two")):
        assert_same_rollouts(outcome, expected)
        assert_same_losses(outcome, expected, 1e-5)
    assert_same_gradients(glassllm, tmp_path / "two", tmp_path / "one", 2)


def uneven_capacity(outcome: Outcome) -> int:
    """Tokens of a pack with which two data-parallel ranks need different numbers of packs in the first update."""
    trajectory = Trajectory.from_state_dict(outcome.rollouts[0])
    one_state = torch.ones_like(trajectory.prompt_len)
    lengths = BlockLayout(trajectory.prompt_len, trajectory.response_len, one_state, trajectory.block_size).row_len
    longest = int(lengths.max())
    ranks = [lengths[rows_of_rank(trajectory, 8, rank, 2)[:4]] for rank in range(2)]
    return next(n for n in range(longest, 4 * longest) if len(pack(ranks[0], n)) != len(pack(ranks[1], n)))


@dataclass(frozen=True)
class Family:
    """A tiny archive of a family, settings, and the updates and gradients of one process."""

    archive: str
    overrides: tuple[str, ...]
    expected: Outcome
    gradients: Path


@pytest.fixture(scope="module", params=["qwen3", "qwen2"])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    """Heads of their own; norms of queries and keys in Qwen3, biases in Qwen2."""
    folder = tmp_path_factory.mktemp(request.param)
    # Qwen2's single group of keys and values could not be split in two.
    # Both tensor-parallel ranks have tokens, the last one padding too.
    hf = tiny.write_hf_folder(folder / "hf", request.param, num_key_value_heads=2, vocab_size=248)
    archive = str(folder / "model.nemo")
    convert_hf_to_nemo(hf, archive)
    prompts = training_runs.write_prompts(folder / "prompts.jsonl")
    overrides = (f"model.data.train_ds.file_path={prompts}", "model.opdlm.rollout.threshold=0.06")
    (folder / "gradients").mkdir()
    expected = runs.train(archive, Layout(), 2, overrides, str(folder / "gradients"))
    return Family(archive, overrides, expected, folder / "gradients")


@pytest.mark.parametrize("layout", [Layout(tensor=2, pipeline=2), Layout(tensor=2, sequence=True, context=2)], ids=str)
def test_other_families_have_the_gradients_of_one_process(
    family: Family, layout: Layout, four_ranks: Ranks, tmp_path: Path
) -> None:
    for outcome in four_ranks.run(runs.train, family.archive, layout, 2, family.overrides, str(tmp_path)):
        assert_same_rollouts(outcome, family.expected)
        assert_same_losses(outcome, family.expected, 1e-5)
    assert_same_gradients(family.archive, tmp_path, family.gradients, 2)


@pytest.mark.parametrize("name", ["TP2xPP2", "CP2xDP2"])
def test_the_gap_to_the_rollout_is_that_of_one_process(
    name: str, one_process: tuple[Outcome, Path], glassllm: str, four_ranks: Ranks
) -> None:
    """Of a rollout that claims other probabilities than it had: gaps that are no rounding."""
    replayed = []
    for number, rollout in enumerate(one_process[0].rollouts):
        factor = torch.rand(rollout["confidence"].shape, generator=torch.Generator().manual_seed(number))
        replayed.append({**rollout, "confidence": rollout["confidence"] * factor.clamp(min=0.01)})
    expected = runs.train(glassllm, Layout(), 1, replayed=replayed).metrics[0]
    assert 0.5 < expected["rollout/logprob_gap"] < expected["rollout/logprob_gap_max"]
    for outcome in four_ranks.run(runs.train, glassllm, LAYOUTS[name][1], 1, (), None, replayed):
        for key in ("rollout/logprob_gap", "rollout/logprob_gap_max"):
            assert outcome.metrics[0][key] == pytest.approx(expected[key], rel=1e-4), key


gradients_of_one_process = functools.cache(runs.read_gradients)


def assert_same_gradients(archive: str, found: Path, expected: Path, num_updates: int) -> None:
    for update in range(num_updates):
        ours = runs.read_gradients(archive, found / str(update))
        theirs = gradients_of_one_process(archive, expected / str(update))
        assert ours.keys() == theirs.keys() and len(ours) > 15
        for tensor, value in theirs.items():
            assert value.abs().max() > 0, tensor
            assert (ours[tensor] - value).abs().max() <= 1e-4 * value.abs().max(), (update, tensor)


#: Name -> layout of two or four ranks, settings: what the other modes of the method ask of a layout.
VARIANTS = {
    "top-k": (2, Layout(tensor=2), ("model.opdlm.divergence_top_k=8",)),
    "sampling filters": (2, Layout(tensor=2), ("model.opdlm.rollout.top_k=20", "model.opdlm.rollout.top_p=0.8")),
    "teacher's responses": (4, Layout(tensor=2, pipeline=2), ("+experiment=off_policy",)),
    "nll": (2, Layout(pipeline=2), ("+experiment=sft_baseline",)),
    "fewer micro-batches than stages": (2, Layout(pipeline=2, virtual=2), ("model.micro_batch_size=8",)),
    "several states, token mean": (
        2,
        Layout(context=2),
        ("model.opdlm.states_per_rollout=2", "model.opdlm.normalization=token"),
    ),
    "AR loss": (
        4,
        Layout(tensor=2, sequence=True, context=2),
        ("model.opdlm.ar_loss_weight=0.5", "model.opdlm.pack_to_tokens=400"),
    ),
    "more ranks than micro-batches": (4, Layout(context=2), ("model.global_batch_size=2", "model.micro_batch_size=1")),
    "overlapped gradients": (2, Layout(), ("model.optim.overlap_grad_sync=true",)),
    "overlapped gradients, some ranks with nothing to learn": (
        4,
        Layout(context=2),
        ("model.optim.overlap_grad_sync=true", "model.global_batch_size=2", "model.micro_batch_size=1"),
    ),
    "overlapped gradients, fewer micro-batches than stages": (
        2,
        Layout(pipeline=2, virtual=2),
        ("model.optim.overlap_grad_sync=true", "model.micro_batch_size=8"),
    ),
    "recomputation": (
        4,
        Layout(tensor=2, sequence=True, context=2),
        (
            "model.activations_checkpoint_granularity=full",
            "model.activations_checkpoint_method=uniform",
            "model.activations_checkpoint_num_layers=1",
        ),
    ),
}


@pytest.fixture(scope="module")
def larger_teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An archive with the vocabulary of glassllm and another shape in everything else."""
    folder = tmp_path_factory.mktemp("teacher")
    shape = {"hidden_size": 96, "intermediate_size": 200, "num_hidden_layers": 8, "num_attention_heads": 6}
    hf = tiny.write_hf_folder(folder / "hf", "qwen2", vocab_size=1025, num_key_value_heads=2, **shape)
    convert_hf_to_nemo(hf, folder / "teacher.nemo")
    return f"model.kd_teacher_restore_from_path={folder / 'teacher.nemo'}"


@pytest.fixture(scope="module")
def passages(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """The default passages in two parts, of which the second is the response."""
    texts = [json.loads(line)["prompt"] for line in runs.PROMPTS.read_text(encoding="utf-8").splitlines()]
    path = tmp_path_factory.mktemp("passages") / "passages.jsonl"
    rows = [{"prompt": text[:20], "response": text[20 : 30 + 3 * (number % 20)]} for number, text in enumerate(texts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return (
        f"model.data.train_ds.file_path={path}",
        "model.data.train_ds.truncate_prompt_to=null",
        "+experiment=sft_dataset",
    )


@pytest.mark.parametrize("name", [*VARIANTS, "larger teacher", "data set's responses"])
def test_other_modes_do_not_depend_on_the_layout_either(
    name: str, glassllm: str, request: pytest.FixtureRequest
) -> None:
    if name == "larger teacher":
        num_ranks, layout = 4, Layout(tensor=2, pipeline=2)
        overrides: tuple[str, ...] = (request.getfixturevalue("larger_teacher"),)
    elif name == "data set's responses":
        num_ranks, layout, overrides = 4, Layout(tensor=2), request.getfixturevalue("passages")
    else:
        num_ranks, layout, overrides = VARIANTS[name]
    ranks: Ranks = request.getfixturevalue({2: "two_ranks", 4: "four_ranks"}[num_ranks])
    expected = runs.train(glassllm, Layout(), 2, overrides)
    for outcome in ranks.run(runs.train, glassllm, layout, 2, overrides):
        assert_same_rollouts(outcome, expected)
        assert_same_losses(outcome, expected, 1e-5)


def assert_same_rollouts(found: Outcome, expected: Outcome) -> None:
    assert len(found.rollouts) == len(expected.rollouts) >= 1
    for ours, theirs in zip(found.rollouts, expected.rollouts, strict=True):
        for key, value in theirs.items():
            if key == "confidence":
                torch.testing.assert_close(ours[key], value, atol=1e-4, rtol=0)
            else:
                assert torch.equal(torch.as_tensor(ours[key]), torch.as_tensor(value)), key


def assert_same_losses(found: Outcome, expected: Outcome, tolerance: float) -> None:
    for ours, theirs in zip(found.metrics, expected.metrics, strict=True):
        for key in ("train/loss", "train/kl", "train/grad_norm", "train/agreement", "trained_tokens"):
            assert ours[key] == pytest.approx(theirs[key], rel=tolerance), key
        assert ours.get("rollout/logprob_gap_max", 0.0) < 1e-4, "the training forward is not that of the rollout"
