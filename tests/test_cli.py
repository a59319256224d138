"""The command line: results on stdout, one sentence and status 2 for mistakes, help without loading torch."""

import hashlib
import json
import shlex
import subprocess
import sys

import pytest
import torch
from PIL import Image

from tests.tiny import SIZE, tiny_pipeline
from unif2ace import commands
from unif2ace.cli import build_parser, main

COMMANDS = ("demo", "generate", "ask", "train", "data", "evaluate", "doctor", "bench")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny_pipeline().save_pretrained(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture
def face(tmp_path):
    path = tmp_path / "face.png"
    tiny_pipeline().generate("a face", seed=1, steps=1)[0].save(path)
    return str(path)


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "unif2ace", *arguments], capture_output=True, text=True, timeout=120, check=False
    )


# -------------------------------------------------------------------------------------------------------------- drawing


def test_one_face_is_the_picture_itself(model, tmp_path, capsys):
    out = tmp_path / "new" / "face.png"
    assert main(["generate", "a smiling person", "--model", model, "--seed", "3", "--out", str(out)]) == 0
    assert Image.open(out).tobytes() == tiny_pipeline().generate("a smiling person", seed=3)[0].tobytes()
    captured = capsys.readouterr()
    assert captured.out.startswith(f"{out}: 1 face in ")
    assert captured.err == ""  # no progress bar where stderr is no terminal


def test_several_faces_are_a_grid_or_a_folder(model, tmp_path, capsys):
    options = ["--model", model, "--num", "3", "--steps", "2"]
    assert main(["generate", "a smiling person", *options, "--out", str(tmp_path / "grid.jpg")]) == 0
    assert Image.open(tmp_path / "grid.jpg").width > 2 * SIZE
    assert main(["generate", "a smiling person", *options, "--out", str(tmp_path / "faces")]) == 0
    assert sorted(path.name for path in (tmp_path / "faces").iterdir()) == [f"face-{i:05d}.png" for i in range(3)]
    assert "3 faces" in capsys.readouterr().out


