"""The tables: fusing against slow loops, splitting as the exact inverse, and errors that name the tensor."""

from dataclasses import replace

import pytest
import torch

from nemo_opdlm.config import Architecture
from nemo_opdlm.convert import families

ARCHITECTURE = Architecture(
    num_layers=2,
    hidden_size=12,
    ffn_hidden_size=20,
    num_attention_heads=6,
    num_query_groups=2,
    kv_channels=4,
    max_position_embeddings=64,
    vocab_size=10,
)
VARIANTS = {
    "llama": ARCHITECTURE,
    "llama-bias": replace(ARCHITECTURE, qkv_bias=True, bias=True, share_embeddings_and_output_weights=True),
    "qwen2": replace(ARCHITECTURE, qkv_bias=True),
    "qwen3": replace(ARCHITECTURE, qk_layernorm=True),
}


def random_weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {name: torch.randn(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize("rest", [(12,), ()], ids=["weight", "bias"])
def test_fused_qkv_puts_each_groups_queries_before_its_key_and_value(rest: tuple[int, ...]) -> None:
    heads, groups, dim = 6, 2, 4
    q, k, v = torch.randn(heads * dim, *rest), torch.randn(groups * dim, *rest), torch.randn(groups * dim, *rest)
    rows = []
    for group in range(groups):
        for head in range(heads):
            if head // (heads // groups) == group:
                rows += [q[head * dim + channel] for channel in range(dim)]
        rows += [k[group * dim + channel] for channel in range(dim)]
        rows += [v[group * dim + channel] for channel in range(dim)]
    assert torch.equal(families.fuse_qkv([q, k, v], ARCHITECTURE), torch.stack(rows))


def test_fused_gate_up_is_gate_over_up() -> None:
    gate, up = torch.zeros(3, 2), torch.ones(3, 2)
    fused = families.fuse_gate_up([gate, up], ARCHITECTURE)
    assert fused[:3].eq(0).all() and fused[3:].eq(1).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_hugging_face_to_megatron_and_back_is_the_identity(variant: str) -> None:
    family, architecture = variant.split("-")[0], VARIANTS[variant]
    source = random_weights(families.hugging_face_shapes(family, architecture))
    megatron = dict(families.to_megatron(source.__getitem__, family, architecture))
    back = dict(families.to_hugging_face(megatron.__getitem__, family, architecture))
    assert back.keys() == source.keys()
    assert all(torch.equal(back[name], source[name]) for name in source)


@pytest.mark.parametrize("variant", VARIANTS)
def test_declared_megatron_shapes_are_those_of_the_fused_tensors(variant: str) -> None:
    family, architecture = variant.split("-")[0], VARIANTS[variant]
    source = random_weights(families.hugging_face_shapes(family, architecture))
    fused = {
        name: tuple(tensor.shape) for name, tensor in families.to_megatron(source.__getitem__, family, architecture)
    }
    assert fused == families.megatron_shapes(family, architecture)


def test_a_tied_model_has_no_output_layer() -> None:
    tied = replace(ARCHITECTURE, share_embeddings_and_output_weights=True)
    assert families.OUTPUT_LAYER not in families.megatron_shapes("llama", tied)
    assert families.OUTPUT_LAYER in families.megatron_shapes("llama", ARCHITECTURE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"b": None}, r"here: tensor b of shape \[3\] is missing"),
        ({"b": (4,)}, r"here: tensor b has shape \[4\], the config says \[3\]"),
        ({"c": (1,), "d": (1,)}, r"here: unexpected tensor c and 1 more"),
    ],
    ids=["missing", "shape", "unexpected"],
)
def test_a_tensor_out_of_place_is_named(change: dict[str, tuple[int, ...] | None], message: str) -> None:
    expected = {"a": (2, 2), "b": (3,)}
    found = {name: shape for name, shape in {**expected, **change}.items() if shape is not None}
    with pytest.raises(ValueError, match=message):
        families.check_names_and_shapes(expected, found, "here")


def test_recomputed_frequencies_of_old_checkpoints_are_not_unexpected() -> None:
    families.check_names_and_shapes({}, {"model.layers.0.self_attn.rotary_emb.inv_freq": (4,)}, "here")
