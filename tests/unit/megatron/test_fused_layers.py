"""Layers with fused norms, as Transformer Engine has them: same results, same checkpoints. Here they are fabricated on a CPU."""

import copy
import importlib.util
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

from nemo_opdlm.diffusion.masks import AttentionRule, TokenAttributes
from nemo_opdlm.megatron import optional, student
from nemo_opdlm.megatron.checkpoint import load_sharded, load_whole, save_sharded
from nemo_opdlm.megatron.forward import MicroBatch, forward_only
from nemo_opdlm.megatron.layer_names import own_name
from nemo_opdlm.megatron.optimizer import StudentOptimizer, wrap
from nemo_opdlm.megatron.parallel import initialize
from nemo_opdlm.megatron.student import ModelOptions, StagedGPT, build_model, transformer_config
from nemo_opdlm.testing import tiny
from tests.unit.megatron.test_rollout import respond

PREFIX = "model."
FUSED = ModelOptions(transformer_engine=True)
SETTINGS = tiny.optimizer_settings(weight_decay=0.1)


class FusedLinear(ColumnParallelLinear):  # type: ignore[misc]
    """RMSNorm and linear layer in one, with the entry for FP8 scales that checkpoints may have."""

    def __init__(self, input_size: int, output_size: int, *, config: Any, **options: Any) -> None:
        super().__init__(input_size, output_size, config=config, **options)
        self.layer_norm_weight = torch.nn.Parameter(torch.ones(input_size, dtype=config.params_dtype))
        self.eps = config.layernorm_epsilon
        self.is_first_microbatch = True
        self.copies_made = 0
        self.loaded: list[Any] = []

    def forward(self, x: Tensor) -> Any:
        self.copies_made += self.is_first_microbatch
        self.is_first_microbatch = False
        return super().forward(F.rms_norm(x, x.shape[-1:], self.layer_norm_weight, self.eps))

    def get_extra_state(self) -> io.BytesIO:
        return io.BytesIO(b"scales of FP8")

    def set_extra_state(self, state: Any) -> None:
        self.loaded.append(state)


def fused_spec(*, qk_layernorm: bool) -> ModuleSpec:
    spec = copy.deepcopy(get_gpt_layer_local_spec(qk_layernorm=qk_layernorm, normalization="RMSNorm"))
    layer = spec.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = IdentityOp
    layer.self_attention.submodules.linear_qkv = layer.mlp.submodules.linear_fc1 = FusedLinear
    layer.sharded_state_dict_keys_map = {}
    return spec


@pytest.fixture(autouse=True)
def fabricated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(student, "transformer_engine_spec", fused_spec)


def make(fused: bool, seed: int) -> StagedGPT:
    options = FUSED if fused else ModelOptions()
    return tiny.random_network(tiny.architecture(), initialize(), AttentionRule.CAUSAL, options, seed)


def weights(network: StagedGPT) -> dict[str, Tensor]:
    return {own_name(name): parameter.detach().clone() for name, parameter in network[0].named_parameters()}


def fused_layers(network: StagedGPT) -> Iterator[FusedLinear]:
    return (module for module in network.modules() if isinstance(module, FusedLinear))


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys() and "decoder.layers.1.pre_mlp_layernorm.weight" in left
    for name, value in left.items():
        torch.testing.assert_close(value, right[name], atol=1e-6, rtol=0, msg=name)


@pytest.mark.parametrize("fused", [True, False], ids=["from-fused", "from-own"])
def test_either_kind_of_layers_loads_the_checkpoint_of_the_other(fused: bool, tmp_path: Path) -> None:
    source, other = make(fused, 0), make(not fused, 1)
    save_sharded(tmp_path / "checkpoint", {"model": source.sharded_weights(PREFIX)})
    wanted = {"model": other.sharded_weights(PREFIX)}
    state = load_sharded(tmp_path / "checkpoint", wanted, vocab_size=tiny.VOCAB_SIZE)
    other.load_weights(state["model"], PREFIX)
    assert_same(weights(source), weights(other))
    assert all(layer.loaded in ([], [None]) for layer in fused_layers(other))


