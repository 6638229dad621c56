"""Longrope compared with an independent NumPy decoder, across the border of the trained context.

transformers' rule (`modeling_rope_utils.longrope_frequency_update`): a pass takes the long factors if its
greatest position plus one exceeds the trained context. Phi-3's `prepare_inputs_for_generation` drops the
cache at the step that crosses the border, so all tokens are read again with the long factors.
"""

import jax.numpy as jnp
import numpy as np
import pytest
from golden_models import decoder_of, load_golden, run_cached, write_hf

from convert import load_source
from slim_jax.infer.generate import Generator, sample_text
from slim_jax.model.decoder import Decoder
from slim_jax.model.params import make_decoder, split_params
from slim_jax.model.rotary import frequencies

BORDER = 16


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    return decoder_of(load_source(write_hf(load_golden("phi3_longrope"), tmp_path_factory.mktemp("phi"))))


class Reference:
    """The golden decoder in float64, for one row; cached keys keep their rotation at storing."""

    def __init__(self) -> None:
        golden = load_golden("phi3_longrope")
        self.fields = golden.config
        self.weights = {name: np.asarray(w, np.float64) for name, w in golden.weights.items()}
        self.layers, self.heads = self.fields["num_hidden_layers"], self.fields["num_attention_heads"]
        self.kv_heads = self.fields["num_key_value_heads"]
        self.forget()

    def forget(self) -> None:
        self.cache: list[list[np.ndarray]] = [[] for _ in range(self.layers)]
        self.length = 0

    def rotate(self, x: np.ndarray, positions: np.ndarray, reach: int) -> np.ndarray:
        rope, d = self.fields["rope_parameters"], x.shape[-1]
        factors = rope["long_factor"] if reach > BORDER else rope["short_factor"]
        theta = rope.get("rope_theta", self.fields.get("rope_theta", 10000.0))
        inverse = 1 / (np.array(factors) * theta ** (np.arange(0, d, 2) / d))
        angle = positions[:, None, None] * inverse
        ratio = self.fields["max_position_embeddings"] / BORDER
        scale = np.sqrt(1 + np.log(ratio) / np.log(BORDER))
        cos, sin = scale * np.cos(angle), scale * np.sin(angle)
        a, b = x[..., : d // 2], x[..., d // 2 :]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    def norm(self, x: np.ndarray, name: str) -> np.ndarray:
        return (
            x / np.sqrt(np.mean(x * x, -1, keepdims=True) + self.fields["rms_norm_eps"]) * self.weights[name]
        )

    def read(self, tokens: list[int], reach: int) -> np.ndarray:
        """Logits after the last of ``tokens``, in a pass whose batch reaches ``reach`` tokens."""
        positions = self.length + np.arange(len(tokens))
        h = self.weights["model.embed_tokens.weight"][tokens]
        for i in range(self.layers):
            at = f"model.layers.{i}."
            x = self.norm(h, at + "input_layernorm.weight")
            h = h + self.attend(x, positions, reach, i) @ self.weights[at + "self_attn.o_proj.weight"].T
            x = self.norm(h, at + "post_attention_layernorm.weight")
            gate, up = np.split(x @ self.weights[at + "mlp.gate_up_proj.weight"].T, 2, axis=-1)
            h = h + (gate / (1 + np.exp(-gate)) * up) @ self.weights[at + "mlp.down_proj.weight"].T
        self.length += len(tokens)
        return self.weights["lm_head.weight"] @ self.norm(h[-1], "model.norm.weight")

    def attend(self, x: np.ndarray, positions: np.ndarray, reach: int, layer: int) -> np.ndarray:
        qkv = x @ self.weights[f"model.layers.{layer}.self_attn.qkv_proj.weight"].T
        qkv = qkv.reshape(len(x), self.heads + 2 * self.kv_heads, -1)
        q, k, v = np.split(qkv, [self.heads, self.heads + self.kv_heads], axis=1)
        q, k = (self.rotate(a, positions, reach) for a in (q, k))
        self.cache[layer].append(np.stack([k, v]))
        k, v = np.repeat(np.concatenate(self.cache[layer], axis=1), self.heads // self.kv_heads, axis=2)
        scores = np.einsum("thd,shd->hts", q, k) / np.sqrt(q.shape[-1])
        scores = np.where(positions[:, None] >= np.arange(len(k)), scores, -np.inf)
        p = np.exp(scores - scores.max(-1, keepdims=True))
        return np.einsum("hts,shd->thd", p / p.sum(-1, keepdims=True), v).reshape(len(x), -1)


def greedy(prompts: list[list[int]], count: int) -> list[list[int]]:
    """Greedy tokens of transformers' generate, where the longest row decides the factors of all rows."""
    rows, references = [list(prompt) for prompt in prompts], [Reference() for _ in prompts]
    for step in range(count):
        reach = max(len(row) for row in rows)
        for row, reference in zip(rows, references):
            if step and reach == BORDER + 1:
                reference.forget()
            row.append(int(np.argmax(reference.read(row[reference.length :], reach))))
    return [row[len(prompt) :] for row, prompt in zip(rows, prompts)]


def test_factors_change_with_the_tokens_seen(decoder: Decoder) -> None:
    config = decoder.config
    scaling = config.rope_scaling
    plain = frequencies(config.head_dim, config.rope_theta)
    for tokens, factors in ((0, "short"), (16, "short"), (17, "long")):
        found = plain / frequencies(config.head_dim, config.rope_theta, scaling, jnp.int32(tokens))
        np.testing.assert_allclose(found, getattr(scaling, f"{factors}_factors"), rtol=1e-6)
    assert scaling.attention_factor == pytest.approx((1 + np.log(4) / np.log(16)) ** 0.5)


def test_each_pass_chooses_for_its_batch_and_cached_keys_stay(decoder: Decoder) -> None:
    tokens, lengths, steps = load_golden("phi3_longrope").tokens[:2], np.array([9, 14]), 5
    found = run_cached(decoder, tokens, lengths, steps)
    references = [Reference(), Reference()]
    for step in range(steps + 1):
        reach = lengths.max() + step
        for row, reference in enumerate(references):
            new = tokens[row, reference.length : lengths[row] + step].tolist()
            expected = reference.read(new, reach)
            np.testing.assert_allclose(found[step, row], expected, rtol=0, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("lengths", [(14, 5), (8, 12)])
def test_generation_over_the_border(decoder: Decoder, lengths: tuple[int, ...]) -> None:
    """The cache has room for more than the trained context from the start, which must have no effect."""
    tokens = load_golden("phi3_longrope").tokens
    prompts = [tokens[i % len(tokens), :length].tolist() for i, length in enumerate(lengths)]
    assert Generator(decoder).generate(prompts, max_tokens=9, stop=[]) == greedy(prompts, 9)


def test_written_text_is_read_as_it_was_written(decoder: Decoder) -> None:
    """Each token is the one that a full pass predicts: logits lie so far apart that sampling is greedy."""
    outer, blocks = split_params(decoder)
    sure = make_decoder(decoder.config, {**outer, "head.weight": outer["head.weight"] * 1000}, blocks)
    text = sample_text(sure, samples=2, length=24, seed=0)
    expected = np.argmax(np.asarray(sure(jnp.asarray(text))), axis=-1)
    drawn = 1 if decoder.config.bos_token_id is None else 2
    np.testing.assert_array_equal(text[:, drawn:], expected[:, drawn - 1 : -1])