def test_json_tells_what_was_done(model, tmp_path, capsys):
    out = tmp_path / "grid.png"
    arguments = ["a face", "a sad face", "--num", "2", "--seed", "7", "--steps", "2", "--guidance", "1", "--json"]
    assert main(["generate", *arguments, "--model", model, "--backend", "reference", "--out", str(out)]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["prompts"] == ["a face", "a sad face"]
    assert facts["seeds"] == [7, 8, 9, 10]
    assert (facts["steps"], facts["guidance_scale"], facts["temperature"]) == (2, 1.0, 1.0)
    assert facts["faces_per_second"] == pytest.approx(4 / facts["seconds"], rel=0.01)
    assert set(facts["backends"].values()) == {"reference"}
    assert facts["files"] == [{"path": str(out), "sha256": hashlib.sha256(out.read_bytes()).hexdigest()}]


def test_in_painting(model, face, tmp_path, capsys):
    mask = Image.new("L", (SIZE, SIZE), 255)
    mask.paste(0, (0, 0, 16, 16))
    mask.save(tmp_path / "mask.png")
    arguments = ["--image", face, "--mask", str(tmp_path / "mask.png"), "--out", str(tmp_path / "new.png")]
    assert main(["generate", "a sad face", "--model", model, *arguments]) == 0
    new, old = Image.open(tmp_path / "new.png"), Image.open(face)
    assert new.crop((16, 0, SIZE, SIZE)).tobytes() == old.crop((16, 0, SIZE, SIZE)).tobytes()
    assert new.tobytes() != old.tobytes()
    Image.new("L", (9, 7), 255).save(tmp_path / "mask.png")
    assert main(["generate", "a sad face", "--model", model, *arguments]) == 2
    assert f"mask.png: expected a picture of {SIZE} x {SIZE} pixels, got 9 x 7; --fit" in capsys.readouterr().err
    assert main(["generate", "a sad face", "--model", model, "--fit", *arguments]) == 0


# ------------------------------------------------------------------------------------------------------ answers, scores


def test_ask(model, face, capsys):
    assert main(["ask", face, "How are the eyes?", "Why?", "--caption", "--model", model]) == 0
    lines = capsys.readouterr().out.split("\n")
    assert lines[0].startswith("How are the eyes? ")
    assert main(["ask", face, "How are the eyes?", "--model", model, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    answer = tiny_pipeline().answer(Image.open(face), "How are the eyes?")[0]
    assert facts["answers"] == [{"question": "How are the eyes?", "answer": answer}]
    assert facts["caption"] is None


def test_options_may_stand_anywhere(model, face):
    options = build_parser().parse_args(["ask", face, "--fit", "Why?", "--model", model, "How?"])
    assert (options.image, options.question, options.fit, options.model) == (face, ["Why?", "How?"], True, model)
    assert build_parser().parse_args(["generate", "a", "--num", "2", "b"]).prompt == ["a", "b"]
    assert build_parser().parse_args(["bench", "--rounds", "1"]).what == "generate"


def test_fit_takes_any_picture(model, tmp_path, capsys):
    path = str(tmp_path / "wide.png")
    Image.new("RGBA", (70, 50), "red").save(path)
    assert main(["ask", path, "Why?", "--model", model]) == 2
    error = capsys.readouterr().err
    assert "expected an RGB picture of 32 x 32 pixels, got RGBA of 70 x 50; --fit crops" in error
    assert main(["ask", path, "Why?", "--model", model, "--fit"]) == 0


def test_evaluate(model, capsys):
    assert main(["evaluate", "--model", model, "--faces", "2", "--steps", "1"]) == 0
    text = capsys.readouterr().out
    assert "judge on real faces" in text.splitlines()[0]
    assert "2 held-out faces: " in text
    assert main(["evaluate", "--model", model, "--faces", "2", "--steps", "1", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert set(facts["scores"]) == {"generation", "judge_on_real_faces", "answers", "captions"}


def test_bench(model, capsys):
    assert main(["bench", "--model", model, "--faces", "1", "--rounds", "1", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [entry["backend"] for entry in facts["speeds"]] == ["reference", "auto"]


def test_data_avatars_draws_a_dataset(tmp_path, capsys):
    arguments = ["data", "avatars", "--out", str(tmp_path), "--faces", "3", "--size", "32", "--workers", "1"]
    assert main(arguments) == 0
    assert main(arguments) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path}: 3 faces, 1 files drawn",
        f"{tmp_path}: 3 faces, was complete already",
    ]


def test_train_hands_the_recipe_on(tmp_path, monkeypatch, capsys):
    from unif2ace.training import recipe

    calls = []
    monkeypatch.setattr(recipe, "run_recipe", lambda *a, **k: calls.append((a, k)) or tmp_path / "export")
    assert main(["train", "r.toml", "--out", "runs/x", "--stage", "data", "--stage", "codec"]) == 0
    assert calls == [(("r.toml", "runs/x"), {"stages": ["data", "codec"], "reuse": None})]
    assert capsys.readouterr().out == f"finished: {tmp_path / 'export'}\n"


def test_doctor(capsys):
    assert main(["doctor", "--json"]) == 0
    assert "backends" in json.loads(capsys.readouterr().out)
    assert main(["doctor"]) == 0
    assert "routing" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["generate", ""], "prompt: expected some text, got an empty string"),
        (["generate", "a face", "--steps", "0"], "steps: expected an integer from 1 to 1024, got 0"),
        (["generate", "a face", "--guidance", "-2"], "error: guidance: expected a number from 0 to 100, got -2.0"),
        (["evaluate", "--guidance", "nan"], "error: guidance: expected a number from 0 to 100, got nan"),
        (["generate", "a face", "--seed", "-1"], "seed: expected an integer from 0 to 2^64 - 1, got -1"),
        (["generate", "a face", "--image", "x.png"], "in-painting: expected --image and --mask together"),
        (["generate", "a face", "--backend", "magic"], "backend: expected one of auto, reference, native, triton"),
        (["generate", "a face", "--out", "/proc/nothing/face.png"], "cannot write into /proc/nothing: "),
        (["ask", "nowhere.png", "Why?"], "nowhere.png: expected a picture file, found none"),
        (["ask", __file__, "Why?"], "test_cli.py: expected a readable picture"),
        (["generate"], "generate: expected a sentence, or --prompts, got neither"),
        (["ask"], "ask: expected a picture, or --questions, got neither"),
        (["generate", "a face", "--device", "cuda:99"], "device: expected cpu"),
        (["generate", "a face", "--out", "faces.txt"], "--out: expected a folder or a picture file (.png, "),
        (["generate", "a face", "--engine", "ray"], "--engine ray: expected a table (--prompts FILE), got none"),
        (["ask", "face.png", "Why?", "--engine", "ray"], "--engine ray: expected a table (--questions FILE), got"),
        (["generate", "--prompts", "p.txt", "--workers", "2"], "--workers: expected 1 without --engine ray, got 2"),
        (["ask", ".", "Why?"], ".: expected a picture file, found a folder"),
        (["ask", "face.png"], "ask: expected at least one question, or --caption, got neither"),
        (["evaluate", "--data", "nowhere"], "nowhere: expected a folder with Parquet files of faces"),
    ],
)
def test_mistakes_are_one_sentence(model, capsys, arguments, sentence):
    assert main([*arguments, "--model", model]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("unif2ace: error: ")
    assert sentence in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["train", "nowhere.toml", "--out", "out"], "nowhere.toml"),
        (["data", "avatars", "--out", "x", "--seed", "-1"], "seed: expected an integer of at least 0, got -1"),
        (["bench", "flying"], "bench: expected one of generate, train"),
        (["bench", "routing", "--tune"], "bench: --tune is for experts, whose launches have a table, not for routing"),
        (["bench", "experts", "--tune", "--shapes", "huge"], "bench: expected shapes of experts among decode-1, "),
        (["demo", "--model", "nope"], "model: expected a bundled name"),
    ],
)
def test_other_mistakes_are_one_sentence_too(capsys, arguments, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure on")
def test_tuning_needs_a_gpu(capsys):
    assert main(["bench", "experts", "--tune"]) == 2
    assert "bench: --tune measures on a GPU: there is no CUDA device here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "the following arguments are required: COMMAND (see unif2ace --help)"),
        (["paint"], "invalid choice: 'paint'"),
        (["generate", "--prompts", "p.txt", "--engine", "spark"], "argument --engine: invalid choice: 'spark'"),
        (["generate", "a face", "--num", "0"], "argument --num: expected an integer from 1 to 1000000, got '0'"),
        (["generate", "a face", "--threads", "two"], "argument --threads: expected an integer from 1 to 1024"),
        (
            ["generate", "a face", "--batch-size", "9" * 30],
            "argument --batch-size: expected an integer from 1 to 65536",
        ),
        (["generate", "a face", "--out", ""], "error: out: expected something, got an empty string"),
        (["ask", "", "Why?"], "error: image: expected something, got an empty string"),
    ],
)
def test_unusable_command_lines_are_one_sentence(capsys, arguments, sentence):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("unif2ace: error: ")
    assert sentence in error
    assert error.count("\n") == 1


