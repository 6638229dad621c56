"""Users' mistakes on the command line: one line of output, and nothing is left behind or in the way."""

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import QUANTIZE, make_room, names, refused, said, same_weights, write_model
from test_tokenizer import byte_level

from convert import export_hf, load_source
from convert.cli import run
from convert.tokenizer import gguf_tokenizer, load_tokenizer
from convert.writers.folder import PARTIAL
from slim_jax.store import checkpoint
from slim_jax.store.checkpoint_sink import CheckpointSink
from slim_jax.store.files import LOCK, locked


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    room = make_room(tmp_path_factory.mktemp("room"))
    (room / "deep.toml").write_text("rule = " + "[" * 10_000)
    (room / "deep.json").write_text("[" * 100_000)
    (room / "infinite.toml").write_text('[[rule]]\npattern = "*"\nbits = inf\n')
    return room


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--bits", "9"], "bits is 9"),
        (["--bits", "two"], "--bits"),
        (["--bits", "inf"], "bits is inf"),
        (["--bits", "nan"], "bits is nan"),
        (["--rules", "{room}/infinite.toml"], "bits is inf"),
        (["--rules", "{room}/deep.toml"], "deep.toml is not TOML"),
        (["--allocation", "{room}/deep.json"], "deep.json"),
        (["--seed", "99999999999999999999"], "--seed"),
        (["--group-size", "48"], "group_size is 48"),
        (["--preset", "slow"], "preset is 'slow', expected one of fast, good, best"),
        (["--set", "method=slow"], "method is 'slow'"),
        (["--set", "sqc=best"], "sqc is 'best'"),
        (["--set", "criterion=luck"], "criterion is 'luck'"),
        (["--set", "damping=-1"], "damping is -1"),
        (["--set", "damp=1"], "no setting 'damp', expected one such as damping"),
        (["--set", "damping"], "expected name=value"),
        (["--set", "damping=high"], "damping is 'high', expected a number"),
        (["--set", "epochs=1.5"], "epochs is '1.5', expected a whole number"),
        (["--set", "sequential=1"], "sequential is '1', expected true or false"),
        (["--set", "bits=3"], "bits is given twice"),
        (["--rule", "*.mlp.down"], "expected PATTERN: OPTIONS"),
        (["--rule", "*.mlp.down: bit=3"], "no option 'bit', expected one such as bits"),
        (["--rule", "*.mlp.down: bits=many"], "bits is 'many', expected a number"),
        (["--rule", "*.mlp.down: bits=3, bits=4"], "bits is given twice"),
        (["--rule", "*.mlp.down: leave"], "'leave' is not name=value"),
        (["--rule", "*.mlp.down: bits=9"], "rule '*.mlp.down': bits is 9"),
        (["--rule", "*.mlp.dwn: skip"], "matches none of the 14 layers, near names: blocks.*.mlp.down"),
        (["--rule", "blocks.*: bits=3", "--rule", "*.attn.q: skip"], "rules before it match blocks.0.attn.q"),
        (["--rules", "{room}/none.toml"], "none.toml"),
        (["--rules", "{room}/calib.txt"], "calib.txt is not TOML"),
        (["--target-size", "1MB"], "--bits 2 and --target-size 1MB exclude each other"),
        (["--samples", "0"], "--samples"),
        (["--length", "128"], "64 positions"),
        (["--seed", "-1"], "--seed"),
        (["--calibration", "{room}/none.txt"], "none.txt"),
        (["--calibration", "{room}/hf/model.safetensors"], "not UTF-8"),
        (["--allocation", "{room}/none.json"], "none.json"),
        (["--allocation", "{room}/calib.txt"], "calib.txt"),
        (["--save-allocation", "{room}/none/bits.json"], "is not a directory"),
        (["--devices", "99"], "--devices is 99, this machine has"),
        (["--devices", "3"], "4 samples, expected a multiple of the 3 devices"),
        (["--colour"], "--colour"),
    ],
)
def test_quantize_refuses(room, capsys, tmp_path, options, expected):
    given = [option.format(room=room) for option in options]
    calibration = ["--calibration", room / "calib.txt"]
    line = refused(capsys, "quantize", room / "hf", tmp_path / "out", *calibration, *QUANTIZE, *given)
    assert expected in line
    assert list(tmp_path.iterdir()) == []


def test_a_text_that_is_too_short(room, capsys, tmp_path):
    """The text is read after the run is announced."""
    command = ["quantize", room / "hf", tmp_path / "out", "--calibration", room / "short.txt", *QUANTIZE]
    assert run([*map(str, command)]) == 2
    assert "has 20 tokens, expected at least 32" in capsys.readouterr().err.splitlines()[-1]
    assert names(tmp_path) == []


