"""The loss and its gradient are those of slow, obvious code: transformers in fp64, masks from loops, autograd."""

from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from nemo_opdlm.convert import families
from nemo_opdlm.convert.families import OUTPUT_LAYER, WORD_EMBEDDINGS
from nemo_opdlm.convert.hugging_face import HfImport, hf_to_megatron
from nemo_opdlm.diffusion.layout import row_layout
from nemo_opdlm.diffusion.masks import AttentionRule
from nemo_opdlm.diffusion.proposal import SamplingParams
from nemo_opdlm.diffusion.remasking import RemaskingParams, RemaskingStrategy
from nemo_opdlm.diffusion.requests import Requests
from nemo_opdlm.diffusion.settings import RolloutSettings
from nemo_opdlm.diffusion.state_selection import DenoisingState, one_state_per_block
from nemo_opdlm.diffusion.trajectory import Trajectory
from nemo_opdlm.distillation.divergence import DivergenceKind, DivergenceSpec, Tail
from nemo_opdlm.distillation.loss import Normalization
from nemo_opdlm.distillation.targets import TargetIndex
from nemo_opdlm.megatron.forward import RowSplit, forward_backward
from nemo_opdlm.megatron.head import LMHead
from nemo_opdlm.megatron.optimizer import StudentOptimizer, wrap
from nemo_opdlm.megatron.parallel import ParallelContext
from nemo_opdlm.megatron.rollout import RolloutEngine
from nemo_opdlm.megatron.step import distillation_loss, micro_batches
from nemo_opdlm.megatron.student import ModelOptions
from nemo_opdlm.megatron.teacher import Teacher
from nemo_opdlm.testing import tiny

BLOCK_SIZE = 4
NUM_STATES = 2
ADAM = tiny.optimizer_settings(lr=1e-3, min_lr=1e-4)
Gradients = dict[str, Tensor]


class ThreeRowsAtATime(LMHead):
    """A head that cuts even tiny batches into many chunks."""

    def chunk_rows(self, spec: DivergenceSpec) -> int:
        return 3


@dataclass(frozen=True)
class Problem:
    """A student, its teacher and a rollout batch; both models also as transformers has them, in fp64."""

    student: HfImport
    reference_student: PreTrainedModel
    reference_teacher: PreTrainedModel
    teacher: Teacher
    trajectory: Trajectory
    states: DenoisingState
    parallel: ParallelContext


@pytest.fixture(scope="module", params=["qwen3-tied-wide-heads", "qwen2"])
def problem(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, parallel: ParallelContext
) -> Problem:
    """Random student and teacher, and real rollouts of every remainder that end at different lengths."""

    def folder(seed: int) -> Path:
        return tiny.write_hf_folder(tmp_path_factory.mktemp("hf"), request.param, seed)

    def reference(path: Path) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64, attn_implementation="eager").eval()

    student_folder, teacher_folder = folder(0), folder(1)
    student, teacher_import = hf_to_megatron(student_folder), hf_to_megatron(teacher_folder)
    teacher = Teacher(teacher_import.architecture, parallel, ModelOptions(), micro_batch_size=2)
    tiny.fill(teacher.network, teacher_import)
    trajectory = rollouts(student, parallel)
    states = one_state_per_block(trajectory, tiny.MASK_TOKEN_ID, num_states=NUM_STATES, seed=0, step=1)
    return Problem(student, reference(student_folder), reference(teacher_folder), teacher, trajectory, states, parallel)


def rollouts(student: HfImport, parallel: ParallelContext) -> Trajectory:
    prompt_len = torch.tensor([1, 4, 6, 7, 9])
    prompt_ids = torch.randint(4, tiny.NUM_TOKENS, (5, 9), generator=torch.Generator().manual_seed(0))
    settings = RolloutSettings(
        block_size=BLOCK_SIZE,
        denoising_steps=BLOCK_SIZE,
        remasking=RemaskingParams(RemaskingStrategy.LOW_CONFIDENCE_DYNAMIC, threshold=0.06),
        mask_token_id=tiny.MASK_TOKEN_ID,
        end_token_ids=(tiny.END_TOKEN_ID,),
        seed=0,
        step=1,
    )
    network = tiny.load_import(student, parallel, AttentionRule.BLOCK_DIFFUSION)
    forbidden = torch.arange(student.architecture.vocab_size) >= tiny.NUM_TOKENS
    forbidden[tiny.PAD_TOKEN_ID] = True  # transformers gives the padding token's embedding no gradient
    limits = torch.tensor([3, 9, 12, 2, 7])
    requests = Requests(prompt_ids, prompt_len, limits, torch.arange(5))
    return RolloutEngine(network, SamplingParams(), forbidden, 5).generate(requests, settings)


