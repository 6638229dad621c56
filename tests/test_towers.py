"""Text towers of larger models, experts fused into one tensor, and fields of configs that nobody reads."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import said
from golden_models import Golden, load_golden, write_hf
from hypothesis import given, settings
from hypothesis import strategies as st
from test_hf import changed, refused, same_parameters

from convert import load_source
from convert.families.tensors import Held
from convert.report import report_page
from convert.writers.export import export_hf
from slim_jax.store import checkpoint
from slim_jax.store.manifest import read_manifest

VISION = {
    "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight": (8, 4),
    "vision_tower.vision_model.post_layernorm.weight": (4,),
    "multi_modal_projector.mm_input_projection_weight": (4, 32),
}
NOTE = "left out: projector (1 tensor), vision tower (2 tensors)"


def one_line(text: str) -> str:
    """Returns a text without the line breaks of a narrow terminal."""
    return " ".join(text.split())


def whole_model(prefix: str, others: str, **fields: Any) -> Golden:
    """Gemma 3 with a vision tower; names of the text tower begin with ``prefix``, others with ``others``."""
    golden = load_golden("gemma3")
    text = {k: v for k, v in golden.config.items() if k not in ("architectures", "tie_word_embeddings")}
    config = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "text_config": text,
        "vision_config": {"model_type": "siglip_vision_model", "hidden_size": 4},
        "mm_tokens_per_image": 4,
        "eos_token_id": [1, 6],
        **fields,
    }
    weights = {prefix + k.removeprefix("model."): v for k, v in golden.weights.items()}
    weights |= {others + name: np.ones(shape, np.float32) for name, shape in VISION.items()}
    return dataclasses.replace(golden, config=config, weights=weights)


@pytest.mark.parametrize(
    ("prefix", "others"), [("language_model.model.", ""), ("model.language_model.", "model.")]
)
@pytest.mark.parametrize("shards", [1, 2])
def test_text_tower(
    prefix: str, others: str, shards: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = load_source(write_hf(whole_model(prefix, others), tmp_path / "whole", shards=shards))
    text = load_source(write_hf(load_golden("gemma3"), tmp_path / "text"))
    assert source.config == dataclasses.replace(text.config, eos_token_ids=(1, 6))
    assert same_parameters(source, text)
    assert source.origin["left_out"] == {"vision tower": 2, "projector": 1}
    out = json.loads(said(capsys, "plan", tmp_path / "whole", "--json"))
    assert [NOTE in note for note in out["notes"]] == [True]
    if shards == 2:  # the index is enough
        for file in (tmp_path / "whole").glob("*.safetensors"):
            file.unlink()
        assert NOTE in one_line(said(capsys, "plan", tmp_path / "whole"))


def test_what_is_left_out_is_told_later(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = load_source(write_hf(whole_model("model.language_model.", "model."), tmp_path / "whole"))
    checkpoint.save_source(source, tmp_path / "out")
    assert NOTE in one_line(said(capsys, "inspect", tmp_path / "out"))
    assert NOTE in report_page("model", read_manifest(tmp_path / "out"))


def test_a_stored_head_is_not_tied_where_the_config_is_silent(tmp_path: Path) -> None:
    model = whole_model("language_model.model.", "")
    head = 2 * model.weights["language_model.model.embed_tokens.weight"]
    untied = dataclasses.replace(model, weights={**model.weights, "language_model.lm_head.weight": head})
    source = load_source(write_hf(untied, tmp_path / "untied"))
    np.testing.assert_array_equal(source.outer()["head.weight"], head.T)
    assert load_source(write_hf(model, tmp_path / "tied")).config.tied_head


def test_other_tensors_are_still_refused(tmp_path: Path) -> None:
    model = whole_model("model.language_model.", "model.")
    extra = {**model.weights, "model.language_model.layers.0.vision.weight": np.ones(3, np.float32)}
    refused(write_hf(dataclasses.replace(model, weights=extra), tmp_path), "1 unexpected: layers.0.vision")


def test_blocks_for_multi_token_prediction(tmp_path: Path) -> None:
    golden = changed(load_golden("llama_untied"), num_nextn_predict_layers=1)
    count = golden.config["num_hidden_layers"]
    extra = {f"model.layers.{count}.eh_proj.weight": np.ones((3, 3), np.float32)}
    model = dataclasses.replace(golden, weights={**golden.weights, **extra})
    source = load_source(write_hf(model, tmp_path / "one"))
    assert source.origin["left_out"] == {"multi-token prediction": 1}
    without = changed(model, drop=("num_nextn_predict_layers",))
    refused(write_hf(without, tmp_path / "none"), f"unexpected: layers.{count}.eh_proj.weight")


@pytest.mark.parametrize(
    ("name", "change", "culprits"),
    [
        ("llama_untied", {"logit_scale": 2.0}, ("logit_scale = 2.0", "not known to LlamaConfig")),
        ("mistral_window", {"attention_bias": True}, ("attention_bias = True", "MistralConfig")),
        ("qwen3", {"shared_experts": 2}, ("shared_experts = 2", "Qwen3Config")),
        ("gemma3", {"partial_gate": [1]}, ("partial_gate = [1]", "Gemma3TextConfig")),
        (
            "llama_untied",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "beta_fast": 3}},
            ("rope_parameters.beta_fast = 3",),
        ),
        ("llama_untied", {"memory_config": {"slots": 2}}, ("memory_config", "LlamaConfig")),
        ("llama_untied", {"per_layer_config": {"1": {"hidden_size": 4}}}, ("per_layer_config",)),
        ("llama_untied", {"model_type": "llama9"}, ("model_type is 'llama9'", "transformers")),
    ],
)
def test_no_field_is_ignored(
    name: str, change: dict[str, Any], culprits: tuple[str, ...], tmp_path: Path
) -> None:
    refused(write_hf(changed(load_golden(name), **change), tmp_path), "config.json", *culprits)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("llama_untied", {"logit_scale": None, "some_flag": False, "list_of_none": []}),
        ("llama_untied", {"pretraining_tp": 2, "initializer_range": 0.5, "torch_dtype": "float16"}),
        ("gemma2", {"hidden_act": "gelu", "cache_implementation": "hybrid"}),
        ("qwen2_bias", {"max_window_layers": 1}),
    ],
)
def test_fields_without_effect(name: str, change: dict[str, Any], tmp_path: Path) -> None:
    plain = load_source(write_hf(load_golden(name), tmp_path / "plain"))
    assert (
        load_source(write_hf(changed(load_golden(name), **change), tmp_path / "more")).config == plain.config
    )


def fused(golden: Golden) -> Golden:
    """Returns the model with the experts of each block in two tensors."""
    weights = dict(golden.weights)
    for block in range(golden.config["num_hidden_layers"]):
        experts = f"model.layers.{block}.mlp.experts."
        count = golden.config["num_local_experts"]
        if f"{experts}0.up_proj.weight" not in weights:
            continue
        gate, up, down = (
            np.stack([weights.pop(f"{experts}{i}.{part}_proj.weight") for i in range(count)])
            for part in ("gate", "up", "down")
        )
        weights |= {f"{experts}gate_up_proj": np.concatenate([gate, up], 1), f"{experts}down_proj": down}
    return dataclasses.replace(golden, weights=weights)


@pytest.mark.parametrize("name", ["qwen3_moe", "qwen3_moe_dense_first"])
def test_fused_experts(name: str, tmp_path: Path) -> None:
    golden = load_golden(name)
    separate = load_source(write_hf(golden, tmp_path / "separate"))
    together = load_source(write_hf(fused(golden), tmp_path / "fused"))
    assert same_parameters(separate, together)
    block = together.block(1)
    owners = {id(_owner(value)) for key, value in block.items() if ".experts." in key}
    assert len(owners) == 2  # views of the two tensors
    export_hf(together, tmp_path / "out")
    assert same_parameters(load_source(tmp_path / "out"), separate)


def _owner(value: np.ndarray) -> Any:
    while isinstance(value.base, np.ndarray):
        value = value.base
    return value


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(1, 3), min_size=1, max_size=3),
    st.integers(0, 3),
    st.integers(1, 3),
    st.booleans(),
    st.booleans(),
)
def test_splitting_and_joining(
    sizes: list[int], experts: int, groups: int, transposed: bool, bias: bool
) -> None:
    """Row ``i`` of a group follows the rows of the modules before it; joining is the inverse."""
    held = Held(tuple(groups * size for size in sizes), experts, groups, transposed and not bias)
    rest = () if bias else (5,)
    tensor = np.arange(np.prod(held.shape((0, *rest)))).reshape(held.shape((0, *rest)))
    parts = held.split(tensor)
    assert len(parts) == len(sizes) * max(experts, 1)
    np.testing.assert_array_equal(held.join(parts), tensor)
    plain = tensor.swapaxes(-1, -2) if held.transposed else tensor
    plain = plain if experts else plain[None]
    start = 0
    for module, size in enumerate(sizes):
        for expert in range(len(plain)):
            rows = [g * sum(sizes) + start + i for g in range(groups) for i in range(size)]
            np.testing.assert_array_equal(parts[module * len(plain) + expert], plain[expert][rows])
        start += size
