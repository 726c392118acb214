"""Flags and YAML files become dataclasses in the same way with and without torch."""

import re
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from importlib import import_module

import pytest
from sft import SftArguments

from hfllm.errors import InputError
from hfllm.runs.command_line import check_command, parse_recipe
from hfllm.runs.parser import check_words, training_parser


@dataclass
class Flags:
    """Flags of a recipe."""

    name: str = "none"
    growth_rate: float = 0.5
    count: int | None = None
    limit: float | None = None
    is_on: bool = False
    is_kept: bool = True
    sizes: list[int] = field(default_factory=lambda: [1, 2])
    words: list[str] | None = field(default=None, metadata={"help": "Any."})
    kind: str = field(default="a", metadata={"help": "One of two.", "choices": ["a", "b"]})


@dataclass
class Library:
    """Flags that come from a library, which this recipe needs to parse them."""

    library_seed: int = 7


# With a library the parser is TRL's.
LIBRARIES = {"plain": (), "training": (f"{__name__}.Library",)}


@pytest.fixture(params=LIBRARIES)
def parse(request):
    return lambda argv: parse_recipe(argv, "A recipe.", Flags, LIBRARIES[request.param])


@pytest.fixture
def config(tmp_path):
    def write(text, name="config.yaml"):
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    return write


def assert_same(values, expected):
    """Equal and of equal types."""
    assert values == expected
    assert {name: repr(value) for name, value in values.items()} == {n: repr(value) for n, value in expected.items()}


def complaint(parse, *argv):
    with pytest.raises(InputError) as error:
        parse(list(argv))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_flags_become_values_of_their_fields_types(parse):
    assert_same(asdict(parse([])[0]), asdict(Flags()))
    argv = ["--name", "3", "--growth_rate", "1", "--count=4", "--limit", "2e3", "--is_on", "--is_kept", "False"]
    parsed = parse([*argv, "--sizes", "5", "--words", "6", "b c", "--kind", "b"])[0]
    expected = {"name": "3", "growth_rate": 1.0, "count": 4, "limit": 2000.0, "is_on": True, "is_kept": False}
    assert_same(asdict(parsed), {**expected, "sizes": [5], "words": ["6", "b c"], "kind": "b"})
    for argv in (["--is-on", "--no-is-kept"], ["--is_on", "yes", "--no_is_kept"], ["--is_on=1", "--is-kept=F"]):
        parsed = parse([*argv, "--growth-rate", "2"])[0]
        assert (parsed.is_on, parsed.is_kept, parsed.growth_rate) == (True, False, 2.0)
    assert parse(["--is_on", "true", "--is_on", "false"])[0].is_on is False


def test_flags_of_a_library_are_taken_where_it_is_named():
    argv = ["--library_seed", "9", "--count", "1"]
    assert parse_recipe(argv, "", Flags, LIBRARIES["training"]) == (Flags(count=1), Library(9))
    with pytest.raises(InputError, match="unknown flag 'library_seed'"):
        parse_recipe(argv, "", Flags)


def test_a_default_that_is_changed_is_no_default_of_the_next_run(parse):
    parse([])[0].sizes.append(99)
    assert parse([])[0].sizes == [1, 2]


@pytest.mark.parametrize(
    ("yaml", "argv"),
    [
        ("name: 12", ["--name", "12"]),
        ("name: naïve 🦉", ["--name", "naïve 🦉"]),
        ("growth_rate: 1e-3", ["--growth_rate", "1e-3"]),  # text, to YAML
        ("growth_rate: 2", ["--growth_rate", "2"]),
        ("limit: 7", ["--limit", "7"]),
        ("count: null", []),
        ("is_on: true", ["--is_on"]),
        ("is_kept: no", ["--is_kept", "false"]),
        ("sizes: 3", ["--sizes", "3"]),
        ("sizes: [3, 4]", ["--sizes", "3", "4"]),
        ("words: red fox", ["--words", "red fox"]),
        ("words: [red fox, owl]", ["--words", "red fox", "owl"]),
        ("kind: b\ncount: 1", ["--kind", "b", "--count", "1"]),
        ("sizes: ['3', 4]", ["--sizes", "3", "4"]),
        ("words: [1, two]", ["--words", "1", "two"]),
    ],
)
def test_yaml_says_what_flags_say(parse, config, yaml, argv):
    assert_same(asdict(parse(["--config", config(yaml)])[0]), asdict(parse(argv)[0]))


