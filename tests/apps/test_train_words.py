"""`sana train` and the order, the data and the settings of its recipes: what is said at the start, and what stays."""

import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from command import TINY_AUTOENCODER, Sana
from PIL import Image

from sana.data import cutouts
from sana.training import drawn_features
from sana.training.config import load_recipe
from sana.training.contents import contents
from sana.training.drawn_features import scene_of
from sana.training.start import start

LORA = """\
objective = "flow_matching"
[run]
steps = 1
batch_size = 2
precision = "float32"
ema = 0.0
evaluate_every = 1
[optimizer]
warmup = 0
[flow_matching]
start = "nano"
train = "lora"
prompts = ["a red fish"]
[flow_matching.data]
path = "pictures"
size = 64
square = true
"""
SPRINT = """\
objective = "sprint"
[run]
steps = 1
batch_size = 2
[sprint]
teacher = "nano"
[sprint.data]
path = "pictures"
size = 64
square = true
"""
AUTOENCODER = """\
objective = "autoencoder"
[run]
steps = 1
batch_size = 2
precision = "float32"
[autoencoder]
data = "pictures"
size = 64
"""
AUTOENCODER += TINY_AUTOENCODER


def write(name: str, text: str) -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(text, encoding="utf-8")
    return name


def draw_pictures(folder: str, count: int = 4, seed: int = 3) -> Path:
    place = Path(folder)
    place.mkdir(exist_ok=True)
    for number in range(count):
        Image.fromarray(cutouts.render(scene_of(seed, number))).save(place / f"{number}.png")
        (place / f"{number}.txt").write_text(f"thing number {number}", encoding="utf-8")
    return place


def everything() -> set[Path]:
    return {path for path in Path().rglob("*") if path.is_file()}


def test_a_recipe_comes_after_those_whose_exports_it_names(sana: Sana, monkeypatch: pytest.MonkeyPatch) -> None:
    from sana.apps.cli.recipes import plan

    flow = '[run]\nsteps = 1\nbatch_size = 1\n[flow_matching]\nfeatures = "../f"\n'
    names = {
        "1-a": "",
        "10-c": 'start = "runs/toy/9-b/export"\n',
        "2-z": "",
        "9-b": 'start = "runs/toy/1-a/export"\ntrain = "lora"\n',
    }
    for name, more in names.items():
        begun = more or 'start = "nano"\n'
        write(f"toy/{name}.toml", f'objective = "flow_matching"\n{flow}{begun}')
    ordered = [stage.name for stage in plan([f"toy/{name}.toml" for name in names], {}, None)]
    assert ordered == ["1-a", "2-z", "9-b", "10-c"]
    autoencoder = dict.fromkeys(("b",), AUTOENCODER)
    later = AUTOENCODER.split("[autoencoder.model]")[0] + 'phase = "latent"\nstart = "../b/export"\n'
    for name, text in {**autoencoder, "a": later}.items():
        write(f"ae/{name}.toml", text)
    assert [stage.name for stage in plan(["ae/a.toml", "ae/b.toml"], {}, None)] == ["b", "a"]


def test_recipes_that_name_each_other_keep_the_order_in_which_they_were_given(sana: Sana) -> None:
    from sana.apps.cli.recipes import plan

    flow = 'objective = "flow_matching"\n[run]\nsteps = 1\nbatch_size = 1\n[flow_matching]\nfeatures = "f"\n'
    for name, other in (("a", "b"), ("b", "a")):
        write(f"toy/{name}.toml", f'{flow}start = "runs/toy/{other}/export"\n')
    assert [stage.name for stage in plan(["toy/b.toml", "toy/a.toml"], {}, None)] == ["b", "a"]