@pytest.mark.parametrize("command", ["convert", "quantize", "export"])
def test_an_output_that_holds_something_else_is_left_alone(room, capsys, tmp_path, command):
    (tmp_path / "mine.txt").write_text("mine")
    options = ["--calibration", room / "calib.txt", *QUANTIZE] if command == "quantize" else []
    assert "not an empty directory" in refused(capsys, command, room / "hf", tmp_path, *options)
    if command == "quantize":
        refused(capsys, command, room / "hf", tmp_path, *options, "--resume")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def without_a_shard(model: Path) -> str:
    (model / "model-00002-of-00002.safetensors").unlink()
    return "model-00002-of-00002.safetensors is missing"


def with_half_a_shard(model: Path) -> str:
    shard = model / "model-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    return "truncated"


def with_a_tensor_that_no_file_holds(model: Path) -> str:
    path = model / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.ghost.weight"] = "model-00001-of-00002.safetensors"
    path.write_text(json.dumps(index))
    return "model.ghost.weight"


def of_an_unknown_architecture(model: Path) -> str:
    path = model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "architectures": ["MambaForCausalLM"]}))
    return "MambaForCausalLM"


@pytest.mark.parametrize(
    "broken",
    [without_a_shard, with_half_a_shard, with_a_tensor_that_no_file_holds, of_an_unknown_architecture],
)
def test_broken_models_are_refused(room, capsys, tmp_path, broken):
    model = write_model(tmp_path / "hf", shards=2)
    expected = broken(model)
    assert expected in refused(capsys, "convert", model, tmp_path / "out")
    calibration = ("--calibration", room / "calib.txt")
    assert expected in refused(capsys, "quantize", model, tmp_path / "out", *calibration, *QUANTIZE)
    assert expected in refused(capsys, "eval", model, "--text", room / "test.txt", "--window", "32")
    assert expected in refused(capsys, "export", model, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_gguf_without_its_magic_is_refused(capsys, tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGML" + bytes(64))
    assert "is no GGUF file" in refused(capsys, "convert", tmp_path / "model.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def with_a_flipped_byte(path: Path) -> str:
    files = [file for part in ("blocks", "outer") for file in (path / part).rglob("*") if file.is_file()]
    largest = max(files, key=lambda file: file.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    return ""


def of_a_newer_format(path: Path) -> str:
    manifest = json.loads((path / "slim.json").read_text())
    manifest["version"] += 1
    (path / "slim.json").write_text(json.dumps(manifest))
    return "format version"


def with_half_a_manifest(path: Path) -> str:
    content = (path / "slim.json").read_text()
    (path / "slim.json").write_text(content[: len(content) // 2])
    return "slim.json"


@pytest.mark.parametrize("damaged", [with_a_flipped_byte, of_a_newer_format, with_half_a_manifest])
def test_damaged_checkpoints_are_refused(room, capsys, tmp_path, damaged):
    shutil.copytree(room / "q2", tmp_path / "q2")
    expected = damaged(tmp_path / "q2")
    arguments = ("--text", room / "test.txt", "--window", "32")
    assert expected in refused(capsys, "eval", tmp_path / "q2", *arguments)
    assert expected in refused(capsys, "export", tmp_path / "q2", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["eval", "{room}/q2"], "--text"),
        (["eval", "{room}/q2", "--text", "{room}/none.txt"], "none.txt"),
        (["eval", "{room}/q2", "--text", "{room}/short.txt", "--window", "32"], "has 20 tokens"),
        (["eval", "{room}/q2", "--text", "{room}/test.txt", "--window", "1"], "--window"),
        (["eval", "{room}/q2", "--text", "{room}/test.txt", "--max-windows", "0"], "--max-windows"),
        (["eval", "{room}/q2", "--text", "{room}/test.txt", "--window", "128"], "64 positions"),
        (["eval", "{room}/none", "--text", "{room}/test.txt"], "none"),
        (["eval", "{room}/q2", "--text", "{room}/test.txt", "--against", "{room}/none"], "none"),
        (["generate", "{room}/q2"], "--prompt"),
        (["generate", "{room}/q2", "--prompt", ""], "--prompt"),
        (["generate", "{room}/q2", "--prompt", "w5", "--max-tokens", "0"], "--max-tokens"),
        (["generate", "{room}/q2", "--prompt", "w5", "--max-tokens", "64"], "64 positions"),
        (["generate", "{room}/q2", "--prompt", "w5", "--temperature", "-1"], "--temperature"),
        (["generate", "{room}/q2", "--prompt", "w5", "--top-p", "0"], "--top-p"),
        (["generate", "{room}/q2", "--prompt", "w5", "--top-k", "-1"], "--top-k"),
        (["generate", "{room}/q2", "--prompt", "w5", "--min-p", "1"], "min_p is 1.0"),
        (["generate", "{room}/q2", "--prompt", "w5", "--repetition-penalty", "0"], "repetition_penalty is 0"),
        (["generate", "{room}/q2", "--prompt", "w5", "--stop", ""], "--stop is empty"),
        (["generate", "{room}/q2", "--prompt", "w5", "--devices", "9999"], "--devices is 9999, this machine"),
        (["generate", "{room}/q2", "--prompts", "{room}/none.txt"], "none.txt"),
        (["generate", "{room}/q2", "--prompts", "{room}"], "Is a directory"),
        (["generate", "{room}/q2", "--prompt", "w5 \udcff"], "the argument w5 \\udcff is not UTF-8"),
        (["generate", "{room}/q2", "--prompt", "w5", "--seed", "99999999999999999999"], "--seed"),
        (["generate", "{room}/q2", "--prompt", "w5", "--temperature", "nan"], "--temperature"),
        (["generate", "{room}/q2\udcff", "--prompt", "w5"], "q2\\udcff is not UTF-8"),
        (["convert", "{room}/q2\0", "{room}/x"], "q2\\x00"),
        (["inspect", "{room}/q2\x1b[2J"], "q2\\x1b[2J"),
        (["inspect", "{room}/hf/config.json"], "config.json"),
        (["inspect", "{room}/none"], "none"),
        (["inspect", "{room}/hf"], "hf"),
        (["inspect", "{room}/q2", "--html", "{room}/none/page.html"], "is not a directory"),
        (["export", "{room}/q2", "{room}/x", "--format", "gguf"], "--format is 'gguf'"),
        (["export", "{room}/q2", "{room}/x", "--dtype", "int8"], "int8"),
        (["export", "{room}/q2", "{room}/x", "--format", "gptq"], "zero points that are not whole"),
        (["export", "{room}/q2", "{room}/x", "--format", "gptq", "--dtype", "float32"], "float32"),
        (["export", "{room}/hf", "{room}/x", "--format", "gptq"], "no packed layers"),
        (["export", "{room}/q2", "{room}/x", "--format", "safetensors", "--dtype", "float16"], "--dtype"),
        (["export", "{room}/q2", "{room}/x", "--perplexity", "text=3"], "--perplexity is for the model card"),
        (
            ["export", "{room}/q2", "{room}/x", "--format", "safetensors", "--perplexity", "text"],
            "--perplexity is 'text', expected one such as",
        ),
        (["convert", "{room}/hf", "{room}/x", "--dtype", "float8"], "float8"),
        (["convert"], "SOURCE"),
        (["transmogrify"], "transmogrify"),
    ],
)
def test_other_mistakes_are_refused(room, capsys, arguments, expected):
    assert expected in refused(capsys, *[argument.format(room=room) for argument in arguments])
    assert not (room / "x").exists()


def test_links_that_lead_nowhere_and_folders_for_files_are_refused(capsys, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert "link" in refused(capsys, "convert", tmp_path / "link", tmp_path / "out")
    for name in ("config.json", "model.safetensors", "slim.json", "tokenizer.json"):
        (tmp_path / "folders" / name).mkdir(parents=True)
    assert "folders" in refused(capsys, "convert", tmp_path / "folders", tmp_path / "out")
    assert "folders" in refused(capsys, "inspect", tmp_path / "folders")
    model = write_model(tmp_path / "hf")
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / "kept").unlink(missing_ok=True)
        (model / name).rename(tmp_path / "kept")
        (model / name).write_bytes(b"")
        command = ["generate", model, "--prompt", "w5"]
        assert "hf" in refused(capsys, *command)
        (model / name).unlink()
        (model / name).symlink_to(tmp_path / "nowhere")
        assert "hf" in refused(capsys, *command)
        (model / name).unlink()
        (tmp_path / "kept").rename(model / name)
    (tmp_path / "empty.gguf").touch()
    assert "empty.gguf is no GGUF" in refused(capsys, "convert", tmp_path / "empty.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_too_little_memory_is_said(room, capsys, monkeypatch):
    def much(*_: object) -> None:
        raise MemoryError("Unable to allocate 3.64 TiB")

    monkeypatch.setattr("convert.readers.load.open_model", much)
    assert "3.64 TiB" in refused(capsys, "generate", room / "q2", "--prompt", "w5")


def test_a_start_that_fails_blocks_nothing(room, capsys, tmp_path):
    quantize = ["quantize", room / "hf", tmp_path / "out", "--calibration", room / "calib.txt", *QUANTIZE]
    assert "already quantized" in refused(capsys, "quantize", room / "q2", *quantize[2:])
    bits = json.loads((room / "bits.json").read_text())
    (tmp_path / "bits.json").write_text(json.dumps(dict.fromkeys(bits, [2] * 99)))
    assert run([*map(str, quantize), "--allocation", str(tmp_path / "bits.json")]) == 2
    assert "expected" in capsys.readouterr().err.splitlines()[-1]
    assert names(tmp_path) == ["bits.json"]
    (tmp_path / "out").mkdir()  # the state after SIGKILL before the first block
    manifest = json.loads((room / "q2/slim.json").read_text()) | {
        "complete": False,
        "outer": None,
        "blocks": [],
    }
    (tmp_path / "out/slim.json").write_text(json.dumps(manifest))
    (tmp_path / "out" / LOCK).touch()
    said(capsys, *quantize)
    assert same_weights(tmp_path / "out", room / "q2")


def test_an_interrupted_conversion_begins_again(room, capsys, tmp_path):
    model = load_source(room / "hf")

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoint.save_source(model, tmp_path / "out", interrupt)
    assert names(tmp_path) == []
    killed = CheckpointSink(tmp_path / "out").__enter__()
    killed.begin(model.config, model.origin, None)
    killed.write_outer(model.outer())
    killed._lock.__exit__(None, None, None)
    assert names(tmp_path / "out") == ["outer", "slim.json"]
    said(capsys, "convert", room / "hf", tmp_path / "out")
    assert names(tmp_path / "out") == ["blocks", "outer", "slim.json", "tokenizer"]
    assert "not an empty directory" in refused(capsys, "convert", room / "hf", tmp_path / "out")


@pytest.mark.parametrize("where", [".", "link", "killed", "busy"])
def test_exports_to_any_empty_folder(room, capsys, tmp_path, monkeypatch, where):
    (tmp_path / "real").mkdir()
    out = tmp_path / "real"
    if where == ".":
        monkeypatch.chdir(out)
        out = Path(".")
    elif where == "link":
        out = tmp_path / "link"
        out.symlink_to("real")
    elif where == "killed":
        (out / PARTIAL / "folder").mkdir(parents=True)
        (out / LOCK).touch()
    if where == "busy":
        with locked(out):
            assert "is being written by process" in refused(capsys, "export", room / "q2", out)
    said(capsys, "export", room / "q2", out, "--format", "safetensors")
    assert same_weights(tmp_path / "real", room / "q2")
    assert "# real\n" in (tmp_path / "real/README.md").read_text()
    assert not [name for name in names(tmp_path / "real") if name.startswith(".")]
    assert "not an empty directory" in refused(capsys, "export", room / "q2", out)


@pytest.mark.parametrize("umask", [0o027, 0o002])
def test_modes_are_what_umask_gives(room, tmp_path, umask):
    source = load_source(room / "hf")
    tokenizer = gguf_tokenizer(byte_level(), "x")
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    before = os.umask(umask)
    try:
        export_hf(source, tmp_path / "hf", tokenizer=tokenizer, shard_bytes=20_000)
        checkpoint.save_source(source, tmp_path / "orbax")
    finally:
        os.umask(before)
    for path in (
        p for folder in ("hf", "orbax") for p in (tmp_path / folder, *(tmp_path / folder).rglob("*"))
    ):
        wanted = (0o777 if path.is_dir() else 0o666) & ~umask
        assert stat.S_IMODE(path.stat().st_mode) == wanted, path
    assert set(load_tokenizer(tmp_path / "hf").chat_template) == {"default", "tool_use"}


def test_debug_shows_the_traceback(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        run(["--debug", "convert", str(tmp_path / "none"), str(tmp_path / "out")])


@pytest.mark.slow
def test_the_program_says_nothing_else(room):
    """Logs and warnings of other libraries stay out of both streams."""
    program = [
        sys.executable,
        "-m",
        "convert.cli",
        "eval",
        str(room / "q2"),
        "--text",
        str(room / "test.txt"),
    ]
    environment = {key: value for key, value in os.environ.items() if key != "SLIM_JAX_DEBUG"}
    done = subprocess.run(
        [*program, "--text", str(room / "test.txt"), "--window", "32", "--json"],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    assert json.loads(done.stdout)["windows"] == 6
    assert all(line.startswith("evaluating") for line in done.stderr.splitlines())
