"""Presets, and how `--set` parses a name and a value."""

import dataclasses
import re
from pathlib import Path

import pytest

from convert.cli.settings import make_rules, make_settings, parse_setting, settable
from slim_jax import SlimConfig
from slim_jax.config import PRESETS
from slim_jax.rules import KINDS, Rule

USAGE = Path(__file__).parents[1] / "docs/usage.md"


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        ("damping=0.02", ("damping", 0.02)),
        ("bits = 3", ("bits", 3.0)),
        ("epochs=4", ("epochs", 4)),
        ("sequential=true", ("sequential", True)),
        ("tune=False", ("tune", False)),
        ("tune=none", ("tune", None)),
        ("sqc=paper", ("sqc", "paper")),
    ],
)
def test_a_setting_has_the_type_of_its_field(item, expected):
    name, value = parse_setting(item)
    assert (name, value) == expected
    assert type(value) is type(expected[1])


@pytest.mark.parametrize(
    "item", ["damping=inf", "damping=nan", "epochs=none", "=1", "epochs=", "learn_rate=1"]
)
def test_other_settings_are_refused(item):
    with pytest.raises(ValueError, match=f"^--set {item}: "):
        parse_setting(item)


def test_presets_in_python_and_on_the_command_line():
    for name in PRESETS:
        assert make_settings(name, ["damping=0.02"], bits=2.5) == SlimConfig.preset(
            name, damping=0.02, bits=2.5
        )
    assert make_settings(None, []) == SlimConfig()
    assert SlimConfig().resolved() == SlimConfig.preset("good").resolved()
    assert SlimConfig.preset("best").resolved() == SlimConfig(method="slim-plus").resolved()
    assert SlimConfig.preset("fast") == SlimConfig(tune=False)
    with pytest.raises(ValueError, match="preset is 'slow'"):
        SlimConfig.preset("slow")


def test_a_method_that_is_named_is_not_tuned_by_the_default_preset():
    assert make_settings(None, ["method=gptq"]) == SlimConfig(method="gptq")
    assert make_settings(None, ["sqc=paper"]) == SlimConfig(sqc="paper")
    assert not SlimConfig(method="gptq").resolved().tune
    assert make_settings("good", ["method=gptq"]) == SlimConfig(method="gptq", tune=True)


def test_settings_are_what_was_asked_for():
    config = SlimConfig(bits=3.0, method="gptq", rules=[("a", {"bits": 4.0})])
    others = {"bits", "method", "rules"}
    plain = SlimConfig()
    assert all(value == getattr(plain, name) for name, value in vars(config).items() if name not in others)
    assert dataclasses.replace(config, method="slim").resolved().damping == plain.resolved().damping
    none = [name for name, value in vars(config.resolved()).items() if value is None]
    assert none == ["tune_samples"]


@pytest.mark.parametrize("whole", [{}, {"method": "rtn"}, {"method": "gptq", "damping": 0.02, "bits": 4}])
@pytest.mark.parametrize(
    "change",
    [{"method": "gptq"}, {"method": "rtn", "bits": 3}, {"method": "slim"}, {"sqc": "paper"}, {"bits": 5}],
)
@pytest.mark.parametrize("decoder", [True, False])
def test_a_rule_gives_layers_what_it_would_give_a_model(whole, change, decoder):
    ruled = SlimConfig(**whole, rules=[("a", change)]).resolved(decoder=decoder)
    wanted = SlimConfig(**{**whole, **change}).resolved(decoder=decoder)
    assert ruled.of_layer("a") == wanted
    assert ruled.corrects == (SlimConfig(**whole).resolved().asymmetric + wanted.asymmetric > 0)
    assert ruled.of_layer("b") is ruled


def test_runs_have_settings_in_common_by_what_they_come_to():
    rules = [("a", {"sqc": "search"}), ("b", "skip")]
    one = SlimConfig(method="gptq", rules=rules)
    explicit = SlimConfig(method="gptq", damping=0.01, rules=rules)  # the default, but not under a rule
    assert SlimConfig(method="gptq").resolved() == SlimConfig(method="gptq", damping=0.01).resolved()
    assert one.resolved().to_json() != explicit.resolved().to_json()
    found, skipped = one.resolved().to_json()["rules_resolved"]
    assert found == {"sqc": "search", "asymmetric": 0.5, "damping": 0.1, "refine": 2}
    assert skipped is None
    fields = {field.name for field in dataclasses.fields(SlimConfig)}
    assert SlimConfig().resolved().to_json().keys() == fields  # unchanged, so that runs without rules resume


