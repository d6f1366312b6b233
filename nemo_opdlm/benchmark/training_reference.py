"""An update as it is published, built from Hugging Face modules: two-stream teacher, dense masks, full logits, padded rows.

A row at a time, padded to the longest of the batch. The teacher reads the same two-stream row as the student, with the clean
text in the place of the states. Both give fp32 logits at all positions, and log-probabilities at those of prompt and states
(the teacher's: of prompt and clean text, whose rows predict the tokens of the states). Activations are computed again in the
backward pass, layer by layer. In the published recipe a row has one state.
"""

import time
import warnings
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from nemo_opdlm.benchmark.timing import wait
from nemo_opdlm.benchmark.training_workload import TrainingBatch
from nemo_opdlm.diffusion.layout import TwoStreamRows, row_layout, two_stream_rows
from nemo_opdlm.diffusion.masks import CLEAN_STREAM, PADDING_DOCUMENT, AttentionRule, TokenAttributes, dense
from nemo_opdlm.megatron.cpu import without_redirect


@dataclass
class ReferenceUpdate:
    """The published update of a model whose teacher has the same weights.

    Attributes:
        model: student and teacher.
        optimizer: AdamW at a learning rate of 0: all its work, and the same weights for the next run.
        model_seconds: time inside the network's forward and backward passes.
    """

    model: PreTrainedModel
    optimizer: torch.optim.Optimizer
    model_seconds: float = field(default=0.0, init=False)

    @staticmethod
    def of(model: PreTrainedModel) -> "ReferenceUpdate":
        """With recomputation of every layer."""
        with warnings.catch_warnings():
            # Renamed in transformers 5; older versions know only this name.
            warnings.simplefilter("ignore", FutureWarning)
            model.train().gradient_checkpointing_enable({"use_reentrant": False})
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        return ReferenceUpdate(model, torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0))

    def run(self, batch: TrainingBatch) -> float:
        """A whole update; its loss."""
        with without_redirect():
            loss = self._gradients(batch)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
        return loss

    def gradients(self, batch: TrainingBatch) -> float:
        """The update without its last step."""
        with without_redirect():
            return self._gradients(batch)

    def _gradients(self, batch: TrainingBatch) -> float:
        self.optimizer.zero_grad(set_to_none=False)
        batch = batch.one_state_a_row()
        rows, clean_ids = two_stream_rows(batch.trajectory, batch.states), _clean_text(batch)
        loss = torch.zeros((), device=clean_ids.device)
        for number in range(len(batch.trajectory)):
            part = slice(number, number + 1)
            row = rows.index(part)
            prompt_len = int(batch.trajectory.prompt_len[number])
            loss += self._row(row, clean_ids[part], prompt_len, len(batch.trajectory))
        return float(loss)

    def _row(self, row: TwoStreamRows, clean_ids: Tensor, prompt_len: int, num_rows: int) -> Tensor:
        """Loss of a row, its mean divergence divided by the rows of the batch; gradients are added."""
        tokens = row.attributes
        targets = self._targets(row, clean_ids)
        logits = self._logits(row.token_ids, tokens, dense(AttentionRule.BLOCK_DIFFUSION, tokens, tokens))
        is_real = tokens.document_ids[0] != PADDING_DOCUMENT
        is_judged = is_real & ((tokens.stream_ids[0] != CLEAN_STREAM) | (tokens.position_ids[0] < prompt_len))
        log_probs = logits[is_judged].log_softmax(-1)[row.loss_mask[0][is_judged]]
        divergence = (targets.exp() * (targets - log_probs)).sum(-1)
        loss = divergence.mean() / num_rows
        with self._timed():
            loss.backward()
        return loss.detach()

    @torch.no_grad()
    def _targets(self, row: TwoStreamRows, clean_ids: Tensor) -> Tensor:
        """The teacher's log-probabilities ``[M, V]`` of the masked tokens, each read one position before it."""
        tokens = row.attributes
        logits = self._logits(clean_ids, tokens, _causal_in_both_streams(tokens))
        is_clean = (tokens.document_ids[0] != PADDING_DOCUMENT) & (tokens.stream_ids[0] == CLEAN_STREAM)
        # Prompt and clean text stand at the columns of their positions.
        return logits[is_clean].log_softmax(-1)[tokens.position_ids[0][row.loss_mask[0]] - 1]

    def _logits(self, token_ids: Tensor, tokens: TokenAttributes, may_attend: Tensor) -> Tensor:
        """fp32 logits of all columns ``[N, V]``."""
        with self._timed():
            output = self.model(
                input_ids=token_ids, attention_mask=may_attend, position_ids=tokens.position_ids, use_cache=False
            )
        return output.logits[0].float()  # type: ignore[no-any-return]

    def _timed(self) -> "_Timer":
        return _Timer(self)


@dataclass
class _Timer:
    """Adds its time to that of the network."""

    update: ReferenceUpdate
    start: float = 0.0

    def __enter__(self) -> None:
        wait(self.update.model.device)
        self.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        wait(self.update.model.device)
        self.update.model_seconds += time.perf_counter() - self.start


def _clean_text(batch: TrainingBatch) -> Tensor:
    """The rows of a batch with clean text in the place of its states, ``[B, N]``."""
    ids = batch.trajectory.token_ids
    return row_layout(batch.trajectory, batch.states).gather(ids, ids[:, None].expand_as(batch.states.state_ids))


def _causal_in_both_streams(tokens: TokenAttributes) -> Tensor:
    """The teacher's mask bool ``[1, 1, N, N]``: clean text in its order, states their clean past and own block in order."""
    q, k = tokens.map(lambda x: x[:, None, :, None]), tokens.map(lambda x: x[:, None, None, :])
    is_block_causal = dense(AttentionRule.BLOCK_DIFFUSION, tokens, tokens)
    return is_block_causal & ~((q.stream_ids == k.stream_ids) & (q.position_ids < k.position_ids))
