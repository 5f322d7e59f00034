"""The architecture read from shapes, and the shapes a size gives."""

from pathlib import Path

import pytest
import torch

from hunyuan_model.transformer.config import TransformerConfig, rope_dims_for, transformer_config_from_shapes
from hunyuan_model.transformer.model import HYVideoDiffusionTransformer
from utils.errors import UserError
from utils.safetensors_io import read_header

GOLDENS = Path(__file__).resolve().parents[2] / "goldens"


def shapes_of(config: TransformerConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = HYVideoDiffusionTransformer(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def test_full_size_has_the_published_number_of_parameters():
    shapes = shapes_of(TransformerConfig())
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 12_821_012_544
    assert shapes["final_layer.linear.weight"] == (64, 3072)
    assert transformer_config_from_shapes(shapes) == TransformerConfig()


def test_official_names_of_the_tiny_reference_model():
    header = read_header(GOLDENS / "dit.safetensors")
    config = transformer_config_from_shapes(header.shapes)
    assert config == TransformerConfig(
        hidden_size=48,
        heads=3,
        head_dim=16,
        double_depth=2,
        single_depth=3,
        mlp_size=192,
        text_dim=48,
        pooled_dim=24,
        rope_dims=(4, 6, 6),
    )
    assert shapes_of(config) == header.shapes


@pytest.mark.parametrize(
    "config",
    [
        TransformerConfig(64, 2, 32, 1, 2, 1, 96, 40, 12, 4, 6, (1, 2, 2), (4, 14, 14), 256.0, 32, guidance=False),
        TransformerConfig(48, 3, 16, 3, 1, 3, 100, 8, 20, 16, 16, (2, 4, 2), (4, 6, 6), 256.0, 64, guidance=True),
    ],
)
def test_every_field_is_recovered_from_shapes(config):
    assert transformer_config_from_shapes(shapes_of(config)) == config


def test_rope_dims_are_even_and_fill_the_head():
    assert (rope_dims_for(128), rope_dims_for(32)) == ((16, 56, 56), (4, 14, 14))
    for head_dim in range(2, 258, 2):
        temporal, rows, columns = rope_dims_for(head_dim)
        assert temporal + rows + columns == head_dim and rows == columns
        assert temporal > 0 and not temporal % 2 and not rows % 2


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"vector_in.in_layer.weight": None}, r"it has no vector_in\.in_layer\.weight"),
        ({"time_in.mlp.0.weight": (48,)}, r"time_in\.mlp\.0\.weight .* shape \(48,\)"),
        ({"double_blocks.0.img_attn_q_norm.weight": (20,)}, "head size is 20"),
    ],
)
def test_shapes_of_something_else_are_refused(changed, said):
    shapes = {**read_header(GOLDENS / "dit.safetensors").shapes, **changed}
    with pytest.raises(UserError, match=said):
        transformer_config_from_shapes({name: shape for name, shape in shapes.items() if shape is not None})