# -- the slow way --


def two_stream_row(problem: Problem, row: int, number: int) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """Ids, positions, mask and supervised columns of ``[prompt | clean | one state copy]``, token by token."""
    trajectory, states = problem.trajectory, problem.states
    prompt_len, end = int(trajectory.prompt_len[row]), int(trajectory.row_end[row])
    first = prompt_len - prompt_len % BLOCK_SIZE
    tokens = [(False, i, int(trajectory.token_ids[row, i])) for i in range(end)]
    tokens += [(True, i, int(states.state_ids[row, number, i])) for i in range(first, end)]

    def sees(query: tuple[bool, int, int], key: tuple[bool, int, int]) -> bool:
        query_block, key_block = query[1] // BLOCK_SIZE, key[1] // BLOCK_SIZE
        if not query[0]:
            return not key[0] and key_block <= query_block
        return key_block == query_block if key[0] else key_block < query_block

    mask = torch.tensor([[0.0 if sees(q, k) else -torch.inf for k in tokens] for q in tokens], dtype=torch.float64)
    supervised = [
        column
        for column, (is_state, i, token) in enumerate(tokens)
        if is_state and token == tiny.MASK_TOKEN_ID and prompt_len <= i < prompt_len + int(trajectory.response_len[row])
    ]
    ids, positions = (torch.tensor([token[part] for token in tokens])[None] for part in (2, 1))
    return ids, positions, mask[None, None], supervised


def teacher_log_probs(problem: Problem, row: int) -> Tensor:
    """Plain causal log-probabilities ``[P + R, V]`` of the unpadded text; row i - 1 is about token i."""
    length = int(problem.trajectory.prompt_len[row] + problem.trajectory.response_len[row])
    with torch.no_grad():
        return problem.reference_teacher(problem.trajectory.token_ids[row : row + 1, :length]).logits[0].log_softmax(-1)


def causal_divergence(problem: Problem, row: int, log_phi: Tensor) -> Tensor:
    """Mean forward KL of the student as a causal model over a response."""
    prompt_len, length = int(problem.trajectory.prompt_len[row]), log_phi.shape[0]
    logits = problem.reference_student(problem.trajectory.token_ids[row : row + 1, :length]).logits[0]
    judges = slice(prompt_len - 1, length - 1)
    return (log_phi[judges].exp() * (log_phi[judges] - logits[judges].log_softmax(-1))).sum(-1).mean()


def oracle(problem: Problem, normalization: Normalization, ar_loss_weight: float = 0.0) -> tuple[float, Gradients]:
    """Forward KL of every supervised position, its mean, and autograd's gradient under Megatron's names."""
    model = problem.reference_student
    model.zero_grad()
    per_copy: list[Tensor] = []
    causal: list[Tensor] = []
    for row in range(len(problem.trajectory)):
        log_phi = teacher_log_probs(problem, row)
        causal += NUM_STATES * [causal_divergence(problem, row, log_phi)]
        for number in range(NUM_STATES):
            ids, positions, mask, supervised = two_stream_row(problem, row, number)
            logits = model(ids, position_ids=positions, attention_mask=mask).logits[0]
            phi = log_phi[[int(positions[0, column]) - 1 for column in supervised]]
            per_copy.append((phi.exp() * (phi - logits[supervised].log_softmax(-1))).sum(-1))
    if normalization is Normalization.token:
        num_tokens = torch.tensor([divergence.numel() for divergence in per_copy])
        loss = torch.cat(per_copy).mean() + ar_loss_weight * (torch.stack(causal) * num_tokens).sum() / num_tokens.sum()
    else:
        loss = torch.stack([divergence.mean() for divergence in per_copy]).mean()
        loss = loss + ar_loss_weight * torch.stack(causal).mean()
    loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    arch = problem.student.architecture
    gradients = dict(families.to_megatron(lambda name: found[name], problem.student.origin.family, arch))
    # What pads the vocabulary has none.
    padding = (0, 0, 0, arch.padded_vocab_size(1) - arch.vocab_size)
    assert padding[-1] > 0
    for name in {WORD_EMBEDDINGS, OUTPUT_LAYER} & gradients.keys():
        gradients[name] = F.pad(gradients[name], padding)
    return float(loss), gradients


