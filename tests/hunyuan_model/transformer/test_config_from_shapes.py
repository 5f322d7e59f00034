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


@pytest.mark.parametrize(("head_dim", "dims"), [(128, (16, 56, 56)), (32, (4, 14, 14)), (16, (4, 6, 6))])
def test_rope_dims_of_published_head_sizes(head_dim, dims):
    assert rope_dims_for(head_dim) == dims


@pytest.mark.parametrize("head_dim", range(2, 258, 2))
def test_rope_dims_are_even_and_fill_the_head(head_dim):
    temporal, rows, columns = rope_dims_for(head_dim)
    assert temporal + rows + columns == head_dim
    assert rows == columns
    assert not temporal % 2 and not rows % 2 and temporal > 0
    assert rows <= head_dim * 7 / 16 < rows + 2


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


def test_missing_names_are_named():
    shapes = dict(read_header(GOLDENS / "dit.safetensors").shapes)
    del shapes["vector_in.in_layer.weight"], shapes["final_layer.linear.weight"]
    with pytest.raises(UserError, match=r"vector_in\.in_layer\.weight, final_layer\.linear\.weight"):
        transformer_config_from_shapes(shapes)


def test_a_gap_between_blocks_is_named():
    shapes = {
        name: shape
        for name, shape in read_header(GOLDENS / "dit.safetensors").shapes.items()
        if not name.startswith("single_blocks.1.")
    }
    with pytest.raises(UserError, match=r"single_blocks\.1 is missing"):
        transformer_config_from_shapes(shapes)


def test_contradicting_shapes_are_refused():
    shapes = dict(read_header(GOLDENS / "dit.safetensors").shapes)
    shapes["double_blocks.0.img_attn_q_norm.weight"] = (20,)
    with pytest.raises(UserError, match="head size is 20"):
        transformer_config_from_shapes(shapes)
