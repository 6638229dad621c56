"""`bench.results` and `bench.__main__`: tables, files and names of the commands."""

import json
import math

import pytest

from bench.__main__ import commands, main
from bench.results import Results, cell, line

ROWS = [
    {"product": "packed [2, 3]", "us": 12.345, "kernels": {"a": 1.0}, "error": None, "spread": math.inf},
    {"product": "bf16", "us": 1234.5, "launches": 3, "ok": False},
]


def test_a_table_and_a_file(tmp_path, capsys):
    file = tmp_path / "found.json"
    results = Results(file, device="a")
    assert results.show("rows", (row for row in ROWS)) == ROWS
    out, err = capsys.readouterr()
    rows = [[value.strip() for value in row.split("|")[1:-1]] for row in out.strip().splitlines()]
    assert rows[0] == ["product", "us", "spread", "launches", "ok"]
    assert rows[2:] == [["packed [2, 3]", "12.35", "inf", "", ""], ["bf16", "1,234", "", "3", "NO"]]
    assert err.splitlines() == [line(row) for row in ROWS]
    stored = json.loads(file.read_text())
    assert stored["device"] == "a"
    assert stored["rows"] == [ROWS[0] | {"spread": "inf"}, ROWS[1]]
    assert list(tmp_path.iterdir()) == [file]


def test_what_is_there_stays_when_the_next_record_fails(tmp_path, capsys):
    def fails():
        yield ROWS[1]
        raise OSError("the device is gone")

    with pytest.raises(OSError, match="gone"):
        Results(tmp_path / "found.json").show("rows", fails())
    assert "bf16" in capsys.readouterr().out
    assert json.loads((tmp_path / "found.json").read_text()) == {"rows": [ROWS[1]]}


@pytest.mark.parametrize(
    ("value", "text"), [(0.00123456, "0.001235"), (1e6, "1,000,000"), (12, "12"), ("a", "a"), (True, "yes")]
)
def test_cells(value, text):
    assert cell(value) == text


def test_commands_are_found_and_explained(capsys):
    assert {"aot", "check", "decode", "demo", "device", "matmul", "peers", "quantize"} <= commands().keys()
    for given, said in ((["--help"], "Packed and dense products"), (["decode", "--help"], "--json FILE")):
        with pytest.raises(SystemExit) as ended:
            main(given)
        assert not ended.value.code
        assert said in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["nothing"])
    assert "invalid choice: 'nothing'" in capsys.readouterr().err
