"""What saving leaves behind when it is killed or the disk fails, what it flushes when, and how much memory is taken."""

import errno
import json
import os
import random
import signal
import stat
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tiny_pipeline import FILE, INDEX, TRANSFORMER, load, parts, same, stir, transformer

from clock import wall_seconds
from sana.checkpoints import storage
from sana.checkpoints import tensors as tensors_module
from sana.checkpoints.folder import load_parts, save_parts
from sana.checkpoints.pretrained import SanaTransformer2DModel
from sana.checkpoints.storage import SAVED, STAGE, finish, publish, recover, saving, sweep, write_json
from sana.errors import CheckpointError, InvalidInput, ModelNotFound, NonFinite

posix = pytest.mark.skipif(os.name != "posix", reason="needs fork and kill")
SHARDS = {"max_shard_size": "30KB"}


def model(number: int) -> SanaTransformer2DModel:
    """Return one of many models that differ in every tensor."""
    made: SanaTransformer2DModel = stir(transformer(), seed=100 + number)
    return made


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob(".*"))


# --- memory -----------------------------------------------------------------------------------------------------------


def peak_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux to measure peak memory")
def test_loading_peaks_at_about_one_copy(tmp_path: Path) -> None:
    wide = {"num_attention_heads": 64, "cross_attention_dim": 512, "num_layers": 5, "caption_channels": 512}
    big = SanaTransformer2DModel(**{**TRANSFORMER, **wide})
    big.save_pretrained(tmp_path)
    size = sum(weight.numel() * 4 for weight in big.parameters())
    assert size > 70_000_000
    del big
    load(tmp_path)  # warm: lazily loaded code counts too
    Path("/proc/self/clear_refs").write_text("5")
    before = peak_bytes()
    again = load(tmp_path)
    assert (peak_bytes() - before) / size < 1.25
    assert again.num_parameters() * 4 == size


# --- D47: killed ------------------------------------------------------------------------------------------------------


@contextmanager
def forked(work: Callable[[], object]) -> Iterator[int]:
    """Run `work` in a forked process for the length of the block."""
    process = os.fork()
    if process == 0:
        try:
            work()
        except BaseException as error:
            sys.stderr.write(f"{type(error).__name__}: {error}\n")
            os._exit(1)
        os._exit(0)
    yield process


def kill_while(work: Callable[[], object], after: float) -> None:
    with forked(work) as process:
        time.sleep(after)
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)


@posix
def test_a_save_killed_at_any_moment_leaves_the_old_model_or_the_new_one(tmp_path: Path) -> None:
    folder, rng = tmp_path / "model", random.Random(0)
    models = [model(number) for number in range(4)]
    models[0].save_pretrained(folder, **SHARDS)
    once, seen, current = wall_seconds(lambda: models[1].save_pretrained(folder)), set(), 1
    number = 0
    while number < 80 or (len(seen) < 2 and number < 800):  # a busy machine may need more of them
        following = (current + 1 + number % 3) % 4
        options = SHARDS if following % 2 else {}
        kill_while(
            lambda new=following, options=options: models[new].save_pretrained(folder, **options),
            rng.random() * 2 ** (number % 6) * once,  # a busy machine needs many times as long
        )
        found = load(folder)
        matching = [index for index, each in enumerate(models) if same(found, each)]
        assert matching in ([current], [following]), number
        seen.add(matching == [following])
        current, number = matching[0], number + 1
    assert seen == {True, False}, "some saves must have been killed before, and some after they took place"
    models[0].save_pretrained(folder)
    assert hidden(folder) == []


@posix
def test_a_pipeline_killed_while_it_is_saved_is_the_old_one_or_the_new_one(tmp_path: Path) -> None:
    folder, rng, whole = tmp_path / "model", random.Random(1), parts()
    kinds = [{**whole, "transformer": model(number)} for number in range(2)]
    for number in range(2):
        once = wall_seconds(partial(save_parts, folder, kinds[number], max_shard_size="30KB" if number else None))
    current = 1
    for number in range(20):
        kill_while(
            lambda new=1 - current: save_parts(folder, kinds[new], max_shard_size="30KB" if new else None),
            rng.random() * 1.5 * once,
        )
        found = load_parts(folder)
        matching = [index for index, kind in enumerate(kinds) if same(found["transformer"], kind["transformer"])]
        assert len(matching) == 1, number
        assert same(found["vae"], whole["vae"])
        current = matching[0]


