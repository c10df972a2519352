"""Any option may come first, and the sheet of a sweep never takes the place of a picture."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sana.apps.cli import main
from sana.apps.cli.arguments import flags_of
from sana.apps.cli.options import GROUPS


@pytest.mark.parametrize("flag", [name for flag in flags_of(GROUPS) for name in flag.names])
def test_an_option_may_be_the_first_word(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    main([flag, "x" * 300, "x", "y", "z"])  # too many prompts, whatever the option takes
    assert "There is no verb" not in capsys.readouterr().err


def test_a_sheet_does_not_take_the_name_of_a_picture(draw: Any) -> None:
    Path("cat.txt").write_text("cat sweep\n")
    said = draw("--prompt-file", "cat.txt", "--steps", "1", "--sweep", "seed=7,8", "-o", "s/", "--force")
    assert said.code == 0, said.err
    assert len(set(said.out.split())) == len(said.out.split()) == 3
    sizes = []
    for file in said.out.split():
        with Image.open(file) as picture:
            sizes.append(picture.size)
    assert sizes[0] == sizes[1] != sizes[2]
