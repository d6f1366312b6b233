"""On a GPU, compiled FlexAttention and attention in chunks give what one attention with a dense mask gives."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.utils import counters

from nemo_opdlm.diffusion.layout import BlockLayout
from nemo_opdlm.diffusion.masks import AttentionRule, TokenAttributes, dense
from nemo_opdlm.megatron import chunked_attention
from nemo_opdlm.megatron.chunked_attention import MaskChunks, attend_in_chunks
from nemo_opdlm.megatron.flex import attend_in_tiles, block_mask, cached_block_mask

HEADS, GROUPS, DIM = 4, 2, 64
RULE = AttentionRule.BLOCK_DIFFUSION
#: Of fp32 sums in another order, and of bf16 results.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
#: Prompt and response lengths of two rows, one and two state copies, and what the rows are padded to.
ROWS = {128: ([3, 17], [20, 9], [2, 1]), 200: ([40, 6], [33, 50], [1, 2]), 384: ([100, 1], [60, 81], [3, 2])}

dtypes = pytest.mark.parametrize("dtype", list(TOLERANCE))
lengths = pytest.mark.parametrize("length", list(ROWS))
block_sizes = pytest.mark.parametrize("block_size", [4, 8])


def attributes(length: int, block_size: int) -> TokenAttributes:
    lens = (torch.tensor(x, device="cuda") for x in ROWS[length])
    return BlockLayout(*lens, block_size).attributes(length)


def random_inputs(length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query, key, value, and the gradient that comes back."""
    generator = torch.Generator().manual_seed(length)
    shapes = [(2, heads, length, DIM) for heads in (HEADS, GROUPS, GROUPS, HEADS)]
    tensors = [torch.randn(shape, generator=generator).to("cuda", dtype) for shape in shapes]
    return tuple(x.requires_grad_() for x in tensors[:3]) + (tensors[3],)  # type: ignore[return-value]


def results(out: Tensor, inputs: tuple[Tensor, Tensor, Tensor], grad: Tensor) -> list[Tensor]:
    return [out, *torch.autograd.grad(out, inputs, grad)]


def by_dense_mask(inputs: tuple[Tensor, Tensor, Tensor], grad: Tensor, may_attend: Tensor) -> list[Tensor]:
    """In fp64, the exact answer."""
    exact = tuple(x.detach().double().requires_grad_() for x in inputs)
    out = F.scaled_dot_product_attention(*exact, attn_mask=may_attend, enable_gqa=True)
    return results(out, exact, grad.double())  # type: ignore[arg-type]


def assert_close(found: list[Tensor], expected: list[Tensor], dtype: torch.dtype) -> None:
    for name, ours, theirs in zip(("output", "query", "key", "value"), found, expected, strict=True):
        error = float((ours.double() - theirs).abs().max() / theirs.abs().max())
        assert error < TOLERANCE[dtype], (name, error)


@dtypes
@lengths
@block_sizes
def test_compiled_tiles_equal_attention_with_a_dense_mask(length: int, block_size: int, dtype: torch.dtype) -> None:
    tokens = attributes(length, block_size)
    *inputs, grad = random_inputs(length, dtype)
    out = attend_in_tiles(*inputs, block_mask(RULE, tokens), None)
    expected = by_dense_mask(tuple(inputs), grad, dense(RULE, tokens, tokens))  # type: ignore[arg-type]
    assert_close(results(out, tuple(inputs), grad), expected, dtype)  # type: ignore[arg-type]


@pytest.mark.parametrize("rule", list(AttentionRule))
def test_packed_documents_of_other_lengths_find_their_kernel_compiled(rule: AttentionRule) -> None:
    """And equal a dense mask: five documents of a few tokens more or less together, always in one bucket."""
    compiled_before = None
    for seed in range(4):
        lens = [torch.tensor(x, device="cuda") for x in ([20 + seed, 9, 30, 4, 13], [40, 31, 22, 57, 28], [1] * 5)]
        rows = BlockLayout(*lens, 4).attributes()
        is_token = (rows.document_ids >= 0) & ((rows.stream_ids == 0) | (rule is AttentionRule.BLOCK_DIFFUSION))
        tokens = rows.map(lambda x, kept=is_token: x[kept][None])  # type: ignore[misc]
        length = tokens.position_ids.shape[1]
        generator = torch.Generator().manual_seed(seed)
        shapes = [(1, heads, length, DIM) for heads in (HEADS, GROUPS, GROUPS, HEADS)]
        *inputs, grad = (torch.randn(shape, generator=generator).to("cuda") for shape in shapes)
        leaves = tuple(x.requires_grad_() for x in inputs)
        found = results(attend_in_tiles(*leaves, block_mask(rule, tokens), None), leaves, grad)  # type: ignore[arg-type]
        expected = by_dense_mask(leaves, grad, dense(rule, tokens, tokens))  # type: ignore[arg-type]
        assert_close(found, expected, torch.float32)
        num_compiled = counters["stats"]["unique_graphs"]
        assert compiled_before in (None, num_compiled)
        compiled_before = num_compiled


@dtypes
@pytest.mark.parametrize("num_queries", [1, 8, 100, 128])
def test_queries_to_a_cache_in_tiles_equal_those_with_a_dense_mask(num_queries: int, dtype: torch.dtype) -> None:
    """Three of four slots ask, each sees another length; one kernel for whatever they see and whoever asks."""
    generator, length, compiled_before = torch.Generator().manual_seed(0), 385, None
    shapes = [(4, heads, count, DIM) for heads, count in ((HEADS, num_queries), (GROUPS, length), (GROUPS, length))]
    query, key, value = (torch.randn(shape, generator=generator).to("cuda", dtype) for shape in shapes)
    for slots in ([0, 1, 3], [2]):
        rows = torch.tensor(slots, device="cuda")
        last = torch.randint(length - 1, (len(slots), num_queries), generator=generator).cuda()
        with torch.no_grad():
            found = attend_in_tiles(query, key, value, cached_block_mask(rows, last, 4, length), None)[rows]
        visible = (torch.arange(length, device="cuda") <= last[:, :, None])[:, None]
        exact = (x[rows].double() for x in (query, key, value))
        expected = F.scaled_dot_product_attention(*exact, attn_mask=visible, enable_gqa=True)
        assert float((found.double() - expected).abs().max() / expected.abs().max()) < TOLERANCE[dtype]
        num_compiled = counters["stats"]["unique_graphs"]
        assert compiled_before in (None, num_compiled)
        compiled_before = num_compiled


@dtypes
@lengths
@block_sizes
@pytest.mark.parametrize("num_chunks", [1, 3])
def test_attention_in_chunks_equals_attention_with_a_dense_mask(
    num_chunks: int, length: int, block_size: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunked_attention, "CHUNK_ELEMENTS", 2 * length * -(-length // num_chunks))
    tokens = attributes(length, block_size)
    *inputs, grad = random_inputs(length, dtype)
    chunks = MaskChunks(RULE, tokens, tokens)
    assert len(list(chunks)) == num_chunks
    out = attend_in_chunks(*inputs, chunks, None, None)
    expected = by_dense_mask(tuple(inputs), grad, dense(RULE, tokens, tokens))  # type: ignore[arg-type]
    assert_close(results(out, tuple(inputs), grad), expected, dtype)  # type: ignore[arg-type]
