"""The collectives of two tensor-parallel ranks answer as a whole vocabulary does, gradients included."""

import warnings

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_opdlm.diffusion.proposal import SamplingParams, propose
from nemo_opdlm.distillation.divergence import (
    DivergenceKind,
    DivergenceSpec,
    FullTarget,
    Tail,
    Target,
    TokenTarget,
    token_divergence,
    top_k_target,
)
from nemo_opdlm.megatron.vocab_parallel import TensorParallelVocab
from nemo_opdlm.testing.ranks import Ranks
from nemo_opdlm.vocab import LocalVocab, VocabReducer, local_columns

T, V, RANKS = 6, 40, 2
WIDTH = V // RANKS
#: Divergence, teacher support (25 is more than a rank's columns), tail.
FORMULAS = [(DivergenceKind.nll, 0, Tail.tail_bucket)] + [
    (kind, top_k, tail)
    for kind in DivergenceKind
    if kind is not DivergenceKind.nll
    for top_k, tail in [(0, Tail.tail_bucket), *((k, tail) for k in (5, 25) for tail in Tail)]
]


def random_logits(seed: int) -> Tensor:
    logits = 2 * torch.randn(T, V, generator=torch.Generator().manual_seed(seed))
    logits[:, -3:] = -torch.inf
    return logits


def check_reductions(vocab: TensorParallelVocab, mine: slice) -> None:
    whole = LocalVocab()
    x, ids = random_logits(0), torch.tensor([[0, 39, 19, 20]]).expand(T, -1)
    assert torch.equal(vocab.max(x[:, mine]), whole.max(x))
    numbers = torch.arange(T * V).reshape(V, T).T * 2**40
    assert torch.equal(vocab.max(numbers[:, mine]), whole.max(numbers))
    finite = x.clamp(min=-9).T.contiguous().T  # also columns first, whose sums are not contiguous
    torch.testing.assert_close(vocab.sum(finite[:, mine]), whole.sum(finite))
    batch = finite.expand(3, T, V).transpose(0, 1)
    torch.testing.assert_close(vocab.sum(batch[..., mine]), whole.sum(batch))
    x[:, 0], x[:, 20] = torch.nan, torch.inf  # the columns that a rank reads in place of foreign ones
    torch.testing.assert_close(vocab.take(x[:, mine], ids), whole.take(x, ids), equal_nan=True)
    assert torch.equal(vocab.take(x[:, mine], ids[:, 1:3]), whole.take(x, ids[:, 1:3]))
    lists = finite[:, ::10]
    assert torch.equal(vocab.gather(lists[:, vocab.shard * 2 : vocab.shard * 2 + 2]), lists)


def check_gradients(vocab: TensorParallelVocab, mine: slice) -> None:
    x = random_logits(1)[:, mine].clone().requires_grad_()
    weight = torch.arange(1.0, T + 1)
    ids = torch.tensor([[3, 25]]).expand(T, -1)
    (vocab.take(x, ids) * weight[:, None]).sum().backward()
    expected = torch.zeros(T, V).scatter(1, ids, weight[:, None].expand(-1, 2))[:, mine]
    assert torch.equal(x.grad, expected)
    y = torch.ones(T, requires_grad=True)
    other = torch.ones(T, requires_grad=True)
    # The incoming gradient is expanded, hence not contiguous, and goes to another branch as well.
    (vocab.spread(y) + other).sum().backward()
    assert torch.equal(y.grad, torch.full((T,), float(RANKS))) and torch.equal(other.grad, torch.ones(T))


def check_formulas(vocab: TensorParallelVocab, mine: slice) -> None:
    """Every divergence, support and tail: this rank's values and gradients in fp64."""
    whole, student, teacher = LocalVocab(), random_logits(2).double(), random_logits(3).double()
    for kind, top_k, tail in FORMULAS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # combinations whose optimum is not the teacher
            spec = DivergenceSpec(kind, reverse_weight=0.3, jsd_alpha=0.2, top_k=top_k, tail=tail)
        values, grad = evaluate(student[:, mine], teacher[:, mine], spec, vocab)
        expected, expected_grad = evaluate(student, teacher, spec, whole)
        torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(grad, expected_grad[:, mine], rtol=1e-12, atol=1e-12)


def evaluate(student: Tensor, teacher: Tensor, spec: DivergenceSpec, vocab: VocabReducer) -> tuple[Tensor, Tensor]:
    target: Target = FullTarget(teacher)
    if spec.kind is DivergenceKind.nll:
        target = TokenTarget(torch.arange(T) * 5)
    elif spec.top_k:
        target = top_k_target(teacher, spec.top_k, vocab)
    logits = student.clone().requires_grad_()
    values = token_divergence(logits, target, spec, vocab)
    (grad,) = torch.autograd.grad((values * torch.arange(1, T + 1)).sum(), logits)
    return values.detach(), grad


def check_proposals(vocab: TensorParallelVocab, mine: slice) -> None:
    whole, student = LocalVocab(), random_logits(2)
    forbidden, uniform = torch.zeros(V - 3, dtype=torch.bool), torch.linspace(0, 0.99, T)
    forbidden[:5] = True
    for params in (SamplingParams(), SamplingParams(0.0), SamplingParams(0.7, 25, 0.9)):
        proposal = propose(student[:, mine], uniform, params, local_columns(forbidden, WIDTH, vocab), vocab)
        expected_proposal = propose(student, uniform, params, local_columns(forbidden, V, whole), whole)
        torch.testing.assert_close(vars(proposal), vars(expected_proposal))


def check_everything() -> None:
    vocab = TensorParallelVocab(dist.group.WORLD, WIDTH)
    assert (vocab.shard, vocab.start) == (dist.get_rank(), dist.get_rank() * WIDTH)
    for check in (check_reductions, check_gradients, check_formulas, check_proposals):
        check(vocab, slice(vocab.start, vocab.start + WIDTH))


def test_two_ranks_equal_one(two_ranks: Ranks) -> None:
    two_ranks.run(check_everything)