def test_the_stages_of_the_built_in_model_are_trained_in_the_order_of_their_numbers(
    sana: Sana, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sana.apps.cli.recipes import plan

    root = Path(__file__).parents[2] / "recipes" / "nano"
    names = [stage.name for stage in plan(sorted(map(str, root.glob("*.toml"))), {}, None)]
    numbers = [int(name.split("-")[0]) for name in names]
    assert numbers == sorted(numbers)
    assert len(names) == 11


def test_an_export_that_is_moved_is_not_looked_for_where_it_was(sana: Sana) -> None:
    draw_pictures("pictures")
    first = write("toy/a.toml", LORA.replace('"lora"', '"full"'))
    second = write("toy/b.toml", LORA.replace('"nano"', '"runs/toy/a/export"'))
    assert sana("train", first).code == 0
    for more in ((), ("--dry-run",)):
        said = sana("train", first, second, "-o", "elsewhere", *more)
        assert said.code == 2
        told = "b begins from runs/toy/a/export, but with -o the recipe a of this command exports to elsewhere/a/export"
        assert told in said.err
    assert not Path("elsewhere").exists()
    absolute = str(Path("runs/toy/a/export").absolute())
    third = write("toy/c.toml", LORA.replace('"nano"', f'"{absolute}"'))
    (Path("runs/toy/a") / "finished.json").unlink()
    said = sana("train", third, first, "--dry-run", "--json")
    assert [stage["name"] for stage in json.loads(said.out)["stages"]] == ["a", "c"]


def test_a_model_that_no_recipe_makes_is_told_before_the_first_is_trained(sana: Sana) -> None:
    draw_pictures("pictures")
    first = write("toy/a.toml", LORA)
    second = write("toy/b.toml", LORA.replace('"nano"', '"runs/toy/x/export"'))
    said = sana("train", first, second)
    assert said.code == 3
    told = (
        "toy/b.toml, line 11: flow_matching.start: There is no model folder 'runs/toy/x/export', and no recipe of this"
    )
    assert told in said.err
    assert not Path("runs").exists()


def test_weights_that_changed_under_what_was_built_on_them_are_told(sana: Sana) -> None:
    draw_pictures("pictures")
    first = write("toy/a.toml", LORA.replace('"lora"', '"full"'))
    second = write("toy/b.toml", LORA.replace('"nano"', '"runs/toy/a/export"'))
    assert sana("train", first, second).code == 0
    assert json.loads(sana("train", first, second, "--json").out)["warnings"] == []
    shutil.rmtree("runs/toy/a")
    finished = sana("train", first, second, "--optimizer.lr", "0.01", "--json")
    assert [w for w in json.loads(finished.out)["warnings"] if "other weights" in w] == [
        "runs/toy/b was trained from other weights than flow_matching.start names now. It is kept as it is; to train"
        " again, remove it or choose another -o."
    ]
    longer = sana("train", second, "--run.steps", "2")
    assert "goes on although the weights that flow_matching.start names have changed since it began" in longer.err


def test_a_finished_run_lists_what_changed_and_needs_its_files(sana: Sana, monkeypatch: pytest.MonkeyPatch) -> None:
    from sana.training.objectives import autoencoder

    monkeypatch.setattr(autoencoder, "SCALED_PICTURES", 2)
    draw_pictures("pictures")
    recipe = write("toy/a.toml", AUTOENCODER)
    sana("train", recipe)
    draw_pictures("pictures", 5)
    changed = ("--run.seed", "3", "--optimizer.lr", "0.1", "--run.ema", "0.5", "--autoencoder.latent_noise", "0.2")
    settings, data = json.loads(sana("train", recipe, *changed, "--json").out)["warnings"]
    assert "now: run.seed 0 -> 3, run.ema 0.999 -> 0.5, optimizer.lr 0.001 -> 0.1 and 1 more. It is kept" in settings
    assert "autoencoder.data 4 -> 5 samples" in data
    single = json.loads(sana("train", recipe, "--autoencoder.latent_noise", "0.2", "--json").out)["warnings"]
    assert "now: autoencoder.latent_noise (not set) -> 0.2. It is kept" in single[0]
    (weights,) = Path("runs/toy/a/export").glob("*.safetensors")
    weights.unlink()
    assert "finished before" not in sana("train", recipe).err
    assert weights.is_file()


def test_a_trigger_stands_in_the_prompts_of_previews(sana: Sana) -> None:
    draw_pictures("pictures")
    told = LORA.replace('"a red fish"', '"a [trigger] fish"')
    refused = sana("train", write("a.toml", told))
    assert "a.toml, line 13: flow_matching.prompts has [trigger] in it: set flow_matching.data.trigger" in refused.err
    trainer = start(load_recipe("a.toml", {"flow_matching.data.trigger": "sks"}), Path("runs/a"))
    assert trainer.objective.origin.prompts == ("a sks fish",)  # type: ignore[attr-defined]
    trainer.close()


def test_one_folder_is_not_what_is_learnt_and_its_class(sana: Sana) -> None:
    draw_pictures("pictures")
    prior = '[flow_matching.prior]\nprompt = "a thing"\nfolder = "./pictures"\n'
    said = sana("train", write("a.toml", f"{LORA}{prior}"))
    assert "a.toml, line 20: flow_matching.prior.folder is that of flow_matching.data.path, pictures" in said.err


def test_a_system_that_stops_a_run_while_it_is_prepared_is_answered(
    sana: Sana, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw_pictures("pictures")

    def preparing(*_: object) -> None:
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("sana.training.start.start", preparing)
    before = signal.getsignal(signal.SIGTERM)
    said = sana("train", write("a.toml", LORA))
    assert said.code == 75
    assert "a was still being prepared. To go on: sana train a.toml" in said.err
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_finished_run_tells_that_its_data_changed_and_stays_as_it_is(
    sana: Sana, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sana.training.objectives import autoencoder

    monkeypatch.setattr(autoencoder, "SCALED_PICTURES", 2)
    draw_pictures("pictures")
    recipe = write("toy/a.toml", AUTOENCODER)
    assert sana("train", recipe).code == 0
    same = json.loads(sana("train", recipe, "--json").out)
    assert same["warnings"] == []
    weights = Path("runs/toy/a/export/diffusion_pytorch_model.safetensors").read_bytes()
    draw_pictures("pictures", 5)
    (told,) = json.loads(sana("train", recipe, "--json").out)["warnings"]
    assert told.startswith("runs/toy/a was trained on other data than there are now: autoencoder.data 4 -> 5 samples.")
    for picture in Path("pictures").glob("*.png"):
        picture.unlink()
    (told,) = json.loads(sana("train", recipe, "--json").out)["warnings"]
    assert told.startswith("runs/toy/a is kept as it is; what it was trained on cannot be read any more: There is no")
    assert Path("runs/toy/a/export/diffusion_pytorch_model.safetensors").read_bytes() == weights


def test_the_data_of_a_recipe_are_known_without_a_model_as_its_trainer_knows_them(sana: Sana) -> None:
    draw_pictures("pictures")
    draw_pictures("class", 2, seed=5)
    (Path("pictures") / "3.txt").unlink()
    prior = '[flow_matching.prior]\nprompt = "a thing"\nfolder = "class"\ncount = 2\n'
    with_prior = load_recipe(write("a.toml", f'{LORA}caption = "a picture"\n{prior}'))
    trainer = start(with_prior, Path("runs/a"))
    assert trainer.data == contents(with_prior)
    assert set(trainer.data) == {"flow_matching.data", "flow_matching.prior"}
    control = LORA.replace('"lora"', '"controlnet"') + 'controls = "pictures"\ncaption = "x"\n'
    with_maps = load_recipe(write("b.toml", f'{control}[flow_matching.control]\nkind = "map"\nblocks = 1\n'))
    before = contents(with_maps)
    assert start(with_maps, Path("runs/b")).data == before
    pixels = np.zeros((256, 256, 3), np.uint8)
    Image.fromarray(pixels).save("pictures/0.png")
    assert contents(with_maps) != before


def test_a_dry_run_draws_no_class_pictures_computes_no_features_and_writes_nothing(sana: Sana) -> None:
    draw_pictures("pictures")
    prior = '[flow_matching.prior]\nprompt = "a thing"\nfolder = "class"\ncount = 100\n'
    recipe = write("a.toml", f'{LORA}features = "features"\n{prior}')
    before = everything()
    said = sana("train", recipe, "--dry-run", "--json")
    assert said.code == 0, said.err
    assert everything() == before
    assert not Path("class").exists()
    (both,) = json.loads(said.out)["stages"]
    plain = write("b.toml", f'{LORA}features = "features"\n')
    (alone,) = json.loads(sana("train", plain, "--dry-run", "--json").out)["stages"]
    assert both["activations"] > 1.5 * alone["activations"]  # the pictures of the class are learnt beside
    assert everything() == {*before, Path("b.toml")}


def test_a_dry_run_of_the_drawn_world_computes_its_features_nowhere(
    sana: Sana, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drawn_features, "SHARD", 320)
    text = LORA.split("[flow_matching.data]")[0].replace("[flow_matching]", '[flow_matching]\nfeatures = "../features"')
    recipe = write("toy/a.toml", f"{text}scenes = 100000\n")
    before = everything()
    said = sana("train", recipe, "--dry-run")
    assert said.code == 0, said.err
    assert everything() == before


def test_a_dry_run_goes_over_stages_of_which_none_is_trained(sana: Sana) -> None:
    first = write("toy/2-first.toml", LORA.replace('train = "lora"', 'train = "full"'))
    second = LORA.replace('start = "nano"', 'start = "runs/toy/2-first/export"')
    draw_pictures("pictures")
    before = everything()
    said = sana("train", write("toy/10-second.toml", second), first, "--dry-run", "--json")
    assert said.code == 0, said.err
    stages = json.loads(said.out)["stages"]
    assert [stage["name"] for stage in stages] == ["2-first", "10-second"]
    assert stages[1]["frozen"] == stages[0]["weights"]
    assert everything() == {*before, Path("toy/10-second.toml")}


def test_a_dry_run_of_later_phases_begins_from_what_is_there(sana: Sana, monkeypatch: pytest.MonkeyPatch) -> None:
    from sana.training.objectives import autoencoder

    monkeypatch.setattr(autoencoder, "SCALED_PICTURES", 2)
    draw_pictures("pictures")
    phase = AUTOENCODER.split("[autoencoder.model]")[0] + 'phase = "latent"\nstart = "../{}/export"\n'
    stages = [write(f"ae/{name}.toml", phase.format(before)) for name, before in (("b", "a"), ("c", "b"))]
    refused = sana("train", *stages, "--dry-run")
    assert refused.code == 2
    assert "ae/b.toml, line 10: autoencoder.start is not there yet: runs/ae/a/export. Name the recipe" in refused.err
    first = write("ae/a.toml", AUTOENCODER)
    assert sana("train", *stages, first, "--dry-run").code == 0
    assert not Path("runs").exists()
    assert sana("train", first).code == 0
    said = sana("train", *stages, "--dry-run", "--json")
    assert said.code == 0, said.err
    assert [stage["name"] for stage in json.loads(said.out)["stages"]] == ["b", "c"]


@pytest.mark.parametrize(
    ("text", "words", "sentence"),
    [
        (LORA, ("--flow_matching.dat.path", "x"), "--flow_matching.dat.path: flow_matching has no setting 'dat'."),
        (LORA, ("--flow_matching.control.kind", "canny"), "--flow_matching.control.kind: [flow_matching.control]"),
        (LORA, ("--rnu.steps", "3"), "sana: --rnu.steps: 'a.toml' has an unknown table [rnu]. Did you mean 'run'?"),
        (LORA, ("--flow_matching.preview_guidance", "-5"), "preview_guidance must lie from 0 to 100, but is -5.0"),
        (LORA, ("--flow_matching.data.path", "nope"),
         "--flow_matching.data.path: There is no file or folder nope. Check the name."),
        (LORA.replace('"nano"', '"nan0"'), (), "a.toml, line 11: flow_matching.start: There is no model 'nan0'"),
        (LORA.replace('"nano"', '"./x"'), (), "a.toml, line 11: flow_matching.start: There is no model folder './x'"),
        (SPRINT.replace('"nano"', '"nan0"'), (), "a.toml, line 6: sprint.teacher: There is no model 'nan0'"),
        (SPRINT.replace("size = 64\nsquare = true", "size = 300"), (),
         "a.toml, line 9: sprint.data.size: No buckets are published for 300 pixels"),
        (LORA.replace("size = 64\nsquare = true", "size = 300"), (),
         "a.toml, line 16: flow_matching.data.size: No buckets are published for 300 pixels"),
        (LORA.replace('train = "lora"', 'train = "controlnet"'), (),
         "flow_matching.control.blocks is 7, but the transformer has only 6 blocks; copy fewer than that"),
        (LORA.replace('train = "lora"', 'train = "full"\ncard = "nano-sprint"'), (),
         "a.toml, line 13: flow_matching.card is that of nano-sprint, whose guidance_embeds is True, but what is"),
        (f'{LORA}[flow_matching.lora]\ntrigger = "sks"\n', (),
         "a.toml, line 19: flow_matching.lora.trigger is 'sks', but no caption of pictures says it"),
        (f"{LORA}held_out = 9\n", (), "a.toml, line 18: flow_matching.data.held_out is 9, but there are only 4"),
        (LORA.replace('train = "lora"', 'train = "full"\nmodel = { interpolation_scal = 2.0 }'), (),
         "a.toml, line 13: flow_matching.model has no setting 'interpolation_scal'. Did you mean 'interpolation_sc"),
        (LORA.replace('train = "lora"', 'train = "full"\nmodel = { qk_norm = 3 }'), (),
         "a.toml, line 13: flow_matching.model.qk_norm is 3; it must be"),
        (AUTOENCODER.replace("latent_channels", "latent_chanels"), (),
         "a.toml, line 10: autoencoder.model has no setting 'latent_chanels'. Did you mean 'latent_channels'?"),
        (AUTOENCODER.split("[autoencoder.model]")[0], ("--autoencoder.start", "../none"),
         "--autoencoder.start: there is no runs/none. A path that does not begin with / counts"),
        (AUTOENCODER.replace('"pictures"', '"none"'), (), "a.toml, line 7: autoencoder.data: There is no file or"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("error")
def test_what_is_found_while_preparing_names_the_setting_and_its_line(
    sana: Sana, text: str, words: tuple[str, ...], sentence: str
) -> None:
    draw_pictures("pictures")
    said = sana("train", write("a.toml", text), "-o", "runs", *words)
    last = said.err.splitlines()[-1]
    assert said.code in (2, 3), said.err
    assert sentence in last
    assert "Traceback" not in said.err


def test_an_autoencoder_goes_on_from_that_of_a_whole_model(sana: Sana) -> None:
    import sana as package

    draw_pictures("pictures")
    model = Path(package.__file__).parent / "assets" / "nano"
    recipe = write("a.toml", AUTOENCODER.split("[autoencoder.model]")[0])
    trainer = start(load_recipe(recipe, {"autoencoder.start": str(model)}), Path("runs/a"))
    assert trainer.objective.module.autoencoder.config.latent_channels == 32  # type: ignore[union-attr]
    trainer.close()