def test_an_interrupt_is_one_line(monkeypatch, capsys):
    def interrupted(options):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "doctor", interrupted)
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err == "unif2ace: interrupted\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_by_examples(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        build_parser().parse_args([command, "--help"])
    assert stopped.value.code == 0
    examples = capsys.readouterr().out.partition("examples:\n")[2].splitlines()
    assert examples[0].startswith(f"  unif2ace {command}")
    for example in examples:  # as they stand there, whatever launches them
        arguments = shlex.split(example.partition("unif2ace ")[2], comments=True)
        assert build_parser().parse_args(arguments).command == command


# --------------------------------------------------------------------------------------------------------- as a program


def test_help_does_not_load_torch():
    program = "import sys; from unif2ace.cli import build_parser; build_parser(); print('torch' in sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert loaded.stdout == "False\n"
    shown = run("--help")
    assert shown.returncode == 0
    assert all(f"\n    {command} " in shown.stdout for command in COMMANDS)


def test_a_mistake_ends_with_status_2_and_no_traceback(model):
    result = run("generate", "a face", "--model", model, "--steps", "0")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "unif2ace: error: steps: expected an integer from 1 to 1024, got 0\n"


@pytest.mark.skipif(sys.platform == "win32", reason="pipes break differently there")
def test_a_reader_that_leaves_is_no_error():
    program = f"{sys.executable} -m unif2ace doctor --json | true"
    result = subprocess.run(["bash", "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert result.stderr == ""