def interrupted(folder: Path, moves: int, monkeypatch: pytest.MonkeyPatch, save: Callable[[], object]) -> None:
    """Stop a save after so many of its files were moved into their places."""
    real, done = os.replace, []

    def replace(source: Any, target: Any) -> None:
        if SAVED in Path(source).parts:
            if len(done) == moves:
                raise KeyboardInterrupt
            done.append(target)
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            save()


@pytest.mark.parametrize("moves", [0, 1, 2, 3, 4])
def test_a_save_that_took_place_is_finished_by_whoever_looks_next(
    saved: Path, monkeypatch: pytest.MonkeyPatch, moves: int
) -> None:
    new = model(1)
    interrupted(saved, moves, monkeypatch, lambda: new.save_pretrained(saved, **SHARDS))
    assert (saved / SAVED).is_dir()
    assert not (saved / "config.json").exists(), "for every other program the folder is no model yet"
    assert same(load(saved), new)
    assert hidden(saved) == []
    assert not (saved / FILE).exists()


def test_a_save_that_took_place_is_finished_by_the_next_save(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(saved, 1, monkeypatch, lambda: model(1).save_pretrained(saved, **SHARDS))
    model(2).save_pretrained(saved)
    assert same(load(saved), model(2))
    assert sorted(path.name for path in saved.iterdir()) == ["config.json", FILE]


def test_a_save_killed_beside_a_living_one_is_finished_first(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with saving(saved) as stage:
        write_json(stage / "more.json", {})
        interrupted(saved, 1, monkeypatch, lambda: model(1).save_pretrained(saved, **SHARDS))
    assert (saved / "more.json").exists()
    assert same(load(saved), model(1))
    assert hidden(saved) == []


def test_a_save_that_cannot_be_finished_is_named(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(saved, 1, monkeypatch, lambda: model(1).save_pretrained(saved))

    def denied(*args: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", denied)
        with pytest.raises(
            CheckpointError, match=r"was interrupted and cannot be finished here \(Permission denied\): load"
        ):
            load(saved)
    assert same(load(saved), model(1))


def test_a_list_of_leftovers_reaches_nothing_outside_its_folder(tmp_path: Path) -> None:
    precious = [tmp_path / "precious.json", tmp_path / "model" / "notes.txt"]
    folder = tmp_path / "model"
    (folder / SAVED / "vae").mkdir(parents=True)
    for path in precious:
        path.write_text("{}")
    names = ["../precious.json", str(precious[0]), "vae/../../precious.json", "notes.txt", ".saved/x.json", 5]
    (folder / SAVED / storage.STALE).write_text(json.dumps(names))
    (folder / SAVED / "vae" / "config.json").write_text("{}")
    recover(folder)
    assert all(path.exists() for path in precious)
    assert (folder / "vae" / "config.json").exists()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x").write_text("x")
    (folder / SAVED).symlink_to(tmp_path / "elsewhere")
    recover(folder)
    finish(folder)
    assert (tmp_path / "elsewhere" / "x").exists(), "a link is not followed"


def test_orphans_of_killed_saves_are_swept_and_living_saves_are_not(saved: Path) -> None:
    (saved / f".{FILE}.saving-12345").write_bytes(b"half")
    (saved / f"{STAGE}12345-abc").mkdir()
    (saved / f"{STAGE}12345-abc" / FILE).write_bytes(b"half")
    with saving(saved) as stage:
        sweep(saved)
        assert stage.is_dir()
        write_json(stage / "more.json", {})
    assert hidden(saved) == []
    assert (saved / "more.json").exists()


def test_without_locks_only_old_orphans_are_swept(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_lock", lambda folder, wait: None)
    orphan = saved / f"{STAGE}1-a"
    orphan.mkdir()
    model(1).save_pretrained(saved)
    assert orphan.exists()
    os.utime(orphan, (0, 0))
    model(2).save_pretrained(saved)
    assert not orphan.exists()
    assert same(load(saved), model(2))


def test_a_system_that_is_not_posix_locks_and_syncs_nothing(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    real = os.open

    class Windows:
        name = "nt"

        def __getattr__(self, name: str) -> Any:
            return getattr(os, name)

        def open(self, path: Any, flags: int, *rest: Any) -> int:
            assert not Path(path).is_dir(), "folders cannot be opened there"
            synced.append(flags)
            return real(path, flags, *rest)

    monkeypatch.setattr(storage, "os", Windows())
    model(1).save_pretrained(saved)
    assert same(load(saved), model(1))
    assert set(synced) == {os.O_RDWR}


# --- D48: the order of what reaches the disk --------------------------------------------------------------------------


@posix
def test_everything_is_on_the_disk_before_a_save_takes_place(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[tuple[str, str]] = []
    real_fsync, real_rename, real_replace, real_unlink = os.fsync, Path.rename, os.replace, Path.unlink

    def name_of(path: Any) -> str:
        name = str(Path(path).relative_to(saved)) if str(path) != str(saved) else "."
        return "/".join("STAGE" if word.startswith(STAGE) else word for word in name.split("/"))

    def fsync(handle: int) -> None:
        events.append(("sync", name_of(os.readlink(f"/proc/self/fd/{handle}"))))
        real_fsync(handle)

    def rename(path: Path, target: Path) -> Path:
        events.append(("rename", f"{name_of(path)} {name_of(target)}"))
        return real_rename(path, target)

    def replace(source: Path, target: Path) -> None:
        events.append(("move", name_of(target)))
        real_replace(source, target)

    def unlink(path: Path, missing_ok: bool = False) -> None:
        if path.exists():
            events.append(("remove", name_of(path)))
        real_unlink(path, missing_ok)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", rename)
    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(Path, "unlink", unlink)
    model(1).save_pretrained(saved, max_shard_size="40KB")
    monkeypatch.undo()
    moment = events.index(("rename", f"STAGE {SAVED}"))
    before, after = events[:moment], events[moment + 1 :]
    shards = [f"diffusion_pytorch_model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for name in (*shards, INDEX, "config.json", storage.STALE):
        assert ("sync", f"STAGE/{name}") in before
    assert before[-1] == ("sync", "STAGE"), "the names in the folder come last"
    assert not [event for event in before if event[0] == "move" and "STAGE" not in event[1]]
    assert after[0] == ("sync", "."), "the moment itself is on the disk before the old files go"
    assert after[1:3] == [("remove", "config.json"), ("remove", FILE)]
    assert [name for kind, name in after if kind == "move"][-1] == "config.json"
    assert after[-1] == ("sync", ".")


# --- D49: a disk that fails -------------------------------------------------------------------------------------------


class Failing:
    """Lets the k-th call that changes the disk fail; counts them all."""

    def __init__(self, k: int, code: int) -> None:
        self.k, self.code, self.calls = k, code, 0

    def tick(self) -> None:
        self.calls += 1
        if self.calls == self.k:
            raise OSError(self.code, os.strerror(self.code))

    def tick_in_rust(self) -> None:
        try:
            self.tick()
        except OSError as error:
            raise SafetensorError(f"I/O error: {error.strerror} (os error {error.errno})") from None


@contextmanager
def failing(k: int, code: int) -> Iterator[Failing]:
    fault, fsync = Failing(k, code), os.fsync
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in (
            (os, "fsync"),
            (os, "replace"),
            (os, "mkdir"),
            (Path, "rename"),
            (Path, "write_text"),
            (tensors_module, "write_all"),
            (tensors_module, "save_file"),
        ):
            real = getattr(owner, name)

            def wrapped(*args: Any, real: Any = real, **options: Any) -> Any:
                fault.tick_in_rust() if real is save_file else fault.tick()
                return None if real is fsync else real(*args, **options)

            patch.setattr(owner, name, wrapped)
        yield fault


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_a_disk_that_fails_at_the_k_th_call_loses_nothing(saved: Path, code: int) -> None:
    old, current, said = {0: transformer(), 1: model(1)}, 0, []
    for k in range(1, 200):
        with failing(k, code) as fault:
            try:
                old[1 - current].save_pretrained(saved, **(SHARDS if k % 2 else {}))
            except OSError as error:
                said.append(error)
        if fault.calls < k:
            break
        found = load(saved)
        matching = [number for number, each in old.items() if same(found, each)]
        assert len(matching) == 1, k
        current = matching[0]
    assert 15 < k < 199, "every call had its turn"
    assert {error.errno for error in said} == {code}
    assert all(str(error.filename).startswith(str(saved)) and STAGE not in error.filename for error in said)
    assert hidden(saved) == []


@posix
def test_a_file_that_may_not_grow_names_itself_and_the_space(saved: Path) -> None:
    import resource

    said = saved.parent / "said.txt"

    def work() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        try:
            model(1).save_pretrained(saved)
        except OSError as error:
            said.write_text(f"{error.strerror}: {error.filename}")

    with forked(work) as process:
        os.waitpid(process, 0)
    assert (
        f"File too large (0.1 MB are needed); {saved} was not saved, what was there before is as it was"
        in said.read_text()
    )
    assert said.read_text().endswith(str(saved / FILE))
    assert same(load(saved), transformer())
    assert hidden(saved) == []


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="Not a directory") as caught:
        transformer().save_pretrained(tmp_path / "file" / "model")
    assert caught.value.filename == str(tmp_path / "file" / "model")
    with pytest.raises(InvalidInput, match="is a file; give a folder"):
        transformer().save_pretrained(tmp_path / "file")


def test_errors_of_foreign_writers_name_the_folder(saved: Path) -> None:
    with pytest.raises(OSError, match="No space left") as caught, storage.naming_foreign(saved):
        raise RuntimeError("Io: No space left on device (os error 28)")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(saved))
    with pytest.raises(RuntimeError, match="something else"), storage.naming_foreign(saved):
        raise RuntimeError("something else")
    with pytest.raises(SafetensorError, match="something else"), storage.naming(saved):
        raise SafetensorError("something else")


def test_errors_of_this_package_pass_a_failed_save(saved: Path) -> None:
    with pytest.raises(ModelNotFound, match="gone"), saving(saved):
        raise ModelNotFound("gone")
    assert same(load(saved), transformer())


def test_model_that_is_not_finite_is_not_saved(tmp_path: Path) -> None:
    broken = transformer()
    with torch.no_grad():
        broken.proj_out.bias[1] = torch.nan
    with pytest.raises(NonFinite, match=r"'proj_out.bias' holds NaN or infinity, so the model is not saved"):
        broken.save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []


# --- D50: two at once -------------------------------------------------------------------------------------------------


@posix
def test_processes_that_save_to_the_same_folder_leave_one_of_their_models(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    models = [model(number) for number in range(4)]

    def work(number: int) -> None:
        for _ in range(3):
            models[number].save_pretrained(folder, **(SHARDS if number % 2 else {}))

    started = []
    for number in range(4):
        with forked(lambda number=number: work(number)) as process:
            started.append(process)
    assert [os.waitpid(process, 0)[1] for process in started] == [0] * 4
    found = load(folder)
    assert sum(same(found, each) for each in models) == 1
    assert hidden(folder) == []
    assert len(list(folder.iterdir())) in (2, 5)


# --- D53: links and permissions ---------------------------------------------------------------------------------------


def test_files_have_the_permissions_of_their_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    transformer().save_pretrained(tmp_path)
    assert {oct(path.stat().st_mode & 0o777) for path in tmp_path.iterdir()} == {"0o644"}


def test_a_linked_folder_is_written_where_it_points_and_a_linked_file_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "model").symlink_to(tmp_path / "real")
    precious = tmp_path / "precious"
    precious.write_text("precious")
    (tmp_path / "real" / FILE).symlink_to(precious)
    transformer().save_pretrained(tmp_path / "model")
    assert (tmp_path / "model").is_symlink()
    assert same(load(tmp_path / "real"), transformer())
    assert precious.read_text() == "precious", "nothing is written through a link"
    assert not (tmp_path / "real" / FILE).is_symlink()


def test_a_part_on_another_disk_is_copied(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.replace

    def replace(source: Any, target: Any) -> None:
        if SAVED in Path(source).parts and Path(target).name == FILE:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    model(1).save_pretrained(saved)
    assert same(load(saved), model(1))
    assert hidden(saved) == []


def test_a_folder_that_anybody_may_write_to_is_mentioned_once(
    saved: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    load(saved)
    saved.chmod(stat.S_IRWXU | stat.S_IRWXG | stat.S_IRWXO)
    load(saved)
    assert caplog.records == [], "it is the user's own"
    monkeypatch.setattr(os, "geteuid", lambda: os.stat(saved).st_uid + 1)
    load(saved)
    load(saved)
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == [
        f"{saved} belongs to another user and anybody may write to it: use models you trust, or copy it"
    ]


# --- single files -----------------------------------------------------------------------------------------------------


def test_single_files_are_whole_or_absent(tmp_path: Path) -> None:
    target = tmp_path / "x.json"
    write_json(target, {"b": 1, "a": 2})
    assert target.read_text() == '{\n  "a": 2,\n  "b": 1\n}\n'

    def half(beside: Path) -> None:
        beside.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left") as caught:
        publish(target, half)
    assert caught.value.filename == str(target)
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]
    assert json.loads(target.read_text()) == {"a": 2, "b": 1}
