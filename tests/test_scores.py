"""Scores: log-probabilities against float64, texts against `generate`, and the harness if installed."""

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command_line import WORDS, refused, said, write_model
from flax import nnx
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from convert.cli import run
from convert.errors import ConvertError
from convert.readers.load import load_source
from slim_jax.eval import likelihood
from slim_jax.eval.likelihood import judge
from slim_jax.eval.perplexity import Reader
from slim_jax.infer.generate import generate
from slim_jax.model.config import DecoderConfig
from slim_jax.model.decoder import Decoder
from slim_jax.model.rotary import RopeScaling
from slim_jax.store.source import read_decoder

CONFIG = DecoderConfig("llama", 64, 32, 48, 2, 2, 1, 16, 40, eos_token_ids=(2,))


@pytest.fixture(scope="module")
def model() -> Decoder:
    decoder = Decoder(CONFIG, rngs=nnx.Rngs(0))
    decoder.embed.set_value(decoder.embed.get_value() * 30)  # so that the likeliest token depends on the text
    return decoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("scores") / "hf")


@pytest.fixture(scope="module")
def words(folder: Path) -> Any:
    return load_source(folder).tokenizer


@pytest.fixture(scope="module")
def scores_class() -> type:
    return pytest.importorskip("convert.scores", exc_type=ModuleNotFoundError).Scores  # needs lm_eval


@pytest.fixture(scope="module")
def scores(scores_class: type, model: Decoder, words: Any) -> Any:
    return scores_class(model, words)


def asked(*args: Any) -> SimpleNamespace:
    """Stands for the harness's Instance."""
    return SimpleNamespace(args=args)


@jax.jit
def forward(model: Decoder, tokens: jax.Array) -> jax.Array:
    return model(tokens)


def log_softmax(model: Decoder, tokens: list[int]) -> np.ndarray:
    filled = jnp.asarray([tokens + [0] * (40 - len(tokens))], jnp.int32)  # one program for all
    logits = np.asarray(forward(model, filled), np.float64)[0, : len(tokens)]
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def expected(model: Decoder, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """Log-probability of a pair, and whether it is greedy, from one pass over it alone."""
    tokens = [*context, *continuation][-(model.config.max_positions + 1) :]
    log_p = log_softmax(model, tokens[:-1])[-len(continuation) :]
    chosen = log_p[np.arange(len(continuation)), continuation]
    return float(chosen.sum()), bool((log_p.argmax(-1) == continuation).all())


def text_of(ids: list[int]) -> str:
    return " ".join(WORDS[i] for i in ids)


def draw(rng: np.random.Generator, count: int) -> list[int]:
    return rng.integers(3, 64, count).tolist()


@pytest.mark.parametrize("batch_tokens", [16, 64, 8192])
def test_pairs_of_any_length_in_their_order(batch_tokens, model):
    """Pairs that do not fit are cut at their beginning, one of them almost to the continuation alone."""
    rng = np.random.default_rng(0)
    sizes = [(3, 2), (20, 17), (1, 1), (17, 1), (39, 1), (40, 1), (70, 9), (2, 5), (30, 40)]
    pairs = [(draw(rng, a), draw(rng, b)) for a, b in sizes]
    context = draw(rng, 6)
    pairs.append((context, generate(model, [context], max_tokens=4, stop=[])[0]))
    done: list[int] = []
    found = judge(Reader(model), pairs, batch_tokens=batch_tokens, on_judged=done.append)
    wanted = [expected(model, *pair) for pair in pairs]
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]
    assert found[-1].greedy
    np.testing.assert_allclose([p for p, _ in found], [p for p, _ in wanted], rtol=1e-5)
    assert sum(done) == len(pairs)


def test_pairs_that_cannot_be(model):
    reader = Reader(model)
    for pair in (([], [3]), ([3], [])):
        with pytest.raises(ValueError, match="pair 0 has no context or no continuation"):
            judge(reader, [pair])
    with pytest.raises(ValueError, match="continuation 0 has 41 tokens, the model 40 positions"):
        judge(reader, [([3], [4] * 41)])
    assert judge(reader, []) == []


def test_a_width_does_not_reach_beyond_where_frequencies_change():
    scaling = RopeScaling("longrope", 1.0, original_max_positions=20)
    config = DecoderConfig("phi3", 64, 32, 48, 1, 2, 1, 16, 40, rope_scaling=scaling)
    assert [likelihood._width(config, n) for n in (3, 17, 20, 21, 33, 40)] == [16, 20, 20, 32, 40, 40]


