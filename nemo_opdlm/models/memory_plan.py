"""How much memory a configuration needs on each rank, before anything is built: arithmetic on the keys and the network's shape.

It is the worst case: every row is as long as the keys allow and every response token is supervised. Not counted are small
tensors, the held-out set's own passes, and what CUDA, NCCL and the allocator keep for themselves. Nothing was measured on a GPU:
there it is taken for granted that FlexAttention keeps its padded inputs, what it returns and no scores, and that Transformer
Engine's layers count like Megatron's own.
"""

import importlib.util
from dataclasses import dataclass, replace

import torch

from nemo_opdlm.config import Architecture, Config, ModelConfig, validate_architecture, validate_layout
from nemo_opdlm.distillation.divergence import DivergenceKind, DivergenceSpec
from nemo_opdlm.megatron import flex
from nemo_opdlm.megatron.attention import DENSE_LENGTH
from nemo_opdlm.megatron.head import CHUNK_BYTES, bytes_per_logit
from nemo_opdlm.megatron.student import ModelOptions
from nemo_opdlm.models.conversion import checkpoint_architecture
from nemo_opdlm.models.memory_moments import Moment, RowLimits, RunPlan, StagePlan
from nemo_opdlm.models.memory_sizes import FP32, Kernel, NetworkSizes, Tokens
from nemo_opdlm.models.settings import model_options, teacher_options, teacher_rows

#: Logits in fp32 that are held where the teacher is reduced to its top-k ids.
_TOP_K_LOGITS = 4.25
#: The same of a proposal, without and with a nucleus filter, beside those that the head has made.
_PROPOSAL_LOGITS, _NUCLEUS_LOGITS = 2.0, 4.5
#: Bytes of a proposal for each column of the vocabulary: its id three times, and whether it is forbidden.
_COLUMN_BYTES = 25
#: Bytes of a rollout's record: id, unmasking step and confidence of each token; id and loss mask of each token of a state.
_RECORD_BYTES, _STATE_BYTES = 16, 9


def plan_run(config: Config) -> RunPlan:
    """The plan of a configuration; without `model.restore_from_path`, of the network that its keys describe.

    No weights are read. It is a plan for GPUs unless `trainer.accelerator` is `cpu`, and for the Adam that Megatron would find
    here.

    Raises:
        ValueError, OSError: a checkpoint cannot be read or contradicts the configuration, or there is neither a checkpoint
            nor a network; one line.
    """
    model = config.model
    student = _student(config)
    validate_architecture(config, student)
    teacher = student
    if model.teacher_path != model.restore_from_path:
        teacher = _checkpoint_architecture(model, str(model.teacher_path))
        validate_layout(config, teacher, model.teacher_path)
    fused_adam = any(importlib.util.find_spec(name) is not None for name in ("transformer_engine", "amp_C"))
    on_gpu = config.trainer.accelerator != "cpu"
    stages = plan_memory(config, student, teacher, on_gpu=on_gpu, fused_adam=fused_adam and on_gpu)
    return RunPlan(RowLimits.of(model, student.max_position_embeddings), stages)


def _student(config: Config) -> Architecture:
    model = config.model
    if model.restore_from_path is not None:
        return _checkpoint_architecture(model, model.restore_from_path)
    described = Architecture.from_keys(vars(model))
    if described is None:
        raise ValueError(
            "model.restore_from_path=None must be given, or the network's shape instead: a choice of the group model, "
            "e.g. model=qwen3_4b"
        )
    return described


def _checkpoint_architecture(model: ModelConfig, path: str) -> Architecture:
    return checkpoint_architecture(path, model.tokenizer.type).padded_to(model.make_vocab_size_divisible_by)


def plan_memory(
    config: Config, student: Architecture, teacher: Architecture, *, on_gpu: bool, fused_adam: bool
) -> tuple[StagePlan, ...]:
    """The plan of every pipeline stage; data-, context- and tensor-parallel ranks of a stage need the same.

    Args:
        config: as returned by `validate`.
        student: network of the weights that training starts from.
        teacher: network of the frozen model.
        on_gpu: whether the run has GPUs: norms, chunks of logits and a sharded optimizer are different on a CPU.
        fused_adam: whether Adam updates in place, as Transformer Engine's and Apex's do.
    """
    stages = range(config.model.pipeline_model_parallel_size)
    return tuple(_Planner(config, student, teacher, on_gpu, fused_adam, stage).plan() for stage in stages)


