"""The values of `--calibration`: parts, shares, windows."""

import json
from importlib import resources
from types import SimpleNamespace

import numpy as np
import pytest

from convert import calibration
from slim_jax.calibrate import drawn_windows
from slim_jax.eval.windows import draw_windows


def letters(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def write(samples: int, length: int, seed: int) -> np.ndarray:
    return np.full((samples, length), -1 - seed)


def test_parts_and_shares(tmp_path):
    file = tmp_path / "a:b.txt"
    file.write_text("abc", encoding="utf-8")
    found = calibration.parts([str(file), f"{file}:0.5", "self:2"])
    assert found == [(str(file), 1.0, "abc"), (str(file), 0.5, "abc"), ("self", 2.0, None)]
    mix = calibration.parts([])
    assert mix == calibration.parts(["mix"])
    assert [part.name for part in mix] == list(calibration.SHARES)
    assert [part.share for part in calibration.parts(["mix:0.5"])] == [
        s / 2 for s in calibration.SHARES.values()
    ]


@pytest.mark.parametrize("share", ["0", "-1", "nan", "inf"])
def test_a_share_is_positive(tmp_path, share):
    with pytest.raises(ValueError, match=f"the share is {share}, expected a positive number"):
        calibration.parts([f"self:{share}"])


def test_bad_files(tmp_path):
    with pytest.raises(FileNotFoundError):
        calibration.parts([str(tmp_path / "none.txt")])
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.txt is not UTF-8 text"):
        calibration.parts([str(tmp_path / "latin.txt")])


@pytest.mark.parametrize("samples", [1, 2, 7, 64, 100])
def test_counts_are_as_near_to_the_shares_as_can_be(samples):
    mix = calibration.parts(["mix"])
    found = calibration.counts(mix, samples)
    assert sum(found) == samples
    assert all(abs(n - part.share * samples) < 1 for n, part in zip(found, mix))


def test_windows_are_drawn_once(tmp_path, monkeypatch):
    run = SimpleNamespace(complete=False, quantization=None)
    monkeypatch.setattr(drawn_windows, "is_checkpoint", lambda path: run.quantization is not None)
    monkeypatch.setattr(drawn_windows, "read_manifest", lambda path, complete: run)
    tokens, calls = np.arange(12).reshape(3, 4), []

    def windows(recipe: str = "a text") -> drawn_windows.Windows:
        draw = drawn_windows.Draw([recipe, 1], lambda: calls.append(1) or tokens)
        return drawn_windows.Windows.of(draw, None, tmp_path, resume=True)

    first = windows()
    first.keep(tmp_path)
    run.quantization = {"calibration": json.loads(json.dumps(first.fingerprint))}
    again = windows()
    np.testing.assert_array_equal(again.tokens, tokens)
    assert (again.fingerprint, len(calls)) == (first.fingerprint, 1)
    (tmp_path / drawn_windows.KEPT).write_bytes(b"damaged")
    assert (windows().fingerprint, len(calls)) == (first.fingerprint, 2)
    assert windows("another text").fingerprint != first.fingerprint
    run.complete = True
    assert windows() == (None, first.fingerprint)
    assert len(calls) == 3


def test_recipes_tell_texts_apart():
    given = [calibration.Part("a", 1.0, "x"), calibration.Part("self", 0.5, None)]
    other = [calibration.Part("a", 1.0, "y"), given[1]]
    moved = [calibration.Part("b", 1.0, "x"), given[1]]
    assert calibration.recipe(given, 1, 2) == calibration.recipe(moved, 1, 2)
    assert calibration.recipe(given, 1, 2) not in (
        calibration.recipe(other, 1, 2),
        calibration.recipe(given, 1),
    )
    assert calibration.written(given, 6) == 2


def test_windows_are_of_their_parts_and_mixed():
    given = [calibration.Part("self", 1, None), calibration.Part("a.txt", 3, "abcdefgh" * 4)]
    found = calibration.draw(given, letters, write, 8, 8, 5)
    assert found.shape == (8, 8)
    own = np.all(found == -6, axis=1)
    assert own.sum() == 2
    assert not np.all(own[:2])  # both parts occur at the beginning, where validation samples are drawn
    for row in found[~own]:
        assert "".join(map(chr, row)) in "abcdefgh" * 4
    np.testing.assert_array_equal(found, calibration.draw(given, letters, write, 8, 8, 5))
    assert np.any(found != calibration.draw(given, letters, write, 8, 8, 6))


def test_windows_overlap_only_where_there_are_no_others():
    starts = np.sort(draw_windows(np.arange(100), 11, 8, 0)[:, 0])
    assert np.diff(starts).min() >= 8
    many = draw_windows(np.arange(100), 40, 8, 0)
    assert many.shape == (40, 8)
    assert len(np.unique(many[:, 0])) > 20
    assert many.min() >= 0
    assert many.max() <= 99
    np.testing.assert_array_equal(many[:11], draw_windows(np.arange(100), 11, 8, 0))
    assert np.any(many != draw_windows(np.arange(100), 40, 8, 1))
    np.testing.assert_array_equal(draw_windows(np.arange(8), 3, 8, 0), np.arange(8)[None].repeat(3, 0))


def test_a_text_alone_is_drawn_as_it_always_was():
    text = "some text that is long enough"
    found = calibration.draw([calibration.Part("a", 1, text)], letters, write, 4, 6, 3)
    np.testing.assert_array_equal(found, draw_windows(np.asarray(letters(text)), 4, 6, 3))


def test_what_cannot_be_drawn():
    short = [calibration.Part("a.txt", 1, "abc")]
    with pytest.raises(ValueError, match=r"a\.txt has 3 tokens, expected at least 8 \(--length\)"):
        calibration.draw(short, letters, write, 2, 8, 0)
    with pytest.raises(ValueError, match=r"a\.txt needs the model's tokenizer"):
        calibration.draw(short, None, write, 2, 2, 0)


def test_the_shipped_texts_are_small_and_have_a_licence():
    folder = resources.files("convert") / "texts"
    texts = [file for file in folder.iterdir() if file.name.endswith(".txt")]
    assert {file.name.removesuffix(".txt") for file in texts} == set(calibration.SHARES) - {"self"}
    assert sum(len(file.read_bytes()) for file in texts) < 400_000
    licences = (folder / "README.md").read_text(encoding="utf-8")
    assert all(f"`{file.name}`" in licences for file in texts)
