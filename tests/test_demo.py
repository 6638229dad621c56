"""`bench demo`: its table, its plot, its arguments, and a whole run on a tiny model."""

import argparse
import xml.etree.ElementTree as ET

import pytest
from command_line import write_model, write_text

from bench import demo
from bench.__main__ import main

ROWS = [
    demo.Row("full precision", 270_000_000, 16.0, (17.35, 30.0), " …", 12.0),
    demo.Row("2 bits", 50_000_000, 2.319, (42.5, 90.0), " …", 200.4),
    demo.Row("3 bits", 66_700_000, 3.319, (20.1, 36.0), " …", 198.6),
]


def test_a_row_for_every_model():
    dense, two, _ = [list(demo.record(row, ROWS[0], ["novel", "manual"]).values()) for row in ROWS]
    assert dense[:4] == ["full precision", 270.0, "100.0%", 16.0]
    assert two[:-1] == ["2 bits", 50.0, "18.5%", 2.319, 42.5, 90.0, 200]


def test_the_picture_is_a_line_for_every_text():
    picture = ET.fromstring(demo.make_picture(ROWS, ["novel", "a < b"]))
    name = "{http://www.w3.org/2000/svg}"
    lines = [line.get("points").split() for line in picture.iter(f"{name}polyline")]
    assert [len(points) for points in lines] == [2, 2]
    (x2, y2), (x3, y3) = (map(float, point.split(",")) for point in lines[0])
    assert x2 < x3, "the larger file is further right"
    assert y2 < y3, "and better, so lower"
    assert "a < b; dashed: full precision" in [text.text for text in picture.iter(f"{name}text")]
    one = demo.make_picture([ROWS[0], ROWS[1]], ["novel", "manual"])
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
    assert [line.split("|")[:7] for line in capsys.readouterr().out.splitlines() if "|" in line] == [
        line.split("|")[:7] for line in first.splitlines() if "|" in line
    ]