# -- our way --


@dataclass(frozen=True)
class Outcome:
    """Loss and gradients of one update, and the optimizer that would take it."""

    loss: float
    gradients: Gradients
    optimizer: StudentOptimizer


def ours(
    problem: Problem,
    normalization: Normalization = Normalization.sequence,
    micro_batch_size: int = 2,
    head_type: type[LMHead] = LMHead,
    spec: DivergenceSpec = DivergenceSpec(),  # noqa: B008 (frozen)
    batch: tuple[Trajectory, DenoisingState] | None = None,
    pack_to_tokens: int | None = None,
    ar_loss_weight: float = 0.0,
    fills_packs: bool = False,
    **options: Any,
) -> Outcome:
    """The update as training makes it: Megatron's DDP, schedule and gradient buffers."""
    trajectory, states = batch or (problem.trajectory, problem.states)
    model = tiny.load_import(problem.student, problem.parallel, AttentionRule.BLOCK_DIFFUSION, ModelOptions(**options))
    network = wrap(model, ADAM)
    optimizer = StudentOptimizer(network, ADAM)
    teacher = copy(problem.teacher)
    teacher.pack_to_tokens = pack_to_tokens
    targets = teacher.targets(trajectory, spec)
    rows = torch.arange(len(trajectory))
    split = RowSplit.over_context(model)
    if fills_packs:
        assert pack_to_tokens is not None
        split = split.filled_up_to(pack_to_tokens)
    parts = micro_batches(
        trajectory,
        states,
        targets,
        rows,
        normalization,
        micro_batch_size,
        split,
        pack_to_tokens=pack_to_tokens,
        ar_loss_weight=ar_loss_weight,
    )
    assert all(part.token_ids.shape[1] % split.multiple_of == 0 for part in parts)
    assert not fills_packs or {part.token_ids.shape for part in parts} == {(1, split.num_columns)}
    optimizer.zero_grad()
    sums = forward_backward(network, parts, distillation_loss(head_type(model), spec))
    loss = sum(float(part["loss_sum"]) for part in sums) / sum(float(part["count"]) for part in sums)
    gradients = {name: parameter.main_grad.clone() for name, parameter in model[0].named_parameters()}
    return Outcome(loss, gradients, optimizer)


def assert_same(left: Gradients, right: Gradients, tolerance: float) -> None:
    assert left.keys() == right.keys()
    for name, gradient in left.items():
        assert gradient.abs().max() > 0, name
        difference = (gradient - right[name]).abs().max() / gradient.abs().max()
        assert difference <= tolerance, (name, float(difference))


@pytest.mark.parametrize("normalization", list(Normalization))
@pytest.mark.parametrize("head_type", [LMHead, ThreeRowsAtATime])
def test_loss_and_gradients_are_those_of_autograd_on_transformers_in_fp64(
    problem: Problem, normalization: Normalization, head_type: type[LMHead]
) -> None:
    loss, gradients = oracle(problem, normalization)
    update = ours(problem, normalization, head_type=head_type)
    assert update.loss == pytest.approx(loss, rel=1e-5)
    assert_same({name: gradient.float() for name, gradient in gradients.items()}, update.gradients, 1e-4)


@pytest.mark.parametrize("normalization", list(Normalization))
@pytest.mark.parametrize("pack_to_tokens", [None, 150])
def test_the_ar_loss_is_that_of_a_causal_pass_over_the_same_texts(
    problem: Problem, normalization: Normalization, pack_to_tokens: int | None
) -> None:
    loss, gradients = oracle(problem, normalization, ar_loss_weight=0.7)
    update = ours(problem, normalization, pack_to_tokens=pack_to_tokens, ar_loss_weight=0.7, token_multiple=16)
    assert update.loss == pytest.approx(loss, rel=1e-5)
    assert_same({name: gradient.float() for name, gradient in gradients.items()}, update.gradients, 1e-4)