@dataclass(frozen=True)
class _Planner:
    """One stage of one run."""

    config: Config
    student_arch: Architecture
    teacher_arch: Architecture
    on_gpu: bool
    fused_adam: bool
    stage: int

    def plan(self) -> StagePlan:
        moments = [*self._rollout(), *self._teacher_pass(), *self._update()]
        return StagePlan(self.stage, tuple(moments))

    # -- what is there all the time --

    @property
    def _model(self) -> ModelConfig:
        return self.config.model

    @property
    def _options(self) -> ModelOptions:
        return model_options(self._model, self.config.trainer.precision)

    @property
    def _student(self) -> NetworkSizes:
        weight, autocast = self._options.params_dtype, self._options.autocast_dtype
        value = weight if autocast is None else autocast
        return NetworkSizes(
            self.student_arch, self._model, self.stage, weight.itemsize, value.itemsize, on_gpu=self.on_gpu
        )

    @property
    def _teacher(self) -> NetworkSizes:
        options = teacher_options(self._model, self._options)
        held = options.autocast_dtype or options.params_dtype
        return NetworkSizes(
            self.teacher_arch, self._model, self.stage, held.itemsize, held.itemsize, on_gpu=self.on_gpu
        )

    def _moment(self, name: str, *, student_works: bool = False, teacher_works: bool = False) -> Moment:
        student, teacher = self._student, self._teacher
        is_cast = student_works and student.value_bytes < student.weight_bytes
        cast = student.vocab_weights * student.value_bytes * (is_cast and student.is_last)
        is_away = self._model.opdlm.teacher.offload and not teacher_works
        held = teacher.vocab_weights * teacher.is_last if is_away else teacher.parameters
        return Moment(
            name,
            parameters=student.parameters * student.weight_bytes + cast,
            gradients=student.parameters * FP32,
            optimizer=self._optimizer(student),
            teacher=held * teacher.weight_bytes * self._model.has_teacher,
            targets=self._records,
        )

    def _trains(self, name: str, *, student_works: bool = False) -> Moment:
        """A moment of an update, beside the targets of its rollout batch."""
        moment = self._moment(name, student_works=student_works)
        return replace(moment, targets=moment.targets + self._targets)

    def _kernel(self, network: NetworkSizes, length: int, num_ranks: int = 1) -> Kernel:
        """That of passes without a cache, as `AttentionContext` and `build_model` choose it."""
        if num_ranks == 1:
            if self._uses_flex(network):
                return Kernel.TILES
            if length <= DENSE_LENGTH:
                return Kernel.DENSE
        return Kernel.GPU_CHUNKS if self.on_gpu else Kernel.CPU_CHUNKS

    def _uses_flex(self, network: NetworkSizes) -> bool:
        head = network.arch.kv_channels
        assert head is not None
        return flex.is_used(self._model.opdlm.attention, self.on_gpu, head)

    def _optimizer(self, student: NetworkSizes) -> int:
        masters = 1 if student.weight_bytes < FP32 else 0
        is_sharded = self._model.optim.distributed and self.on_gpu
        return (2 + masters) * FP32 * student.parameters // (self._data_size if is_sharded else 1)

    @property
    def _data_size(self) -> int:
        """Ranks with the same weights."""
        assert self.config.trainer.world_size is not None
        return self.config.trainer.world_size * self._model.context_parallel_size // self._model.model_parallel_size

    @property
    def _trained_rollouts(self) -> int:
        """Rollouts of a rollout batch that a rank trains on, in part under context parallelism."""
        return self._model.opdlm.rollout.num_samples_per_step * self._model.context_parallel_size // self._data_size

    @property
    def _row(self) -> RowLimits:
        return RowLimits.of(self._model, self.student_arch.max_position_embeddings)

    @property
    def _records(self) -> int:
        """Trajectories and states, of all ranks and once more of this one."""
        rollouts = self._model.opdlm.rollout.num_samples_per_step + self._trained_rollouts
        return rollouts * self._row.blocks * (_RECORD_BYTES + _STATE_BYTES * self._row.copies)

    @property
    def _target_tokens(self) -> int:
        return self._trained_rollouts * self._row.response

    @property
    def _targets(self) -> int:
        opdlm = self._model.opdlm
        if opdlm.divergence == "nll":
            return self._target_tokens * torch.int64.itemsize
        if not self._teacher.is_last:
            return 0
        if opdlm.divergence_top_k:
            per_token = opdlm.divergence_top_k * (torch.int64.itemsize + FP32) + FP32
            return self._target_tokens * per_token
        return self._target_tokens * self.teacher_arch.hidden_size * self._teacher.value_bytes

    # -- 1. rollout --

    def _rollout(self) -> list[Moment]:
        opdlm, rollout, row = self._model.opdlm, self._model.opdlm.rollout, self._row
        if not opdlm.generates:
            return []
        by_teacher = opdlm.responses == "teacher"
        network, block = (self._teacher, 1) if by_teacher else (self._student, opdlm.block_size)
        length = flex.bucket(row.blocks) if self._uses_flex(network) else row.blocks
        batches, slots = self._batches(length)
        cached = self._moment("rollout", student_works=not by_teacher, teacher_works=by_teacher)
        cached = replace(
            cached,
            parameters=cached.parameters + network.cast_in_rollouts(),
            cache=batches * network.cache(slots, length),
        )
        prefix = max(0, row.prompt // block * block - block)
        prompts = Tokens(slots, prefix, Kernel.DENSE, prefix)
        prefill = prompts.mask_elements + network.forward_workspace(prompts, is_lean=network.is_lean)
        # Two blocks of a row go through the layers, of which the second is proposed for.
        forward = network.forward_workspace(Tokens(slots, 2 * block, Kernel.DENSE, row.blocks), is_lean=network.is_lean)
        heads_per_group = network.queries // network.keys
        # Tiles are told apart by number, and cost nothing to speak of.
        mask = 0 if self._uses_flex(network) else slots * 2 * block * heads_per_group * row.blocks
        factor = _PROPOSAL_LOGITS if rollout.top_p == 1 else _NUCLEUS_LOGITS
        of_logit = factor * FP32 + network.value_bytes
        logits = int((of_logit * slots * block + _COLUMN_BYTES) * network.vocab) * network.is_last
        return [
            replace(cached, name="rollout: prompts", activations=prefill),
            replace(cached, name="rollout: layers", activations=forward + mask * (1 + network.value_bytes)),
            replace(cached, name="rollout: proposals", activations=mask, logits=logits),
        ]

    def _batches(self, length: int) -> tuple[int, int]:
        """Batches that a pipeline keeps in flight, and the slots of each, of so many tokens."""
        rollout = self._model.opdlm.rollout
        rows = -(-rollout.num_samples_per_step // self._data_size)
        batches = min(self._model.pipeline_model_parallel_size, rows)
        slots = min(rollout.max_batch_size, -(-rows // batches))
        if rollout.max_batch_tokens is not None:
            slots = min(slots, max(1, rollout.max_batch_tokens // (batches * length)))
        return batches, slots

    # -- 2. teacher --

    def _teacher_pass(self) -> list[Moment]:
        opdlm, teacher = self._model.opdlm, self._teacher
        if opdlm.divergence == "nll":
            return []
        num_rollouts = -(-self._trained_rollouts // self._model.context_parallel_size)
        tokens, hidden = self._teacher_tokens(num_rollouts), self._hidden_of_responses(num_rollouts)
        shared, working = teacher.shared_by_layers(tokens), self._moment("", teacher_works=True)
        layers = replace(
            working,
            name="teacher: layers",
            targets=working.targets + hidden,
            activations=shared + teacher.forward_workspace(tokens),
        )
        if not opdlm.divergence_top_k:
            # All parts, what they are joined to, and the same in the order of the rollouts; or two copies of what this rank
            # has, and what it gathers from all ranks, before and after it is sorted.
            is_shared = self._model.context_parallel_size > 1
            made = 2 * hidden + (2 * self._targets if is_shared else hidden)
            joined = replace(self._moment("teacher: targets"), activations=shared)
            return [layers, replace(joined, targets=joined.targets + made)]
        chunk = min(self._chunk_rows(teacher), num_rollouts * self._row.response)
        reduced = replace(
            self._moment("teacher: targets"),
            logits=int(_TOP_K_LOGITS * chunk * teacher.vocab * FP32) * teacher.is_last,
            activations=shared,
        )
        return [layers, replace(reduced, targets=reduced.targets + hidden + self._targets)]

    def _teacher_tokens(self, num_rollouts: int) -> Tokens:
        """The tokens of one causal pass."""
        row, pack = self._row, self._model.opdlm.pack_to_tokens
        if pack is None:
            rows = min(teacher_rows(self._model), num_rollouts)
            return Tokens(rows, row.total, self._kernel(self._teacher, row.total), row.total)
        length = min(max(pack, row.total), num_rollouts * row.total)
        return Tokens(1, length, self._kernel(self._teacher, length), row.total)

    def _hidden_of_responses(self, num_rollouts: int) -> int:
        teacher = self._teacher
        per_token = self.teacher_arch.hidden_size * teacher.value_bytes * teacher.is_last
        return num_rollouts * self._row.response * per_token

    # -- 3. update --

    @property
    def _micro_batch(self) -> Tokens:
        """The tokens of one micro-batch, padded for the ranks that share them."""
        options, model = self._options, self._model
        multiple = options.token_multiple * (model.tensor_model_parallel_size if model.sequence_parallel else 1)
        if model.context_parallel_size > 1:
            multiple *= 2 * model.context_parallel_size
        row, ranks, pack = self._row, model.context_parallel_size, model.opdlm.pack_to_tokens
        rows, length = model.micro_batch_size, -(-row.two_stream // multiple) * multiple
        if pack is not None:
            whole = pack // multiple * multiple
            if not model.ub_tp_comm_overlap:  # which wants every pack filled up
                whole = min(whole, self._rollouts_of_update * row.two_stream)
            rows, length = 1, -(-whole // multiple) * multiple
        # A state sees the clean tokens of earlier blocks and its own block.
        return Tokens(rows, length, self._kernel(self._student, length, ranks), row.blocks, ranks)

    @property
    def _rollouts_of_update(self) -> int:
        """Rollouts that a data-parallel rank trains on in an update."""
        return self._model.global_batch_size * self._model.context_parallel_size // self._data_size

    @property
    def _micro_batches(self) -> int:
        """Micro-batches of an update."""
        model, rollouts = self._model, self._rollouts_of_update
        pack = model.opdlm.pack_to_tokens
        rows = model.micro_batch_size if pack is None else max(1, pack // self._row.two_stream)
        return -(-rollouts // rows)

    @property
    def _supervised(self) -> int:
        """Tokens of a micro-batch that this rank's head sees."""
        row, length, ranks = self._row, self._micro_batch.length, self._model.context_parallel_size
        if self._model.opdlm.pack_to_tokens is not None:
            return length // ranks * row.supervised // row.two_stream
        if ranks == 1:
            return self._model.micro_batch_size * row.supervised
        # Of 2 x ranks equal pieces a rank holds one from the front and one from the back; states, and a causal copy, end the row.
        piece, first = length // (2 * ranks), row.two_stream - row.supervised
        numbers = [(rank, 2 * ranks - 1 - rank) for rank in range(ranks)]
        states = [sum(min(piece, max(0, (n + 1) * piece - first)) for n in mine) for mine in numbers]
        return self._model.micro_batch_size * max(states)

    def _update(self) -> list[Moment]:
        student, tokens = self._student, self._micro_batch
        during, kept = self._trains("update", student_works=True), self._kept(student, tokens)
        # The pass that goes back through the layers is done with the final norm.
        of_norm = student.kept_by_ends(tokens) * student.is_last
        vocab_gradient = student.vocab_weights * student.weight_bytes
        is_tied = self.student_arch.share_embeddings_and_output_weights and student.is_last
        is_apart = self._model.optim.overlap_grad_sync
        moments = [
            replace(
                during,
                name="update: layers",
                gradients=during.gradients + vocab_gradient * (is_tied and is_apart),
                activations=kept
                - of_norm
                + student.recomputed(tokens, self._layers_of_chunk)
                + student.backward_workspace(tokens),
            )
        ]
        if student.is_last:
            moments.insert(0, self._head(during, kept))
        if student.is_first:
            moments.append(
                replace(
                    during,
                    name="update: embedding",
                    # A tied head's, where it has one of its own, and the embedding's are added into a third one.
                    gradients=during.gradients + vocab_gradient * (3 if is_tied and is_apart else 1),
                    # Behind the first stage other micro-batches are still on their way.
                    activations=self._kept(student, tokens, num_done=1)
                    + 2 * tokens.count * student.residual * student.weight_bytes,
                )
            )
        step = self._trains("update: optimizer")
        return [*moments, replace(step, optimizer=step.optimizer + self._adam_workspace)]

    def _head(self, during: Moment, kept: int) -> Moment:
        student, rows = self._student, self._supervised
        chunk = min(rows, self._chunk_rows(student))
        return replace(
            during,
            name="update: head",
            # Summed up in fp32 over the chunks, in the gradient buffer unless that may be on its way.
            gradients=during.gradients + student.vocab_weights * FP32 * self._model.optim.overlap_grad_sync,
            activations=kept + rows * self.student_arch.hidden_size * student.weight_bytes,
            logits=bytes_per_logit(self._divergence) * chunk * student.vocab,
        )

    def _kept(self, student: NetworkSizes, tokens: Tokens, num_done: int = 0) -> int:
        """Activations of all micro-batches in flight, but for some that are done on this stage."""
        in_flight, chunks = self._in_flight()
        if chunks <= num_done:
            return 0
        in_flight, chunks = max(1, in_flight - num_done), chunks - num_done
        of_layers = chunks * student.kept(tokens, self._layers_of_chunk)
        # Chunks of the mask are kept with what attention keeps, a whole one is not.
        masks = in_flight if tokens.chunk_elements and student.keeps_attention(self._layers_of_chunk) else 1
        rotations = in_flight * (student.shared_by_layers(tokens) - tokens.shared_mask)
        return of_layers + in_flight * student.kept_by_ends(tokens) + rotations + masks * tokens.shared_mask

    @property
    def _layers_of_chunk(self) -> int:
        return self._student.layers // (self._model.virtual_pipeline_model_parallel_size or 1)

    def _in_flight(self) -> tuple[int, int]:
        """Micro-batches whose activations a stage keeps, and pieces of the network that keep them."""
        model = self._model
        micro_batches = self._micro_batches
        stages, pieces = model.pipeline_model_parallel_size, model.virtual_pipeline_model_parallel_size
        behind = stages - self.stage - 1
        if pieces is None:
            in_flight = min(micro_batches, behind + 1)
            return in_flight, in_flight
        filled_up = -(-micro_batches // stages) * stages
        chunks = min(filled_up * pieces, 2 * behind + (pieces - 1) * stages + 1)
        return min(filled_up, -(-chunks // pieces)), chunks

    @property
    def _adam_workspace(self) -> int:
        """Torch's Adam divides by a copy of the second moments: of all weights on a GPU, of one after the other on a CPU."""
        if self.fused_adam:
            return 0
        student = self._student
        if not self.on_gpu:
            return 2 * student.largest_parameter * FP32
        return student.parameters * FP32 // (self._data_size if self._model.optim.distributed else 1)

    def _chunk_rows(self, network: NetworkSizes) -> int:
        budget: int = CHUNK_BYTES["cuda" if self.on_gpu else "cpu"]
        return max(1, budget // (bytes_per_logit(self._divergence) * network.vocab))

    @property
    def _divergence(self) -> DivergenceSpec:
        opdlm = self._model.opdlm
        return DivergenceSpec(DivergenceKind(opdlm.divergence), top_k=opdlm.divergence_top_k)
