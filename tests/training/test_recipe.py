"""Recipes: inheritance, refusals, and the whole way from nothing to a folder the pipeline reads."""

import pytest

from unif2ace.errors import UserError
from unif2ace.training.recipe import Recipe, read_recipe, run_recipe

TINY = """
[data]
faces = 96
[tokenizer]
size = 400
[codec]
steps = 2
batch_size = 4
widths = [8, 8, 16]
[clip]
steps = 2
batch_size = 4
[face]
steps = 2
batch_size = 4
identities = 8
val_identities = 2
[judge]
steps = 2
batch_size = 4
[model]
preset = "avatars-tiny"
num_layers = 1
[train]
steps = 3
generation = 2
understanding = 2
checkpoint_every = 2
evaluate_every = 3
[refine]
steps = 1
generation = 1
understanding = 3
"""


def write(folder, name, text):
    path = folder / name
    path.write_text(text)
    return path


def test_a_recipe_that_extends_another_changes_only_what_it_says(tmp_path):
    write(tmp_path, "base.toml", TINY)
    text = 'extends = "base.toml"\nrefine = false\n[train]\nalpha = 0.0\n'
    child = read_recipe(write(tmp_path, "child.toml", text))
    base = read_recipe(tmp_path / "base.toml")
    assert child["train"] == {**base["train"], "alpha": 0.0}
    assert child["codec"] == base["codec"]
    assert child["refine"] == {}


def test_bad_recipes_are_refused_in_one_sentence(tmp_path):
    with pytest.raises(UserError, match="unknown sections tran"):
        read_recipe(write(tmp_path, "a.toml", "[tran]\nsteps = 1\n"))
    with pytest.raises(UserError, match="expected TOML"):
        read_recipe(write(tmp_path, "b.toml", "[train\n"))
    with pytest.raises(UserError, match="cannot be read"):
        read_recipe(tmp_path / "absent.toml")
    with pytest.raises(UserError, match="got cook"):
        run_recipe(write(tmp_path, "c.toml", TINY), tmp_path / "out", stages=["cook"])


def test_reuse_reads_finished_stages_of_another_run(tmp_path):
    path = write(tmp_path, "base.toml", TINY)
    other = tmp_path / "other"
    (other / "codec").mkdir(parents=True)
    (other / "codec" / "codec.json").write_text("{}")
    recipe = Recipe(path, tmp_path / "out", reuse=other)
    assert recipe.folder("codec") == other / "codec"
    assert recipe.folder("judge") == tmp_path / "out" / "judge"
    assert recipe.folder("train") == tmp_path / "out" / "train"


@pytest.mark.slow
def test_from_nothing_to_an_exported_folder(tmp_path):
    folder = run_recipe(write(tmp_path, "tiny.toml", TINY), tmp_path / "out", say=lambda line: None)
    names = {path.name for path in folder.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "codec.safetensors", "judge.safetensors"} <= names
    assert {"clip.safetensors", "face.safetensors", "generation_config.json"} <= names
    said = []
    run_recipe(tmp_path / "tiny.toml", tmp_path / "out", say=said.append)
    assert sum("done before" in line for line in said) == 8  # everything but drawing and exporting