def test_teacher_targets_are_plain_causal_log_probs_shifted_by_one(problem: Problem) -> None:
    trajectory = problem.trajectory
    hidden = problem.teacher.response_hidden(trajectory)
    log_probs = problem.teacher.head.logits(hidden).log_softmax(-1)
    index = TargetIndex(trajectory.prompt_len, trajectory.response_len)
    for row in range(len(trajectory)):
        start, length = int(trajectory.prompt_len[row]), int(trajectory.response_len[row])
        positions = torch.arange(start, start + length)
        found = log_probs[index.rows(torch.full_like(positions, row), positions)]
        expected = teacher_log_probs(problem, row)[positions - 1].float()
        torch.testing.assert_close(found[:, : expected.shape[1]], expected, atol=1e-5, rtol=0)
        assert (found[:, expected.shape[1] :] == -torch.inf).all()


@pytest.mark.parametrize("normalization", list(Normalization))
def test_the_loss_does_not_depend_on_the_cut_into_micro_batches(problem: Problem, normalization: Normalization) -> None:
    one_by_one = ours(problem, normalization, micro_batch_size=1)
    for micro_batch_size in (2, 3, 5):
        update = ours(problem, normalization, micro_batch_size)
        assert update.loss == pytest.approx(one_by_one.loss, rel=1e-6)
        assert_same(one_by_one.gradients, update.gradients, 1e-5)


@pytest.mark.parametrize("token_multiple", [16, 32, 128])
def test_tokens_that_fill_up_fp8s_tiles_never_reach_the_loss(problem: Problem, token_multiple: int) -> None:
    plain, padded = ours(problem), ours(problem, token_multiple=token_multiple)
    assert padded.loss == pytest.approx(plain.loss, rel=1e-6)
    assert_same(plain.gradients, padded.gradients, 1e-5)


def test_packs_that_user_buffers_want_filled_have_the_same_loss(problem: Problem) -> None:
    plain = ours(problem, pack_to_tokens=150)
    filled = ours(problem, pack_to_tokens=150, token_multiple=16, fills_packs=True)
    assert filled.loss == pytest.approx(plain.loss, rel=1e-6)
    assert_same(plain.gradients, filled.gradients, 1e-5)


def modes() -> Iterator[DivergenceSpec]:
    yield DivergenceSpec()
    yield from (DivergenceSpec(top_k=3, tail=tail) for tail in Tail)
    yield DivergenceSpec(DivergenceKind.nll)


@pytest.mark.parametrize("spec", modes(), ids=lambda spec: f"{spec.kind.value}-{spec.top_k}-{spec.tail.value}")
@pytest.mark.parametrize("normalization", list(Normalization))
def test_packed_rows_have_the_loss_and_gradients_of_rows_apart(
    problem: Problem, spec: DivergenceSpec, normalization: Normalization
) -> None:
    longest = int(row_layout(problem.trajectory, problem.states).row_len.max())
    apart = ours(problem, normalization, micro_batch_size=1, spec=spec)
    for pack_to_tokens in (longest, 2 * longest, 1000):
        packed = ours(problem, normalization, spec=spec, pack_to_tokens=pack_to_tokens)
        assert packed.loss == pytest.approx(apart.loss, rel=1e-5)
        assert_same(apart.gradients, packed.gradients, 1e-5)


def test_packed_teacher_passes_give_the_hidden_states_of_passes_apart(problem: Problem) -> None:
    trajectory = problem.trajectory
    longest = int((trajectory.prompt_len + trajectory.response_len).max())
    for rollouts in (slice(None), slice(1, None, 2)):
        apart = problem.teacher.response_hidden(trajectory, rollouts)
        for pack_to_tokens in (1, longest, 2 * longest, 1000):
            teacher = copy(problem.teacher)
            teacher.pack_to_tokens = pack_to_tokens
            torch.testing.assert_close(teacher.response_hidden(trajectory, rollouts), apart)


