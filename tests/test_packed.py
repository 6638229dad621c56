"""Exported checkpoints: packed safetensors, their card, the hub, and the errors for damaged ones."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_models import load_golden, write_hf
from huggingface_hub import ModelCard
from safetensors.numpy import load_file
from test_tokenizer import byte_level

import slim_jax
from convert import ConvertError, load_source
from convert.readers.load import load_config, open_model, source_tokenizer
from convert.tokenizer import gguf_tokenizer, save_tokenizer
from convert.writers.packed import export_packed
from pallas_kernels import MixedTensor, pack
from slim_jax.store import checkpoint


def packed_weight(weight: Any, rng: np.random.Generator, widths: tuple[int, ...]) -> MixedTensor:
    """Random codes in the shape of a weight, in groups of 32 that cycle through these widths."""
    k, n = weight.shape
    groups = -(-k // 32)
    bits = np.resize(widths, groups)
    limit = np.repeat(1 << bits, 32)[:k, None]
    codes = (rng.integers(0, 1 << 16, (k, n)) % limit).astype(np.uint32)
    scale = rng.random((groups, n), np.float32) / 8
    zeros = rng.integers(0, 16, (groups, n), np.uint32)
    return pack(codes, scale, zeros, bits, group_size=32, widths=widths)


def packed_source(name: str, directory: Path, widths: tuple[int, ...] = (1, 2, 4)) -> Any:
    """A golden model with random packed codes in its blocks' linear layers and, at 5 bits, its embedding."""
    source = load_source(write_hf(load_golden(name), directory))
    rng = np.random.default_rng(0)

    def params(index: int) -> dict[str, Any]:
        return {
            key: packed_weight(value, rng, widths) if key.endswith(".weight") else value
            for key, value in source.block(index).items()
        }

    blocks = [params(index) for index in range(source.config.num_layers)]
    outer = dict(source.outer())
    outer["embed"] = packed_weight(np.asarray(outer["embed"]).T, rng, (5,))
    origin = {"kind": "hf", "path": "/home/someone/models/golden", "fingerprint": "0"}
    return SimpleNamespace(config=source.config, origin=origin, outer=lambda: outer, block=blocks.__getitem__)