def test_flags_win_over_files_and_later_files_over_earlier_ones(parse, config):
    first, second = config("count: 1\nlimit: 1\nname: first", "a.yaml"), config("count: 2\nlimit: 2", "b.yaml")
    parsed = parse(["--limit", "3", f"--config={first}", "--config", second])[0]
    assert (parsed.name, parsed.count, parsed.limit) == ("first", 2, 3.0)
    assert parse(["--config", second, "--config", first])[0].count == 1


@pytest.mark.parametrize(
    ("argv", "name", "nearest"),
    [
        (["--coutn", "3"], "coutn", "count"),
        (["--coutn=3"], "coutn", "count"),
        (["--size", "3"], "size", "sizes"),  # no abbreviation is taken
        (["--iskept"], "iskept", "is_kept"),
        (["--confg", "a.yaml"], "confg", "config"),
        (["--count", "1", "--growthrate=1", "--coutn", "2"], "growthrate", "growth_rate"),
    ],
)
def test_an_unknown_flag_names_the_nearest(parse, argv, name, nearest):
    assert complaint(parse, *argv) == f"unknown flag {name!r}; did you mean {nearest!r}?"


def test_an_unknown_key_names_its_file_and_the_nearest(parse, config):
    good, bad = config("count: 1", "good.yaml"), config("count: 1\nnam: x", "bad.yaml")
    expected = f"unknown key in {bad}: 'nam'; did you mean 'name'?"
    assert complaint(parse, "--config", good, "--config", bad, "--name", "y") == expected


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--count", "2.5"], ["--count", "int", "'2.5'"]),
        (["--growth_rate", "fast"], ["--growth_rate", "float", "'fast'"]),
        (["--sizes", "1", "x"], ["--sizes", "int", "'x'"]),
        (["--sizes"], ["--sizes", "expected at least one argument"]),
        (["--is_on", "perhaps"], ["--is_on", "true", "false", "perhaps"]),
        (["--kind", "c"], ["--kind", "'c'", "'a', 'b'"]),
        (["--name"], ["--name", "expected one argument"]),
        (["--count", "3", "stray"], ["unexpected argument 'stray'"]),
        (["--config"], ["--config", "no such file"]),
    ],
)
def test_a_value_of_another_type_is_refused_by_its_flag(parse, argv, words):
    message = complaint(parse, *argv)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("yaml", "words"),
    [
        ("count: 2.5", ["--count", "int", "'2.5'"]),
        ("count: true", ["--count", "int", "'True'"]),
        ("count: [1]", ["--count", "int", "'[1]'"]),
        ("count: .nan", ["--count", "int", "'nan'"]),
        ("kind: c", ["--kind", "'c'", "'a', 'b'"]),
        ("sizes: [3, x]", ["--sizes", "int", "'x'"]),
        ("", ["empty; expected a mapping of flags to values"]),
    ],
)
def test_a_value_of_another_type_is_refused_by_its_file(parse, config, yaml, words):
    path = config(yaml)
    message = complaint(parse, "--config", path)
    assert all(word in message for word in [path, *words]), message


