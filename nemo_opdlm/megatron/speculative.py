"""The Megatron network as self-speculative decoding asks it: causal tokens that judge, and masks behind them that draft."""

import torch
from torch import Tensor

from nemo_opdlm.diffusion.denoiser import Query
from nemo_opdlm.megatron.denoiser import Forward, MegatronDenoiser


class SpeculativeDenoiser(MegatronDenoiser):
    """Answers the queries ``[pending | drafts | masks]`` of `speculate`.

    Pending token and drafts are judged by the causal logits before them; a mask is read at its own place. The first mask is
    not read: the token before it proposes for the same position.
    """

    def prepare(self, query: Query) -> Forward:
        """A prefill as it is; else the logits of all tokens but the first mask answer, in the order of their positions."""
        if query.uniform is None:
            return super().prepare(query)
        is_mask, answers = self._is_mask(query), torch.arange(query.uniform.shape[1], device=query.slots.device)
        if self.fixed_shapes:
            num_causal = is_mask.to(torch.uint8).argmax(1, keepdim=True)
            return self._pack(query, self._packed_columns(query, answers + (answers >= num_causal)), None)
        asked = (query.position_ids >= 0) & ~(is_mask & (is_mask.cumsum(1) == 1))
        return self._pack(query, self._packed_places(query, asked), answers < asked.sum(1, keepdim=True))

    def _last_visible(self, query: Query) -> Tensor:
        """Everyone sees what stands before it; masks see each other, too."""
        is_mask = self._is_mask(query) & (query.position_ids >= 0)
        last_mask = query.position_ids.masked_fill(~is_mask, 0).amax(1, keepdim=True)
        return torch.where(is_mask, last_mask, query.position_ids)

    def _is_mask(self, query: Query) -> Tensor:
        """Which places of a query draft, bool ``[A, Q]``; a prefill has none, and the pending token may be any of a prompt."""
        is_mask = query.token_ids == self.mask_token_id
        is_mask[:, 0] = False
        return is_mask & (query.uniform is not None)
