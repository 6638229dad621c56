"""`bench demo`: its table, its plot, its arguments, and a whole run on a tiny model."""

import argparse
import xml.etree.ElementTree as ET

import pytest
from command_line import write_model, write_text

from bench import demo
from bench.__main__ import main

ROWS = [
    {"model": "full precision", "MB": 270.0, "novel": 17.35, "a < b": 30.0},
    {"model": "2 bits", "MB": 50.0, "novel": 42.5, "a < b": 90.0},
    {"model": "3 bits", "MB": 66.7, "novel": 20.1, "a < b": 36.0},
]


def test_the_picture_is_a_line_for_every_text():
    picture = ET.fromstring(demo.make_picture(ROWS, ["novel", "a < b"]))
    name = "{http://www.w3.org/2000/svg}"
    lines = [line.get("points").split() for line in picture.iter(f"{name}polyline")]
    assert [len(points) for points in lines] == [2, 2]
    (x2, y2), (x3, y3) = (map(float, point.split(",")) for point in lines[0])
    assert x2 < x3, "the larger file is further right"
    assert y2 < y3, "and better, so lower"
    assert "a < b; dashed: full precision" in [text.text for text in picture.iter(f"{name}text")]
    one = demo.make_picture(ROWS[:2], ["novel", "a < b"])
    assert "nan" not in one


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--bits", "two"], "--bits: two is not numbers with commas between them"),
        (["--bits", ","], "--bits is empty, expected widths such as 2,3,4"),
        (["--tune", "3", "--bits", "2,4"], "--tune has [3.0], expected some of --bits [2.0, 4.0]"),
        (["--text", "nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_asked(arguments, said, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["demo", *arguments])
    assert said in f"{ended.value.code} {capsys.readouterr().err}"


def test_texts_are_there_and_calibration_has_not_seen_them():
    args = demo.parse(argparse.ArgumentParser(), [])
    assert args.bits == [2.0, 3.0, 4.0]
    assert args.text == list(demo.TEXTS)
    shipped = [part.text for part in demo.calibration.parts(()) if part.text is not None]
    for text in args.text:
        opening = text.read_text("utf-8")[:200]
        assert not any(opening in seen for seen in shipped)


@pytest.mark.slow
def test_all_of_it_on_a_tiny_model(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "WINDOW", 16)
    model, text = write_model(tmp_path / "hf"), write_text(tmp_path / "test.txt", 100, 2)
    arguments = [
        "demo",
        "--source",
        str(model),
        "--out",
        str(tmp_path / "out"),
        "--group-size",
        "32",
        "--bits",
        "2,3",
    ]
    arguments += ["--samples", "8", "--length", "32", "--text", str(text), "--prompt", "w5 w6"]
    main(arguments)
    first = capsys.readouterr().out
    assert "2 bits" in first
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["perplexity.svg", "q2", "q3"]
    main(arguments)  # nothing is quantized again
    lines = [[line for line in out.splitlines() if "|" in line] for out in (first, capsys.readouterr().out)]
    first, again = ([line.split("|")[1:5] for line in some] for some in lines)
    assert again == first
    assert [row[0].strip() for row in again[2:]] == ["full precision", "2 bits", "3 bits"]