def test_a_pack_without_room_for_the_longest_row_is_refused(problem: Problem) -> None:
    longest = int(row_layout(problem.trajectory, problem.states).row_len.max())
    with pytest.raises(
        ValueError, match=rf"pack_to_tokens={longest - 1} cannot .* {longest} tokens .* least {longest},"
    ):
        ours(problem, pack_to_tokens=longest - 1)


@pytest.mark.parametrize("normalization", list(Normalization))
def test_copies_in_one_row_are_as_many_rows(problem: Problem, normalization: Normalization) -> None:
    states = problem.states
    rows = torch.arange(len(states)).repeat_interleave(NUM_STATES)
    separate = DenoisingState(
        states.state_ids.flatten(0, 1)[:, None], states.loss_mask.flatten(0, 1)[:, None], torch.ones_like(rows)
    )
    shared, apart = (
        ours(problem, normalization),
        ours(problem, normalization, batch=(problem.trajectory.index(rows), separate)),
    )
    assert shared.loss == pytest.approx(apart.loss, rel=1e-6)
    assert_same(shared.gradients, apart.gradients, 1e-5)


RECOMPUTATION = {
    "full-uniform": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    "full-block": {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 1},
    "selective": {"recompute_granularity": "selective"},
}


@pytest.mark.parametrize("how", RECOMPUTATION)
@pytest.mark.parametrize("autocast_dtype", [None, torch.bfloat16])
def test_recomputing_activations_changes_nothing(
    problem: Problem, how: str, autocast_dtype: torch.dtype | None
) -> None:
    stored = ours(problem, autocast_dtype=autocast_dtype)
    recomputed = ours(problem, autocast_dtype=autocast_dtype, transformer_config=RECOMPUTATION[how])
    assert recomputed.loss == stored.loss
    if how != "selective":
        assert all(torch.equal(gradient, recomputed.gradients[name]) for name, gradient in stored.gradients.items())
    # Selective recomputation hands gradients on in another memory layout, so sums are rounded in another order.
    assert_same(stored.gradients, recomputed.gradients, 1e-6 if autocast_dtype is None else 1e-2)


@pytest.mark.parametrize("options", [{"params_dtype": torch.bfloat16}, {"autocast_dtype": torch.bfloat16}])
def test_bf16_lies_near_fp32_and_updates_fp32_weights(problem: Problem, options: dict[str, torch.dtype]) -> None:
    exact, update = ours(problem), ours(problem, **options)
    assert update.loss == pytest.approx(exact.loss, rel=0.02)
    for name, gradient in exact.gradients.items():
        assert update.gradients[name].dtype == torch.float32
        cosine = torch.cosine_similarity(gradient.flatten(), update.gradients[name].flatten(), dim=0)
        assert cosine > 0.99, (name, float(cosine))
    network = update.optimizer.network.model
    before = {name: parameter.detach().clone().float() for name, parameter in network.named_parameters()}
    assert update.optimizer.step() == pytest.approx(exact.optimizer.step(), rel=0.05)
    for name, parameter in network.named_parameters():
        assert parameter.dtype == options.get("params_dtype", torch.float32)
        # Megatron hangs the fp32 master weights of bf16 parameters on them.
        master = getattr(parameter, "main_param", parameter)
        assert master.dtype == torch.float32 and torch.equal(master.to(parameter.dtype), parameter)
        assert not torch.equal(master, before[name]), name


def divergences() -> Iterator[DivergenceSpec]:
    yield DivergenceSpec(top_k=3)
    yield DivergenceSpec(DivergenceKind.jsd)
    yield DivergenceSpec(DivergenceKind.reverse_kl)
    yield DivergenceSpec(DivergenceKind.mixed, reverse_weight=0.3, top_k=5)
    yield DivergenceSpec(DivergenceKind.nll)


@pytest.mark.parametrize("spec", divergences(), ids=lambda spec: f"{spec.kind.value}-{spec.top_k}")
def test_a_head_in_chunks_gives_the_gradients_of_a_whole_one(problem: Problem, spec: DivergenceSpec) -> None:
    whole, chunked = ours(problem, spec=spec), ours(problem, spec=spec, head_type=ThreeRowsAtATime)
    assert chunked.loss == pytest.approx(whole.loss, rel=1e-6)
    assert_same(whole.gradients, chunked.gradients, 1e-5)