def test_log_likelihoods(scores, model):
    rng = np.random.default_rng(1)
    pairs = [(draw(rng, a), draw(rng, b)) for a, b in [(5, 3), (1, 1), (30, 20), (8, 2)]]
    requests = [asked(text_of(context), " " + text_of(after)) for context, after in pairs]
    found = scores.loglikelihood(requests)
    wanted = [expected(model, *pair) for pair in pairs]
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]
    np.testing.assert_allclose([p for p, _ in found], [p for p, _ in wanted], rtol=1e-5)


def test_no_context_is_the_first_token(scores, model):
    (alone,) = scores.loglikelihood([asked("", "w5 w6")])
    assert alone[0] == pytest.approx(expected(model, [1], [5, 6])[0], rel=1e-5)
    assert scores.loglikelihood([asked("", "<s> w5 w6"), asked("  ", "w5 w6")]) == [alone, alone]


def letters(*merges: tuple[str, str], **special: str) -> Any:
    """A tokenizer of letters and the merges of them."""
    vocab = ["<s>", *"abc ", *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(vocab)}, list(merges)))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", **special)


def test_borders_between_tokens(scores_class, model, monkeypatch):
    scores = scores_class(model, letters((" ", "b"), ("c", "a")))
    judged: list[Any] = []

    def keep(what: str, pairs: list[Any]) -> list[tuple[float, bool]]:
        judged.extend(pairs)
        return [(0.0, True)] * len(pairs)

    monkeypatch.setattr(scores, "_judge", keep)
    a, b, c, space_b = 1, 2, 3, 5
    texts = [("a", " b"), ("a ", "b"), ("ab", "c"), ("bc", "ab"), ("<s>a", "b")]
    scores.loglikelihood([asked(*pair) for pair in texts])
    # A space goes with the word; after a token that crosses the border the context is as it is alone.
    assert judged == [([a], [space_b]), ([a], [space_b]), ([a, b], [c]), ([b, c], [b]), ([0, a], [b])]
    with pytest.raises(ConvertError, match="the continuation 'a' has no tokens of its own after 'bc'"):
        scores.loglikelihood([asked("bc", "a")])


def test_rolling_predicts_every_token_once(scores, model):
    """Windows of 40 tokens, the last with as long a context as the positions allow."""
    rng = np.random.default_rng(2)
    texts = [draw(rng, n) for n in (5, 40, 41, 97)]
    found = scores.loglikelihood_rolling([asked(text_of(ids)) for ids in [*texts, []]])
    for ids, value in zip(texts, found):
        begun, total = [1, *ids], 0.0
        for start in range(0, len(ids), 40):
            end = min(start + 40, len(ids))
            context = begun[end - 40 : start + 1] if start else begun[:1]
            total += expected(model, context, ids[start:end])[0]
        assert value == pytest.approx(total, rel=1e-5)
    assert found[-1] == 0.0


def test_texts_are_those_of_generate(scores, model):
    rng = np.random.default_rng(3)
    prompts = [draw(rng, n) for n in (4, 9, 2, 60, 17)]
    requests = [asked(text_of(ids), {"until": [], "max_gen_toks": 8}) for ids in prompts]
    requests[2].args[1]["max_gen_toks"] = 5
    found = scores.generate_until(requests)
    written = generate(model, [ids[-32:] for ids in prompts], max_tokens=8)
    written[2] = written[2][:5]
    assert found == [scores.tokenizer.decode(ids, skip_special_tokens=True) for ids in written]
    first = found[0].split()
    assert len(first) > 3
    stop = {"until": first[2], "max_tokens": 8, "temperature": 0.7, "do_sample": False}
    (cut,) = scores.generate_until([asked(text_of(prompts[0]), stop)])
    assert cut == found[0][: found[0].find(first[2])]


def test_drawn_texts_differ_from_the_likeliest(scores):
    likeliest, drawn = (
        scores.generate_until(
            [asked("w5 w6", {"until": [], "max_gen_toks": 12, "do_sample": flag, "temperature": 9.0})]
        )
        for flag in (False, True)
    )
    assert likeliest != drawn


def test_answers_are_those_of_the_harness_own_model(scores_class, folder, words):
    """For each kind of request, the answers of the harness's own model in `goldens/make_scores.py`."""
    golden = json.loads((Path(__file__).parent / "goldens/scores.json").read_text())
    model = scores_class(read_decoder(load_source(folder, dtype="float32")), words)
    for kind, pairs in golden.items():
        requests, wanted = zip(*pairs)
        found = getattr(model, kind)([asked(*request) for request in requests])
        if kind == "generate_until":
            assert found == list(wanted)
        else:
            values = [np.asarray(answers, np.float64) for answers in (found, wanted)]
            np.testing.assert_allclose(*values, rtol=1e-4, atol=1e-5)