def same_leaves(a: Any, b: Any) -> bool:
    """True if two trees hold the same values, bit for bit, in arrays of the same types."""
    one, other = map(jax.tree.leaves, (a, b))
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in zip(one, other)
    )


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed model as an Orbax checkpoint ``orbax``, and its export ``packed`` in one file."""
    room = tmp_path_factory.mktemp("packed")
    checkpoint.save_source(packed_source("gemma3", room / "hf"), room / "orbax")
    save_tokenizer(gguf_tokenizer(byte_level(), "x"), room / "orbax/tokenizer")
    export_packed(open_model(room / "orbax"), room / "packed", perplexity=[("wikitext2", 17.5)])
    return room


def test_the_same_arrays_as_in_the_orbax_checkpoint(room: Path) -> None:
    assert same_leaves(slim_jax.load(room / "packed"), slim_jax.load(room / "orbax"))
    files = sorted(path.name for path in (room / "packed").iterdir())
    assert files == [
        "README.md", "config.json", "generation_config.json", "model.safetensors", "slim.json",
        "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    found = slim_jax.inspect(room / "packed")
    before = slim_jax.inspect(room / "orbax")
    assert found["origin"]["path"] == "golden"  # no path of this machine
    assert {**found, "origin": None} == {**before, "origin": None}
    tokenizer = source_tokenizer(open_model(room / "packed"))
    assert tokenizer("the 2024").input_ids == gguf_tokenizer(byte_level(), "x")("the 2024").input_ids
    assert load_config(room / "packed") == load_config(room / "hf")


def test_shards_have_a_bounded_size_and_an_index(room: Path, tmp_path: Path) -> None:
    out = export_packed(open_model(room / "orbax"), tmp_path / "out", shard_bytes=4000)
    shards = sorted(out.glob("*.safetensors"))
    assert len(shards) > 2
    held = [[value.nbytes for value in load_file(shard).values()] for shard in shards]
    assert all(sum(sizes) <= 4000 or len(sizes) == 1 for sizes in held)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {shard.name for shard in shards}
    assert "blocks.0.attn.q.weight.words" in index["weight_map"]
    assert same_leaves(slim_jax.load(out), slim_jax.load(room / "orbax"))


def test_exported_again_it_is_the_same(room: Path, tmp_path: Path) -> None:
    export_packed(open_model(room / "packed"), tmp_path / "again")
    for name in ("model.safetensors", "slim.json", "config.json", "tokenizer.json"):
        assert (tmp_path / "again" / name).read_bytes() == (room / "packed" / name).read_bytes()


def test_over_several_devices(room: Path) -> None:
    mesh = jax.make_mesh((2,), ("devices",), devices=jax.devices()[:2])
    one, two = (slim_jax.CheckpointSource(room / name, mesh=mesh).block(0) for name in ("orbax", "packed"))
    assert same_leaves(one, two)
    words = two["mlp.up.weight"].words
    assert words.sharding == one["mlp.up.weight"].words.sharding
    assert len(words.sharding.device_set) == 2


def test_dense_models_too(room: Path, tmp_path: Path) -> None:
    source = load_source(room / "hf", "bfloat16")
    out = export_packed(source, tmp_path / "dense")
    again = slim_jax.CheckpointSource(out)
    assert again.block(1)["attn.q.weight"].dtype == jnp.bfloat16
    assert same_leaves(again.block(1), jax.tree.map(jnp.asarray, dict(source.block(1))))
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    assert "not quantized" in (out / "README.md").read_text()


def test_the_card_tells_what_is_stored(room: Path) -> None:
    card = (room / "packed/README.md").read_text()
    assert ModelCard(card).data.library_name == "slim-jax"
    assert "| perplexity on wikitext2 | 17.5 |" in card
    assert "\n| attn.q | " in card
    found = slim_jax.inspect(room / "packed")
    assert f"{found['bits_per_weight']:.3f}" in card
    assert f"{found['parameters']:,}" in card
    assert "/home/" not in card


def without_the_weights(folder: Path) -> str:
    (folder / "model.safetensors").unlink()
    return "model.safetensors is missing, though slim.json lists it"


def with_half_the_weights(folder: Path) -> str:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    return "model.safetensors is truncated or no safetensors file"


def with_a_flipped_bit(folder: Path) -> str:
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    return "model.safetensors is damaged"


def with_arrays_of_another_shape(folder: Path) -> str:
    with_a_changed_manifest(
        folder,
        lambda manifest: manifest["blocks"][0]["arrays"].update({"attn.q.weight.words": [[1, 1], "uint32"]}),
    )
    return "blocks.0.attn.q.weight.words is uint32"


def with_an_array_that_no_file_has(folder: Path) -> str:
    with_a_changed_manifest(
        folder, lambda manifest: manifest["blocks"][0]["arrays"].update({"ghost": [[1], "float32"]})
    )
    return "no file has blocks.0.ghost"


def with_a_path_outside(folder: Path) -> str:
    with_a_changed_manifest(folder, lambda manifest: manifest["files"].update({"../x.safetensors": "0"}))
    return "expected a file in that folder"


def without_a_manifest(folder: Path) -> str:
    (folder / "slim.json").unlink()
    return "is no slim-jax checkpoint: it has no slim.json"


def with_a_changed_manifest(folder: Path, change: Any) -> str:
    manifest = json.loads((folder / "slim.json").read_text())
    change(manifest)
    (folder / "slim.json").write_text(json.dumps(manifest))
    return ""


@pytest.mark.parametrize(
    "broken",
    [
        without_the_weights,
        with_half_the_weights,
        with_a_flipped_bit,
        with_arrays_of_another_shape,
        with_an_array_that_no_file_has,
        with_a_path_outside,
        without_a_manifest,
    ],
)
def test_damaged_folders_are_refused(room: Path, tmp_path: Path, broken: Any) -> None:
    shutil.copytree(room / "packed", tmp_path / "packed")
    expected = broken(tmp_path / "packed")
    with pytest.raises(slim_jax.CheckpointError) as caught:
        slim_jax.load(tmp_path / "packed")
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_without_its_manifest_it_is_no_plain_model(room: Path, tmp_path: Path) -> None:
    shutil.copytree(room / "packed", tmp_path / "packed")
    (tmp_path / "packed/slim.json").unlink()
    with pytest.raises(ConvertError, match="quantized by slim-jax, which is not read"):
        open_model(tmp_path / "packed")


def test_failure_leaves_nothing(room: Path, tmp_path: Path) -> None:
    source = packed_source("llama_untied", tmp_path / "in")
    occupied = tmp_path / "occupied"
    occupied.mkdir()
    (occupied / "mine.txt").touch()
    with pytest.raises(slim_jax.CheckpointError, match="occupied exists and is not an empty directory"):
        export_packed(source, occupied)
    source.block = lambda index: 1 / 0
    with pytest.raises(ZeroDivisionError):
        export_packed(source, tmp_path / "out")
    with pytest.raises(ConvertError, match="cannot be written"):
        export_packed(source, tmp_path / "in/config.json/out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "occupied"]
