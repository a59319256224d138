"""Feature encoders: shapes, storage, refusals; the published ones on tiny random models where their packages exist."""

import importlib.util

import pytest
import torch

from tests.bits import assert_same_in_any_company, needs_native
from unif2ace.codec.pixels import to_float
from unif2ace.errors import UserError
from unif2ace.model import features
from unif2ace.model.features import (
    AntelopeEncoder,
    ClipEncoder,
    FeatureEncoder,
    SmallClipEncoder,
    SmallFaceEncoder,
    TowerConfig,
)

TINY = TowerConfig(image_size=32, widths=(8, 8, 16, 16), width=8)


@pytest.mark.parametrize(("kind", "rows"), [(SmallClipEncoder, 4), (SmallFaceEncoder, 1)])
def test_small_encoders(kind, rows, tmp_path):
    torch.manual_seed(0)
    encoder = kind(TINY).eval()
    assert isinstance(encoder, FeatureEncoder)
    assert (encoder.num_rows, encoder.width, encoder.image_size) == (rows, 8, 32)
    images = torch.rand(3, 3, 32, 32) * 2 - 1
    found = encoder.encode(images)
    assert found.shape == (3, rows, 8)
    assert not found.requires_grad
    # Rows enter the transformer beside normalised activations: entries of about unit variance.
    assert 0.5 < found.std() < 2
    torch.testing.assert_close(encoder.encode(images[1:2]), found[1:2])
    assert encoder.encode(images[:0]).shape == (0, rows, 8)
    encoder.save_pretrained(tmp_path, None)
    again = kind.from_pretrained(tmp_path)
    torch.testing.assert_close(again.encode(images), found)
    assert not again.training


@needs_native
@pytest.mark.parametrize("kind", [SmallClipEncoder, SmallFaceEncoder])
@pytest.mark.parametrize("config", [TINY, TowerConfig()])
def test_features_in_any_company_have_the_same_bits(kind, config):
    torch.manual_seed(0)
    encoder = kind(config).eval()
    for name, weight in encoder.named_parameters():
        if name.endswith("mix.weight"):  # zeros at first: blocks that do nothing
            torch.nn.init.normal_(weight, std=0.1)
    pictures = torch.randint(0, 256, (9, config.image_size, config.image_size, 3), dtype=torch.uint8)
    assert_same_in_any_company(lambda some: encoder.encode(to_float(some)), pictures)


@pytest.mark.parametrize("kind", [SmallClipEncoder, SmallFaceEncoder])
def test_small_encoders_refuse(kind, tmp_path):
    encoder = kind(TINY)
    for images in (torch.zeros(1, 3, 64, 64), torch.zeros(3, 32, 32), torch.zeros(1, 3, 32, 32, dtype=torch.uint8)):
        with pytest.raises(UserError, match=r"\[B, 3, 32, 32\]"):
            encoder.encode(images)
    with pytest.raises(UserError, match="found none"):
        kind.from_pretrained(tmp_path)
    with pytest.raises(UserError, match="multiple of 16"):
        TowerConfig(image_size=40)
    with pytest.raises(UserError, match="widths"):
        TowerConfig(widths=(8, 8, 8))


def test_unit_vectors_for_contrast():
    images = torch.rand(2, 3, 32, 32)
    for vectors in (SmallClipEncoder(TINY).pooled(images), SmallFaceEncoder(TINY).identity(images)):
        torch.testing.assert_close(vectors.norm(dim=1), torch.ones(2))


def test_missing_packages_and_files(tmp_path):
    if importlib.util.find_spec("transformers") is None:
        with pytest.raises(UserError, match="pip install"):
            ClipEncoder(tmp_path)
    with pytest.raises(UserError, match="found none"):
        AntelopeEncoder(tmp_path / "absent.onnx")
    path = tmp_path / "wrong.onnx"
    path.write_bytes(b"not a model")
    with pytest.raises(UserError, match=r"pip install|ONNX model"):
        AntelopeEncoder(path)


def test_clip_on_a_tiny_random_model(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=14
    )
    model = transformers.CLIPVisionModel(config).eval()
    model.save_pretrained(tmp_path / "clip")
    encoder = ClipEncoder(tmp_path / "clip")
    assert isinstance(encoder, FeatureEncoder)
    assert (encoder.num_rows, encoder.width, encoder.image_size) == (4, 16, 28)
    images = torch.rand(2, 3, 28, 28) * 2 - 1
    found = encoder.encode(images)
    assert found.shape == (2, 4, 16)
    # The preprocessing of CLIP written out: 0..1, then the channel statistics; the layer before the last.
    mean, std = torch.tensor(features.CLIP_MEAN), torch.tensor(features.CLIP_STD)
    pixels = (((images + 1) / 2).permute(0, 2, 3, 1) - mean) / std
    with torch.no_grad():
        hidden = model(pixels.permute(0, 3, 1, 2), output_hidden_states=True).hidden_states
    torch.testing.assert_close(found, hidden[2][:, 1:], rtol=1e-4, atol=1e-5)
    assert encoder.encode(torch.zeros(1, 3, 64, 64)).shape == (1, 4, 16)
    assert encoder.encode(torch.zeros(0, 3, 64, 64)).shape == (0, 4, 16)
    with pytest.raises(UserError, match="expected a CLIP model"):
        ClipEncoder(tmp_path / "nothing")


@pytest.mark.parametrize("batch", [1, "batch"])
def test_antelope_on_a_tiny_random_model(tmp_path, batch):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from onnx import TensorProto, helper

    weight = torch.randn(3, 8)
    graph = helper.make_graph(
        [
            helper.make_node("GlobalAveragePool", ["x"], ["mean"]),
            helper.make_node("Flatten", ["mean"], ["flat"]),
            helper.make_node("MatMul", ["flat", "w"], ["y"]),
        ],
        "face",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 3, 112, 112])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, 8])],
        [helper.make_tensor("w", TensorProto.FLOAT, [3, 8], weight.flatten().tolist())],
    )
    path = tmp_path / "face.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)
    encoder = AntelopeEncoder(path)
    assert isinstance(encoder, FeatureEncoder)
    assert (encoder.num_rows, encoder.width, encoder.image_size) == (1, 8, 112)
    images = torch.rand(3, 3, 112, 112) * 2 - 1
    expected = torch.nn.functional.normalize(images.mean((2, 3)) @ weight, dim=1)
    torch.testing.assert_close(encoder.encode(images)[:, 0], expected, rtol=1e-4, atol=1e-5)
    assert encoder.encode(torch.zeros(0, 3, 64, 64)).shape == (0, 1, 8)
    wrong = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])],
        "wrong",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4])],
    )
    onnx.save(helper.make_model(wrong, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)
    with pytest.raises(UserError, match=r"\[B, 3, S, S\]"):
        AntelopeEncoder(path)