def test_a_text_longer_than_the_model(scores):
    with pytest.raises(ConvertError, match="a task asks for 256 tokens, the model has 40 positions"):
        scores.generate_until([asked("w5", {"until": ["\n"]})])


def test_without_the_harness(folder, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "lm_eval" else find(name, *a)
    )
    line = refused(capsys, "eval", folder, "--tasks", "arc_easy")
    assert line.endswith("scores need the package lm_eval: pip install 'slim-jax[scores]'")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "expected either --text or --tasks"),
        (["--text", "a.txt", "--tasks", "b"], "expected either --text or --tasks"),
        (["--tasks", "b", "--against", "c"], "--against goes with --text"),
        (["--text", "a.txt", "--limit", "3"], "--limit, --fewshot and --tasks-folder go with --tasks"),
        (["--tasks", " , "], "--tasks names no task"),
        (["--tasks", "b", "--tasks-folder", "nowhere"], "--tasks-folder: nowhere is not a directory"),
    ],
)  # fmt: skip
def test_what_eval_is_asked_for(arguments, said, folder, capsys):
    assert said in refused(capsys, "eval", folder, *arguments)


TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
{more}
"""
TASKS = {
    "choosing": """
output_type: multiple_choice
doc_to_choice: "{{choices}}"
metric_list:
  - metric: acc
""",
    "reading": """
output_type: loglikelihood_rolling
metric_list:
  - metric: word_perplexity
""",
    "writing": """
output_type: generate_until
generation_kwargs:
  until: ["w9"]
  max_gen_toks: 4
metric_list:
  - metric: exact_match
""",
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_harness_itself(folder, tmp_path, capsys, monkeypatch):
    """Runs a local task of each kind with the command, and checks the results."""
    pytest.importorskip("datasets")
    import lm_eval
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    model = read_decoder(load_source(folder))
    rng = np.random.default_rng(4)
    questions = [draw(rng, 5) for _ in range(6)]
    choices = [[draw(rng, 2) for _ in range(3)] for _ in questions]
    best = [
        max(range(3), key=lambda i, own=own, ids=ids: expected(model, ids, own[i])[0])
        for ids, own in zip(questions, choices)
    ]
    answers = [i if n % 3 else (i + 1) % 3 for n, i in enumerate(best)]  # four of six match the model
    written = generate(model, questions, max_tokens=4)
    rows = {
        "choosing": [
            {"question": text_of(ids), "choices": list(map(text_of, own)), "answer": answer}
            for ids, own, answer in zip(questions, choices, answers)
        ],
        "writing": [
            {"question": text_of(ids), "answer": text_of([i for i in after if i > 2]).partition("w9")[0]}
            for ids, after in zip(questions, written)
        ],
        "reading": [{"question": text_of(ids), "answer": text_of(ids)} for ids in questions],
    }
    for name, more in TASKS.items():
        data = tmp_path / f"{name}.json"
        data.write_text("\n".join(map(json.dumps, rows[name])))
        (tmp_path / f"{name}.yaml").write_text(TASK.format(name=name, data=data, more=more))
    arguments = ["eval", folder, "--tasks", ",".join(TASKS), "--tasks-folder", tmp_path, "--fewshot", 0]
    found = json.loads(said(capsys, *arguments, "--json"))["tasks"]
    assert found["choosing"]["acc,none"] == pytest.approx(4 / 6)
    assert found["writing"]["exact_match,none"] == 1.0
    loss = -sum(expected(model, [1], ids)[0] for ids in questions) / sum(map(len, questions))
    assert found["reading"]["word_perplexity,none"] == pytest.approx(np.exp(loss), rel=1e-4)
    lines = said(capsys, *arguments[:3], "choosing", *arguments[4:6], "--limit", 3).splitlines()
    assert lines[0].startswith("choosing: acc 0.6667 ± ")
    unknown = "lm_eval has no task chosing, near names: choosing"
    capsys.readouterr()
    assert run(["eval", str(folder), "--tasks", "chosing", "--tasks-folder", str(tmp_path)]) == 2
    assert unknown in capsys.readouterr().err
    own = TaskManager(include_path=str(tmp_path))
    results = lm_eval.simple_evaluate(
        "slim-jax", {"pretrained": str(folder)}, tasks=["choosing"], limit=3, task_manager=own
    )["results"]
    assert results["choosing"]["acc,none"] == pytest.approx(2 / 3)
    assert "torch" not in sys.modules
