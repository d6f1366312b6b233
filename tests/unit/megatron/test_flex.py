"""FlexAttention in tiles is attention with the dense mask: values, gradients, and one kernel for batches of about one length."""

import pytest
import torch
import torch._dynamo.testing
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor
from torch.nn.attention import flex_attention
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from nemo_opdlm.diffusion.layout import clean_rows, packed_clean_rows, two_stream_rows
from nemo_opdlm.diffusion.masks import PADDING_DOCUMENT, AttentionRule, TokenAttributes
from nemo_opdlm.diffusion.state_selection import random_mask
from nemo_opdlm.megatron import flex
from nemo_opdlm.megatron.attention import AttentionContext, BlockDiffusionAttention
from nemo_opdlm.megatron.flex import TILE, attend_in_tiles, block_mask, bucket
from nemo_opdlm.megatron.parallel import initialize
from nemo_opdlm.megatron.student import ModelOptions, transformer_config
from nemo_opdlm.testing import tiny
from nemo_opdlm.testing.trajectories import MASK_TOKEN_ID, random_trajectory

HEADS, GROUPS, DIM = 4, 2, 16

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
rules = pytest.mark.parametrize("rule", list(AttentionRule))
packings = pytest.mark.parametrize("is_packed", [True, False], ids=["packed", "padded"])


def tokens(rule: AttentionRule, is_packed: bool, seed: int = 0) -> TokenAttributes:
    """Rows as the student or the teacher gets them."""
    trajectory = random_trajectory(9, 4, seed=seed)
    if rule is AttentionRule.CAUSAL:
        return (packed_clean_rows if is_packed else clean_rows)(trajectory)[1]
    rows = two_stream_rows(trajectory, random_mask(trajectory, MASK_TOKEN_ID, num_states=2, seed=0, step=1))
    return (rows.packed() if is_packed else rows).attributes


def inputs(attributes: TokenAttributes) -> list[Tensor]:
    """Query, key and value ``[N, B, heads, d]``."""
    batch, length = attributes.position_ids.shape
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(length, batch, heads, DIM, generator=generator, requires_grad=True)
        for heads in (HEADS, GROUPS, GROUPS)
    ]


def attention(rule: AttentionRule, uses_flex: bool) -> BlockDiffusionAttention:
    return BlockDiffusionAttention(
        AttentionContext(rule, torch.ones(DIM // 2), uses_flex=uses_flex),
        config=transformer_config(tiny.architecture(), initialize(), ModelOptions()),
        layer_number=1,
        attn_mask_type=AttnMaskType.causal,
        attention_type="self",
    )


@pytest.fixture
def backward_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uncompiled, FlexAttention does have a backward pass on a CPU, and only refuses to be asked for it."""
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)


@rules
@packings
@pytest.mark.usefixtures("backward_on_cpu")
def test_tiles_give_the_values_and_gradients_of_the_dense_mask(rule: AttentionRule, is_packed: bool) -> None:
    attributes = tokens(rule, is_packed)
    is_token = attributes.document_ids.T != PADDING_DOCUMENT
    found = []
    for uses_flex in (True, False):
        module, leaves = attention(rule, uses_flex), inputs(attributes)
        out = module(*leaves, attributes.stack())[is_token]
        assert isinstance(module.context.plan(attributes.stack()).mask, BlockMask) == uses_flex
        weights = torch.linspace(-1, 1, out.numel()).view_as(out)
        found.append([out, *torch.autograd.grad((out * weights).sum(), leaves)])
    for tiles, expected in zip(*found, strict=True):
        torch.testing.assert_close(tiles, expected, atol=1e-5, rtol=1e-4)


@rules
@packings
@pytest.mark.parametrize("elements", [1, flex.CHUNK_ELEMENTS])
def test_the_block_mask_is_the_one_that_torch_makes_of_the_function(
    rule: AttentionRule, is_packed: bool, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flex, "CHUNK_ELEMENTS", elements)
    monkeypatch.setattr(flex, "TILE", 8)  # so that some tiles are full, and many empty
    attributes = tokens(rule, is_packed)
    found = block_mask(rule, attributes)
    batch, length = attributes.position_ids.shape[0], found.seq_lengths[0]
    expected = create_block_mask(found.mask_mod, batch, None, length, length, device="cpu", BLOCK_SIZE=8)
    for ours, theirs in (
        (found.kv_num_blocks, expected.kv_num_blocks),
        (found.full_kv_num_blocks, expected.full_kv_num_blocks),
        (found.q_num_blocks, expected.q_num_blocks),
        (found.to_dense(), expected.to_dense()),
    ):
        assert torch.equal(ours, theirs)  # type: ignore[arg-type]
    assert bool(found.full_kv_num_blocks.any()) and bool(found.kv_num_blocks.any())  # type: ignore[union-attr]


def test_rows_are_padded_to_few_lengths_by_little() -> None:
    lengths = range(1, 40_000)
    assert all(length <= bucket(length) <= max(TILE + length - 1, 1.25 * length) for length in lengths)
    assert all(bucket(length) % TILE == 0 and bucket(bucket(length)) == bucket(length) for length in lengths)
    assert len({bucket(length) for length in lengths if length > 4096}) <= 4 * 4


@pytest.mark.usefixtures("backward_on_cpu")
def test_batches_of_a_bucket_and_all_layers_share_one_compiled_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo's guards do not depend on the backend, which on a CPU must not be the compiler: it has no backward pass."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    compiled = torch.compile(flex_attention.flex_attention, dynamic=False, fullgraph=True, backend=counter)
    monkeypatch.setattr(flex, "flex_attention", compiled)
    lengths, buckets = set(), set()
    for seed in range(4):
        attributes = tokens(AttentionRule.BLOCK_DIFFUSION, is_packed=True, seed=seed)
        mask = block_mask(AttentionRule.BLOCK_DIFFUSION, attributes)
        lengths.add(attributes.position_ids.shape[1])
        buckets.add(mask.seq_lengths[0])
        for _ in range(2):
            attend_in_tiles(*(x.permute(1, 2, 0, 3) for x in inputs(attributes)), mask, None).sum().backward()
    assert counter.frame_count == len(buckets) < len(lengths)