def test_fused_layers_compute_what_megatrons_own_do() -> None:
    own, fused = make(False, 0), make(True, 1)
    whole = {name: value for name, value in own[0].state_dict().items() if isinstance(value, Tensor)}
    wanted = fused.sharded_weights(PREFIX)
    state = load_whole(whole, wanted, prefix=PREFIX, vocab_size=tiny.VOCAB_SIZE, source="here")
    fused.load_weights(state, PREFIX)
    assert_same(weights(own), weights(fused))
    tokens = torch.arange(4, 24)[None]
    zeros, positions = torch.zeros_like(tokens), torch.arange(20)[None]
    batch = MicroBatch(tokens, TokenAttributes(zeros, zeros, positions, positions // 4))
    expected, found = (forward_only(network, [batch], lambda hidden, _: hidden)[0] for network in (own, fused))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("fused", [True, False], ids=["from-fused", "from-own"])
def test_either_kind_goes_on_with_the_optimizer_of_the_other(fused: bool, tmp_path: Path) -> None:
    source, other = (
        StudentOptimizer(wrap(make(kind, seed), SETTINGS), SETTINGS) for kind, seed in ((fused, 0), (not fused, 1))
    )

    def update(optimizer: StudentOptimizer, number: int) -> None:
        optimizer.zero_grad()
        for name, parameter in sorted((own_name(n), p) for n, p in optimizer.network.model[0].named_parameters()):
            generator = torch.Generator().manual_seed(number + sum(name.encode()))
            parameter.main_grad.copy_(torch.randn(parameter.shape, generator=generator))
        optimizer.step()

    def state(optimizer: StudentOptimizer, is_loading: bool) -> dict[str, Any]:
        stored = optimizer.network.model.sharded_weights(PREFIX)
        return {"model": stored, "optimizer": optimizer.sharded_state_dict(stored, is_loading)}

    update(source, 0)
    save_sharded(tmp_path / "checkpoint", state(source, False))
    loaded = load_sharded(tmp_path / "checkpoint", state(other, True), vocab_size=tiny.VOCAB_SIZE)
    other.network.model.load_weights(loaded["model"], PREFIX)
    other.load_state_dict(loaded["optimizer"])
    other.scheduler.load_state_dict(source.scheduler.state_dict())
    for optimizer in (source, other):
        update(optimizer, 1)
    assert_same(weights(source.network.model), weights(other.network.model))


def test_a_rollout_makes_fp8_copies_anew() -> None:
    # On a CPU Megatron leaves FP8 out without a word; its bookkeeping is there.
    options = ModelOptions(transformer_engine=True, transformer_config={"fp8": "hybrid"})
    network = tiny.random_network(tiny.architecture(), initialize(), options=options)
    for rollouts in (1, 2):
        respond(network, 4)
        assert [layer.copies_made for layer in fused_layers(network)] == [rollouts] * 4


def test_transformer_engine_that_is_not_there_stops_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(student, "transformer_engine_spec", optional.transformer_engine_spec)
    with pytest.raises(ValueError, match="model.transformer_engine=True needs Transformer Engine and a GPU") as caught:
        build_model(tiny.architecture(), initialize(), AttentionRule.CAUSAL, FUSED)
    assert "\n" not in str(caught.value)


def test_apexs_kernel_is_used_only_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    options, arch, parallel = ModelOptions(gradient_accumulation_fusion=True), tiny.architecture(), initialize()

    def is_used(wants_cpu: bool, installed: bool) -> bool:
        monkeypatch.setattr(optional, "wants_cpu", lambda: wants_cpu)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: installed or None)
        return bool(transformer_config(arch, parallel, options).gradient_accumulation_fusion)

    assert [is_used(*case) for case in ((True, True), (False, False), (False, True))] == [False, False, True]