def test_the_table_in_the_docs_names_every_setting():
    rows = re.findall(r"^\| `(\w+)` \|.*\| ([^|]+) \|$", USAGE.read_text(), re.MULTILINE)
    assert [name for name, _ in rows] == list(settable())
    defaults = {field.name: field.default for field in dataclasses.fields(SlimConfig)}
    for name, said in rows:
        default = defaults[name]
        if isinstance(default, bool):
            assert said == str(default).lower()
        elif isinstance(default, int | float):
            assert float(said) == default
        elif default is not None:
            assert said == f"`{default}`"


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        ("blocks.0.*: skip", Rule("blocks.0.*", skip=True)),
        ("*.down:bits=3,group_size = 64", Rule("*.down", bits=3, group_size=64)),
        ("re:(?:a|b).q: method=gptq, bits=4", Rule("re:(?:a|b).q", bits=4, method="gptq")),
    ],
)
def test_a_rule_of_the_command_line(item, expected):
    assert make_rules([item], None) == (expected,)


def test_a_file_of_rules_comes_after_those_of_the_command_line(tmp_path):
    file = tmp_path / "rules.toml"
    file.write_text(
        '[[rule]]\npattern = "a"\nskip = true\n\n[[rule]]\npattern = "b"\nbits = 2.5\nsqc = "minmax"\n'
    )
    found = make_rules(["c: damping=0.1"], file)
    assert found == (Rule("c", damping=0.1), Rule("a", skip=True), Rule("b", bits=2.5, sqc="minmax"))
    assert make_settings(None, [], rules=found).rules == found
    assert make_rules(None, None) is None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[[rule]", "is not TOML"),
        ("", "has no rules, expected tables \\[\\[rule\\]\\]"),
        ("rule = 1", "expected tables"),
        ("rules = []", "has 'rules', expected tables"),
        ("[[rule]]\nskip = true", "rule 1 has no pattern"),
        ('[[rule]]\npattern = "a"\nbit = 3', "rules.toml: rule 'a': there is no option 'bit'"),
        ('[[rule]]\npattern = "a"\nbits = "3"', "rules.toml: rule 'a': bits is '3', expected a number"),
        ('[[rule]]\npattern = "a"', "it says nothing"),
    ],
)
def test_files_that_are_no_rules(tmp_path, text, says):
    (tmp_path / "rules.toml").write_text(text)
    with pytest.raises(ValueError, match=says):
        make_rules(None, tmp_path / "rules.toml")


def test_the_docs_name_every_option_of_a_rule():
    table = USAGE.read_text().partition("### Rules")[2].partition("## Writing")[0]
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == list(KINDS)


@pytest.mark.parametrize(
    ("bits", "widths", "mean"),
    [
        (1.5, (1, 2, 3, 4), 1.5),
        (2, (2,), 2),
        (2.125, (2, 3, 4), 2.125),
        (3.5, (3, 4), 3.5),
        (3.75, (3, 4, 5, 6), 3.6875),  # zero points take 8 bits, not 4
        (4, (4,), 4),
        (4.01, (4, 5, 6, 7), 4.01),
        (6.5, (6, 7, 8), 6.5),
    ],
)
def test_widths_begin_at_the_mean(bits, widths, mean):
    config = SlimConfig(bits=bits, group_size=64).resolved()
    assert (config.widths, config.mean_width) == (widths, mean)


def test_the_rate_of_tuning_goes_with_the_bits():
    rates = {bits: SlimConfig(bits=bits).resolved().tune_rate for bits in (1.5, 2, 2.5, 3, 3.125, 4.5)}
    assert rates == {1.5: 2e-3, 2: 2e-3, 2.5: 2e-3, 3: 5e-4, 3.125: 5e-4, 4.5: 1.25e-4}
    assert SlimConfig(bits=4, tune_rate=0.01).resolved().tune_rate == 0.01
