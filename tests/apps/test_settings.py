"""Settings in layers: files, variables, flags, their order, their origins, and the way back into a file."""

import io
import json
import tomllib
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from command import Sana
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from sana.apps.cli import settings as layers
from sana.apps.cli.options import keys
from sana.apps.cli.order import Order, parse
from sana.apps.cli.settings import Settings, gather, read_environment, read_toml, to_toml, user_file
from sana.apps.cli.values import Shape
from sana.errors import InvalidInput


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Run without the settings of whoever runs the tests, in an empty folder."""
    monkeypatch.setattr(layers.os, "environ", {"XDG_CONFIG_HOME": str(tmp_path / "home")})
    monkeypatch.chdir(tmp_path)


def written(text: str, name: str = "my.toml") -> Path:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")
    return path


def test_each_layer_goes_over_the_one_before(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    users = user_file()
    assert users == tmp_path / "home" / "sana" / "config.toml"
    written("steps = 1\nguidance = 2\nforce = true\nseed = 5", str(users))
    named = written("# mine\nsteps = 2\nguidance = 3.0\nsampler = 'flow-euler'")
    monkeypatch.setenv("SANA_STEPS", "3")
    monkeypatch.setitem(layers.os.environ, "SANA_STEPS", "3")
    own = gather({"guidance": 4.0}, str(named), keys())
    assert own.values == {
        "steps": 3, "guidance": 4.0, "force": True, "seed": [5], "sampler": "flow-euler"
    }  # fmt: skip
    assert own.origins == {
        "steps": "the variable SANA_STEPS",
        "guidance": "flag",
        "force": f"{users}, line 3",
        "seed": f"{users}, line 4",
        "sampler": "my.toml, line 4",
    }


def test_a_flag_undoes_what_a_file_switches_on() -> None:
    written("force = true\nclean_caption = false\nbinning = false")
    order = parse(["a fox", "--config", "my.toml", "--no-force", "--binning"])
    assert (order.writing.force, order.request.binning) == (False, True)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("stepz = 3", "my.toml, line 1: there is no setting 'stepz'. Did you mean 'steps'?"),
        ("xyzzy = 3", "my.toml, line 1: there is no setting 'xyzzy'. All of them: sana config"),
        ("a = 1\n[steps]\nx = 3", "my.toml, line 1: there is no setting 'a'."),
        ("\n\nsteps = 'many'", "my.toml, line 3: steps takes a whole number, not 'many'."),
        ("steps = 2.5", "steps takes a whole number, not 2.5."),
        ("steps = true", "steps does not take True."),
        ("guidance = '3'", "guidance takes a number, not '3'."),
        ("guidance = [3]", "guidance takes a number, not [3]."),
        ("force = 1", "force takes true or false, not 1."),
        ("sampler = 'dpm'", "sampler must be one of flow-dpm, flow-euler, scm, not 'dpm'. Did you mean 'flow-dpm'?"),
        ("sampler = 3", "sampler takes text in quotes, not 3."),
        ("output = ['a']", "output takes text in quotes, not ['a']."),
        ("size = 1.5", 'size takes a size such as "16:9", not 1.5.'),
        ("size = 'wide'", "size takes a size such as 1024x768"),
        ("seed = {a = 1}", "seed takes seeds such as 7 or [3, 17], not {'a': 1}."),
        ("seed = [3, 3]", "seed names a seed twice"),
        ("guidance_interval = [0.1]", "guidance_interval takes 2 values, not 1."),
        ("guidance_interval = 0.1", "guidance_interval takes another kind of value, not 0.1."),
        ("sweep = 'steps=3,4'", "sweep takes another kind of value, not 'steps=3,4'."),
        ("steps = 3\nsteps = 4", "my.toml is no TOML file (Cannot overwrite a value (at"),
        ("steps = ", "my.toml is no TOML file (Invalid value"),
        ("x = " + "[" * 5000, "my.toml is no TOML file ("),
        ("guidance = 1" + "0" * 400, "guidance takes a number, not one as large as that."),
        ("size = 512\nwidth = 3", "`size` says the same as `width` and `height`. Give the one or the others."),
        ("seed = [3, 4]\ncount = 2", "Drop `count`, or give one `seed`. (`count` is set by my.toml, line 2; `seed` is"),
        ("prompt = 'a'\nprompt_file = 'b'", "There is a prompt and a `prompt_file`."),
        ("steps = 2001", "(`steps` is set by my.toml, line 1.)"),
        ("threads = 0", "`threads` must be a whole number from 1 to 1024 but is 0. (`threads` is set by my.toml, line"),
        ("negative_prompt = 'x'\nguidance = 1", "(`negative_prompt` is set by my.toml, line 1; `guidance` is set by"),
    ],
)
def test_a_wrong_file_is_one_sentence_with_its_place(text: str, sentence: str) -> None:
    written(text)
    with pytest.raises(InvalidInput) as caught:
        parse(["a fox", "--config", "my.toml"])
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (None, "my.toml cannot be read (No such file or directory). Check the name."),
        (b"steps = 3\n# \xff", "my.toml, line 2: this is not UTF-8 text. Save the file as UTF-8."),
        (b"#" * (layers.MOST_BYTES + 1), "my.toml is larger than 1 MB. Split it."),
    ],
)
def test_what_is_no_text_is_refused(data: bytes | None, sentence: str) -> None:
    if data is not None:
        Path("my.toml").write_bytes(data)
    with pytest.raises(InvalidInput) as caught:
        read_toml(Path("my.toml"), keys())
    assert str(caught.value) == sentence


def test_a_byte_order_mark_is_no_fault() -> None:
    Path("my.toml").write_bytes(b"\xef\xbb\xbfsteps = 3\r\n")
    assert read_toml(Path("my.toml"), keys())[0] == {"steps": 3}


def test_variables() -> None:
    told = {
        "SANA_STEPS": " 4", "SANA_FORCE": "Yes", "SANA_BINNING": "off", "SANA_GUIDANCE_INTERVAL": "0.1,0.9",
        "SANA_SWEEP": "steps=4,8;guidance=1", "SANA_SEED": "3,5", "SANA_SIZE": "16:9", "SANA_HOME_OF_OTHERS": "x",
        "PATH": "x",
    }  # fmt: skip
    assert read_environment(told, keys()) == {
        "steps": 4, "force": True, "binning": False, "guidance_interval": [0.1, 0.9],
        "sweep": ["steps=4,8", "guidance=1"], "seed": [3, 5], "size": Shape(width=16, height=9, ratio=True),
    }  # fmt: skip
    for name, text, sentence in [
        ("SANA_STEP", "3", "The variable SANA_STEP sets nothing. Did you mean SANA_STEPS?"),
        ("SANA_FORCE", "maybe", "the variable SANA_FORCE: force takes true or false, not 'maybe'."),
        ("SANA_GUIDANCE_INTERVAL", "1", "the variable SANA_GUIDANCE_INTERVAL: guidance_interval takes 2 v"),
    ]:
        with pytest.raises(InvalidInput) as caught:
            read_environment({name: text}, keys())
        assert str(caught.value).startswith(sentence)


@pytest.mark.parametrize(
    ("below", "above", "left"),
    [
        ({"size": "s"}, {"width": 3}, {"width": 3}),
        ({"width": 3, "height": 4}, {"size": "s"}, {"size": "s"}),
        ({"seed": [3, 4]}, {"count": 2}, {"count": 2}),
        ({"seed": [3]}, {"count": 2}, {"seed": [3], "count": 2}),
        ({"count": 2}, {"seed": [3, 4]}, {"seed": [3, 4]}),
        ({"prompt": "a"}, {"prompt_file": "f"}, {"prompt_file": "f"}),
        ({"prompt_file": "f"}, {"prompt": "a"}, {"prompt": "a"}),
    ],
)
def test_what_contradicts_an_upper_layer_is_dropped(below: Any, above: Any, left: Any) -> None:
    own = Settings().under(below, "a file").under(above, "flag")
    assert own.values == left
    assert set(own.origins) == set(left)


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
seeds = st.lists(st.integers(0, 2**53 - 1), min_size=1, max_size=4, unique=True)
plain = st.fixed_dictionaries(
    {"prompt": texts.filter(lambda text: text.strip() and "\0" not in text and text != "-")},
    optional={
        "negative_prompt": texts.filter(lambda text: "\0" not in text),
        "steps": st.integers(1, 1000),
        "guidance": st.floats(1.5, 100),
        "guidance_interval": st.tuples(st.floats(0, 0.4), st.floats(0.5, 1)).map(list),
        "sampler": st.sampled_from(["flow-dpm", "flow-euler"]),
        "seed": seeds,
        "size": st.builds(Shape, width=st.integers(1, 9999), height=st.integers(1, 9999), ratio=st.booleans()),
        "batch_size": st.integers(1, 9),
        "instruction": st.booleans(),
        "output": st.sampled_from(["a.png", "b/", "ein Ordner", "~"]),
        "metadata": st.sampled_from(["full", "label", "none"]),
        "force": st.booleans(),
        "threads": st.integers(1, 9),
        "sweep": st.just(["max_prompt_tokens=20,30"]),
    },
)


@given(values=plain)
def test_toml_that_is_written_is_read_back_the_same(values: dict[str, Any]) -> None:
    text = to_toml(values)
    assert {name: layers.from_value(keys()[name], value) for name, value in tomllib.loads(text).items()} == values


def facts(order: Order) -> Any:
    jobs = [(job.request, list(job.seeds), list(job.files), job.shape, job.point) for job in order.jobs]
    return jobs, order.machine, order.writing


@examples(max_examples=50)
@given(values=plain, count=st.none() | st.integers(1, 3))
def test_a_printed_configuration_orders_the_same(values: dict[str, Any], count: int | None) -> None:
    from sana.apps.cli.output import Terminal
    from sana.apps.cli.verbs import config

    if count is not None and len(values.get("seed", [])) < 2:
        values = {**values, "count": count}
    written(to_toml(values), "first.toml")
    with patch("secrets.randbelow", return_value=5):
        order = parse(["--config", "first.toml"])
    lines: list[str] = []
    terminal = Terminal()
    terminal.result = lines.append  # type: ignore[method-assign]
    assert config.print_config(order, terminal) == 0
    written("\n".join(lines), "second.toml")
    with patch("secrets.randbelow", return_value=5):
        assert facts(parse(["--config", "second.toml"])) == facts(order)


def test_print_config_of_a_command_line(sana: Sana, no_loading: None, monkeypatch: pytest.MonkeyPatch) -> None:
    said = sana('a "red" fox\n', "--steps", "4", "-s", "3-5", "--size", "256", "--no-instruction", "--print-config")
    assert said.code == 0, said.err
    assert said.out.splitlines() == [
        'prompt = "a \\"red\\" fox\\n"',
        'size = "256x256"',
        "steps = 4",
        'seed = "3-5"',
        "instruction = false",
        "",
        "# as the card of nano has it:",
        "# guidance = 4.5",
        '# sampler = "flow-dpm"',
    ]
    document = json.loads(sana("a fox", "--print-config", "--json").out)
    assert tomllib.loads(document["config"]) == document["settings"]
    assert "seed" not in document["settings"], "a seed that was drawn would be the same from then on"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a fox\n")))
    assert "--print-config cannot name stdin as --prompt-file." in sana("--prompt-file", "-", "--print-config").err


def test_config_shows_every_setting_and_where_it_comes_from(sana: Sana, no_loading: None) -> None:
    written("guidance = 3\nsize = '256'")
    said = sana("config", "--config", "my.toml", "--seed", "3-5")
    assert said.code == 0
    rows = {line.split()[0]: " ".join(line.split()[1:]) for line in said.out.splitlines()}
    assert rows["guidance"] == "3.0 my.toml, line 1"
    assert rows["seed"] == '"3-5" a flag'
    assert rows["steps"] == "20 the card of nano"
    assert rows["size"] == '"256x256" my.toml, line 2'
    assert rows["metadata"] == '"full" the default'
    assert set(rows) == set(keys()) - {"prompt", "width", "height"}
    document = json.loads(sana("config", "--config", "my.toml", "--json", "-m", "sana-1.6b-512").out)
    assert document["settings"]["guidance"] == {"value": 3.0, "origin": "my.toml, line 1"}
    assert document["settings"]["steps"]["origin"] == "the card of sana-1.6b-512"
    assert document["files"] == ["my.toml"]
    assert sana("config", "--steps", "3", "--print-config").out == "steps = 3\n"
    assert sana("config", "a fox").code == 2
    assert sana("config", "--steps", "x").code == 2
