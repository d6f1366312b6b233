"""FlexAttention with the mask as a function gives what scaled dot product attention gives with the mask as a tensor."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from nemo_opdlm.diffusion.layout import BlockLayout
from nemo_opdlm.diffusion.masks import AttentionRule, dense, mask_mod

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")

BLOCK_DIFFUSION, CAUSAL = AttentionRule.BLOCK_DIFFUSION, AttentionRule.CAUSAL


def test_flex_attention_equals_dense_attention_for_one_rule_after_the_other() -> None:
    # In one process, in this order: a compiled FlexAttention must not keep the mask of the rule or batch before.
    q, k, v = torch.randn(3, 2, 2, 64, 8, generator=torch.Generator().manual_seed(0))
    for rule, prompts in ((CAUSAL, [3, 9]), (BLOCK_DIFFUSION, [3, 9]), (BLOCK_DIFFUSION, [6, 2]), (CAUSAL, [6, 2])):
        attributes = BlockLayout(torch.tensor(prompts), torch.tensor([6, 8]), torch.tensor([2, 1]), 4).attributes(64)
        function = mask_mod(rule, attributes, attributes)
        with torch.no_grad():
            block_mask = create_block_mask(function, 2, None, 64, 64, device="cpu", BLOCK_SIZE=16)
            actual = flex_attention(q, k, v, block_mask=block_mask)
        may_attend = dense(rule, attributes, attributes)
        expected = F.scaled_dot_product_attention(q, k, v, attn_mask=may_attend)
        sees_something = may_attend.any(-1).expand(-1, 2, -1)
        assert isinstance(actual, Tensor)
        torch.testing.assert_close(actual[sees_something], expected[sees_something])