@pytest.mark.parametrize(
    ("yaml", "words"),
    [
        ("name: 2001-99-99", "not YAML: '2001-99-99' in line 1 is no timestamp (month must be in 1..12)"),
        ("name: a\n2001-99-99: 1", "not YAML: '2001-99-99' in line 2 is no timestamp"),
        ("name: 2001-12-14t21:59:43.10-99:99", "in line 1 is no timestamp (offset must be"),
        ("name: !!timestamp abc", "not YAML: 'abc' in line 1 is no timestamp"),
        ("is_on: true\ncount: !!int abc", "not YAML: 'abc' in line 2 is no int (invalid literal"),
        ("limit: !!float abc", "not YAML: 'abc' in line 1 is no float (could not convert"),
        ("is_on: !!bool abc", "not YAML: 'abc' in line 1 is no bool"),
        ("count: !!map abc", "not YAML: not enough values to unpack"),
        (f"count: {'9' * 5000}", "in line 1 is no int (Exceeds the limit (4300 digits)"),
        (f"count: 0x{'f' * 5000}", "count: Exceeds the limit (4300 digits)"),
    ],
)
def test_a_value_that_python_cannot_make_is_named_by_its_line(parse, config, yaml, words):
    found = complaint(parse, "--config", config(yaml))
    assert "config.yaml: " in found and words in found and len(found) < 400


def test_a_long_value_is_not_repeated_whole(parse):
    assert len(complaint(parse, "--count", "9" * 5000)) < 400


def test_help_shows_each_flag_with_its_default(parse, capsys):
    for flag in ("--help", "-h", "--help_all"):
        with pytest.raises(SystemExit) as ended:
            parse(["--count", "1", flag, "--no_such_flag"])
        assert ended.value.code == 0
        shown = " ".join(capsys.readouterr().out.split())
        assert "A recipe." in shown and ("Flags of a recipe" in shown or flag == "--help_all")
        assert "One of two. (default: a)" in shown and "--growth_rate" in shown and "--config" in shown
        assert ("--library_seed" in shown) == (flag == "--help_all" and len(parse([])) == 2)


# ---- impossible words, found without the libraries ----


CLASSES = (
    *("trl.SFTConfig", "trl.RewardConfig", "trl.ModelConfig", "transformers.TrainingArguments"),
    *("hfllm.trainers.ppo.config.PPOConfig", "hfllm.trainers.distillation.config.DistillationConfig"),
)


@pytest.mark.parametrize("dotted", CLASSES)
def test_no_flag_of_a_library_is_taken_for_a_misspelt_one(dotted):
    module, _, name = dotted.rpartition(".")
    names = training_parser()([getattr(import_module(module), name)]).names
    assert len(names) > 10
    for flag in names:
        if flag not in ("help", "config"):
            check_words([f"--{flag}", "1"], SftArguments)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--bad_rows", "nope"], "argument --bad_rows: invalid choice: 'nope'"),
        (["--learning_rate", "1e-4", "--num_examples", "many"], "argument --num_examples: invalid int value: 'many'"),
        (["--lerning_rate", "1e-4"], "unknown flag 'lerning_rate'; did you mean 'learning_rate'"),
        (["--dataset-nam=x"], "unknown flag 'dataset-nam'; did you mean 'dataset-name'"),
        (["--max_samples", "0"], "--max_samples 0: expected at least 1"),
        (["--chat_prompts", "true"], "unknown flag 'chat_prompts'"),
    ],
)
def test_impossible_words_are_refused_in_a_moment(words, message):
    with pytest.raises(InputError, match=re.escape(message)):
        check_command(words, SftArguments)
    possible = ["--dataset_name", "x", "--learning_rate", "1e-4", "--config", "nowhere.yaml", "--bf16"]
    check_command(possible, SftArguments)


def test_they_are_refused_before_torch_is_imported():
    code = (
        "import atexit, sys\n"
        "from hfllm.runs.launcher import main\n"
        "atexit.register(lambda: print(sorted({'torch', 'transformers', 'trl'} & sys.modules.keys())))\n"
        "sys.exit(main(['sft', '--bad_rows', 'nope']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "[]\n") and "invalid choice: 'nope'" in done.stderr
