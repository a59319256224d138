"""Saving, loading, and refusing files that are not what they should be."""

from __future__ import annotations

import pytest
import torch

from unif2ace.errors import UserError
from unif2ace.model.transformer import UniF2ace


def test_round_trip(model, make, tmp_path):
    model.save_pretrained(tmp_path / "new" / "folder")
    again = UniF2ace.from_pretrained(tmp_path / "new" / "folder")
    assert again.config == model.config
    assert not again.training
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == ["config.json", "model.safetensors"]
    made = make("generation", [3, 1])
    with torch.no_grad():
        expected, got = (m(made.batch, **made.arguments).hidden for m in (model, again))
    assert torch.equal(expected, got)


def test_storage_dtype(model, tmp_path):
    model.save_pretrained(tmp_path, dtype=torch.bfloat16)
    assert UniF2ace.from_pretrained(tmp_path).head.weight.dtype == torch.bfloat16
    loaded = UniF2ace.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(loaded.head.weight, model.head.weight.bfloat16().float())


def test_bad_files_are_refused(model, build_model, tmp_path):
    with pytest.raises(UserError, match=r"config\.json"):
        UniF2ace.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    whole = weights.read_bytes()
    for broken in (whole[: len(whole) // 2], whole[:5], b"", b"\xff" * 4096):
        weights.write_bytes(broken)
        with pytest.raises(UserError, match="truncated"):
            UniF2ace.from_pretrained(tmp_path)
    weights.write_bytes(whole)
    config.write_text(build_model(num_layers=3).config.to_json())
    with pytest.raises(UserError, match=r"tensors missing"):
        UniF2ace.from_pretrained(tmp_path)
    config.write_text(build_model(ffn_width=52, token_moe=None).config.to_json())
    with pytest.raises(UserError, match="does not fit"):
        UniF2ace.from_pretrained(tmp_path)
    config.write_text(build_model(codebook_size=17).config.to_json())
    with pytest.raises(UserError, match="must be"):
        UniF2ace.from_pretrained(tmp_path)
    config.write_text("{")
    with pytest.raises(UserError, match="expected JSON"):
        UniF2ace.from_pretrained(tmp_path)
    weights.unlink()
    with pytest.raises(UserError, match=r"model\.safetensors"):
        UniF2ace.from_pretrained(tmp_path)


def test_an_interrupted_save_leaves_the_old_files(model, build_model, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("unif2ace.files.os.fsync", full_disk)
    with pytest.raises(UserError, match="No space left"):
        build_model(codebook_size=20).save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
