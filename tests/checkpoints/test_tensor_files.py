"""Single tensor files against damage: cuts, lies in the header, flips in the data, changes while they are read."""

import hashlib
import json
import mmap
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tiny_pipeline import FILE, load, same, transformer

from sana.checkpoints import tensors as module
from sana.checkpoints.digests import has_digest, verified, verify
from sana.checkpoints.tensors import read_header, read_tensors, write_tensors
from sana.errors import CheckpointError, InvalidInput
from sana.memory.trimming import give_back

MEGABYTE = 1 << 20


def sample() -> dict[str, torch.Tensor]:
    made = torch.Generator().manual_seed(0)
    return {
        "matrix": torch.randn(80, 60, generator=made),
        "half": torch.randn(33, generator=made).half(),
        "brain": torch.randn(2, 3, 5, generator=made).bfloat16(),
        "whole": torch.arange(7),
        "number": torch.tensor(3.5),
        "flags": torch.tensor([True, False, True]),
        "none": torch.zeros(0, 4),
    }


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "some.safetensors"
    write_tensors(path, sample())
    return path


def read(path: Path) -> dict[str, torch.Tensor]:
    with verified([path]):
        return dict(read_tensors(path))


def split(path: Path) -> tuple[dict[str, Any], bytes]:
    whole = path.read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    return json.loads(whole[8:end]), whole[end:]


def put(path: Path, header: dict[str, Any] | str | bytes, data: bytes) -> None:
    text = json.dumps(header) if isinstance(header, dict) else header
    raw = text.encode() if isinstance(text, str) else text
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)


# --- what is written, the public library reads, and the other way round -----------------------------------------------


def test_files_are_the_public_format_both_ways(file: Path, tmp_path: Path) -> None:
    theirs = load_file(file)
    save_file(sample(), tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    for other in (theirs, read(file), read(tmp_path / "theirs.safetensors")):
        assert other.keys() == sample().keys()
        for name, tensor in sample().items():
            assert other[name].dtype == tensor.dtype
            assert other[name].shape == tensor.shape
            assert torch.equal(other[name], tensor)
    assert split(file)[0]["__metadata__"]["format"] == "pt"
    assert (has_digest(file), has_digest(tmp_path / "theirs.safetensors")) == (True, False)


def test_data_are_aligned_and_views_are_written_as_they_look(tmp_path: Path) -> None:
    base = torch.arange(12.0).view(3, 4)
    write_tensors(tmp_path / "x", {"turned": base.t(), "part": base[1], "odd": torch.ones(3, dtype=torch.int8)})
    assert torch.equal(load_file(tmp_path / "x")["turned"], base.t())
    assert torch.equal(load_file(tmp_path / "x")["part"], base[1])
    header, _ = split(tmp_path / "x")
    assert all(header[e.name]["data_offsets"][0] % e.dtype.itemsize == 0 for e in read_header(tmp_path / "x"))
    assert (8 + int.from_bytes((tmp_path / "x").read_bytes()[:8], "little")) % 8 == 0


def test_tensors_that_share_memory_are_all_written(tmp_path: Path) -> None:
    base = torch.arange(6.0)
    write_tensors(tmp_path / "x", {"one": base, "same": base, "part": base[2:4], "empty": base[:0]})
    found = read(tmp_path / "x")
    assert [found[name].tolist() for name in ("one", "same", "part", "empty")] == [
        base.tolist(), base.tolist(), [2, 3], []
    ]  # fmt: skip


def test_the_same_tensors_make_the_same_file(tmp_path: Path) -> None:
    """The library orders the metadata anew in each process."""
    code = "import sys, torch; from pathlib import Path; from sana.checkpoints.tensors import write_tensors as w\n"
    code += "w(Path(sys.argv[1]), {'a': torch.ones(2), 'sha256': torch.zeros(1)})"
    for number in range(2):
        subprocess.run([sys.executable, "-c", code, str(tmp_path / str(number))], check=True)
    first, again = ((tmp_path / str(number)).read_bytes() for number in range(2))
    assert first == again
    start = b'{"__metadata__":{"format":"pt","sha256":"' + hashlib.sha256(first[-12:]).hexdigest().encode() + b'"},'
    assert first[8:].startswith(start)


def test_reading_casts_what_is_floating(file: Path) -> None:
    cast = {name: tensor.to(torch.float32) for name, tensor in read_tensors(file, torch.float32)}
    assert torch.equal(cast["half"], sample()["half"].float())
    assert torch.equal(cast["matrix"], sample()["matrix"])


def test_dtypes_that_are_not_known_are_named(file: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="Tensor 'x' has dtype complex64, which is not saved"):
        write_tensors(tmp_path / "x", {"x": torch.zeros(1, dtype=torch.complex64)})
    header, data = split(file)
    header["half"].update(dtype="F8_E4M3", shape=[66])
    put(file, header, data)
    with pytest.raises(CheckpointError, match=r"Tensor 'half' in .* has dtype F8_E4M3, which is not read: convert it"):
        read_header(file)


# --- A1: cut at any byte ----------------------------------------------------------------------------------------------


def test_a_file_cut_at_any_byte_is_named(file: Path) -> None:
    size = file.stat().st_size
    assert size > 19_900
    for length in reversed(range(size)):
        os.truncate(file, length)
        with pytest.raises(CheckpointError, match=r"some\.safetensors is (damaged or cut short|empty)"):
            read_header(file)


def test_no_model_comes_of_a_file_cut_anywhere(saved: Path) -> None:
    whole = (saved / FILE).read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for length in (*range(0, header, 97), header, header + 1, len(whole) // 2, len(whole) - 1):
        (saved / FILE).write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=rf"{FILE} is (empty|damaged or cut short .*delete it)"):
            load(saved)


# --- A2: lies in the header -------------------------------------------------------------------------------------------

LIES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "overlap": lambda h: h["half"].update(data_offsets=[0, 66]),
    "hole": lambda h: h.pop("half"),
    "huge shape": lambda h: h["matrix"].update(shape=[1 << 40, 1 << 40]),
    "huge empty shape": lambda h: h["none"].update(shape=[0, 1 << 40, 1 << 40]),
    "shape of another size": lambda h: h["matrix"].update(shape=[80, 61]),
    "negative offset": lambda h: h["matrix"].update(data_offsets=[-19200, 0]),
    "reversed offsets": lambda h: h["matrix"]["data_offsets"].reverse(),
    "offset beyond the end": lambda h: h["matrix"].update(data_offsets=[1 << 50, (1 << 50) + 19200]),
    "offset is a float": lambda h: h["matrix"].update(data_offsets=[0.0, 19200.0]),
    "three offsets": lambda h: h["matrix"].update(data_offsets=[0, 1, 2]),
    "no offsets": lambda h: h["matrix"].pop("data_offsets"),
    "offsets are a word": lambda h: h["matrix"].update(data_offsets="ab"),
    "negative shape": lambda h: h["matrix"].update(shape=[-80, -60]),
    "shape is true": lambda h: h["number"].update(shape=[True]),
    "shape is a number": lambda h: h["number"].update(shape=1),
    "dtype is a list": lambda h: h["number"].update(dtype=["F32"]),
    "entry is a list": lambda h: h.update(number=[1]),
    "metadata are a list": lambda h: h.update(__metadata__=[1]),
    "unknown tensor": lambda h: h.update(more={"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}),
}


@pytest.mark.parametrize("lie", LIES)
def test_lies_are_refused(file: Path, lie: str) -> None:
    header, data = split(file)
    LIES[lie](header)
    put(file, header, data)
    with pytest.raises(CheckpointError, match=r"some\.safetensors is damaged or cut short \(.+\): delete it") as caught:
        read_header(file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "header",
    [
        b"[]", b"null", b"", b"{", b"\xff\xfe", b'{"a": NaN}', b'{"a": Infinity}', b"[" * 100_000,
        b'{"a":{"dtype":"F32","shape":[1],"shape":[1],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,4]}}',
    ],
)  # fmt: skip
def test_headers_that_are_none_are_refused(file: Path, header: bytes) -> None:
    put(file, header, b"\0\0\0\0")
    with pytest.raises(CheckpointError, match=r"some\.safetensors is damaged or cut short"):
        read_header(file)


@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_mutated_headers_are_refused_or_harmless(file: Path, data: st.DataObject) -> None:
    """Whatever the header says, there is our error or the tensors that the public library sees."""
    if not hasattr(test_mutated_headers_are_refused_or_harmless, "whole"):
        test_mutated_headers_are_refused_or_harmless.whole = file.read_bytes()  # type: ignore[attr-defined]
    whole = bytearray(test_mutated_headers_are_refused_or_harmless.whole)  # type: ignore[attr-defined]
    end = 8 + int.from_bytes(whole[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        where = data.draw(st.integers(0, end - 1))
        kind = data.draw(st.sampled_from(["flip", "digit", "cut", "double"]))
        if kind == "flip":
            whole[where] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "digit":
            whole[where] = ord(data.draw(st.sampled_from('0123456789-,:[]{}" ')))
        elif kind == "cut":
            del whole[where : where + data.draw(st.integers(1, 30))]
        else:
            whole[where:where] = whole[where : where + data.draw(st.integers(1, 80))]
    file.write_bytes(whole)
    try:
        ours = read(file)
    except CheckpointError:
        return
    try:
        theirs = load_file(file)
    except SafetensorError as error:
        pytest.fail(f"the public library refuses what we read: {error}")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name].nan_to_num(), theirs[name].nan_to_num()) for name in ours)


def in_child(work: Callable[[], object], memory: int | None = None) -> int:
    """Run `work` in a forked process with at most `memory` further bytes; return its status as `waitpid` gives it."""
    process = os.fork()
    if process == 0:
        try:
            if memory is not None:
                give_back()  # what earlier tests freed would serve an allocation without any further memory
                pages = int(Path("/proc/self/statm").read_text().split()[0])
                limit = pages * resource.getpagesize() + memory
                resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            work()
            os._exit(0)
        except BaseException as error:
            sys.stderr.write(f"{type(error).__name__}: {error}\n")
            os._exit(1)
    return os.waitpid(process, 0)[1]


linux = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux to limit memory")


@linux
def test_lies_cost_no_memory(file: Path) -> None:
    header, data = split(file)
    lengths = (90_000_000, 4 << 30, (1 << 64) - 1)
    huge: list[tuple[bytes, bytes]] = [(length.to_bytes(8, "little"), b"{}") for length in lengths]
    for shape in ([1 << 31], [1 << 40], [1 << 20, 1 << 20]):
        size = 4
        for side in shape:
            size *= side
        lie = {**header, "matrix": {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}}
        raw = json.dumps(lie).encode()
        huge.append((len(raw).to_bytes(8, "little"), raw + data))

    def work() -> None:
        for length, rest in huge:
            file.write_bytes(length + rest)
            with pytest.raises(CheckpointError):
                read(file)

    assert in_child(work, 50 * MEGABYTE) == 0


@linux
def test_the_limit_itself_works(file: Path) -> None:
    # A fresh mapping: an allocation could be served from what earlier tests freed, which costs no further memory.
    assert in_child(lambda: mmap.mmap(-1, 80 * MEGABYTE), 50 * MEGABYTE) != 0
    assert in_child(lambda: mmap.mmap(-1, 20 * MEGABYTE), 50 * MEGABYTE) == 0


def test_a_header_of_many_megabytes_is_not_read(file: Path) -> None:
    with file.open("wb") as out:
        out.write((200_000_000).to_bytes(8, "little"))
        out.truncate(200_000_100)
    with pytest.raises(CheckpointError, match=r"some\.safetensors is damaged or cut short \(.*header too large\)"):
        read_header(file)


# --- A3: flipped bits in the data -------------------------------------------------------------------------------------


def test_every_flipped_bit_in_the_data_is_found(file: Path) -> None:
    whole = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(whole[:8], "little")
    for number in range(500):
        position = start + number * 7919 % (len(whole) - start)
        whole[position] ^= 1 << number % 8
        file.write_bytes(whole)
        with pytest.raises(CheckpointError, match=r"some\.safetensors is not as it was saved, its SHA-256 differs"):
            read(file)
        whole[position] ^= 1 << number % 8
    file.write_bytes(whole)
    assert verify(file)


def test_a_model_with_a_flipped_bit_is_refused(saved: Path) -> None:
    whole = bytearray((saved / FILE).read_bytes())
    whole[-5] ^= 1
    (saved / FILE).write_bytes(whole)
    with pytest.raises(
        CheckpointError, match=rf"{FILE} is not as it was saved.*delete it and download or copy it again"
    ):
        load(saved)
    (saved / FILE).write_bytes(whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:])
    assert same(load(saved), transformer())


def test_files_of_others_have_no_digest_and_load(saved: Path) -> None:
    save_file(load_file(saved / FILE), saved / FILE)
    assert verify(saved / FILE) is False
    assert same(load(saved), transformer())
    header, data = split(saved / FILE)
    put(saved / FILE, {**header, "__metadata__": {"sha256": "of something else"}}, data)
    assert verify(saved / FILE) is False
    assert same(load(saved), transformer())


def test_a_file_of_the_hub_cache_is_held_to_the_name_of_its_blob(file: Path, tmp_path: Path) -> None:
    save_file(sample(), file)
    blob = tmp_path / hashlib.sha256(file.read_bytes()).hexdigest()
    file.rename(blob)
    link = tmp_path / "model.safetensors"
    link.symlink_to(blob)
    assert verify(link)
    content = bytearray(blob.read_bytes())
    content[-1] ^= 64
    blob.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not as it was saved"):
        read(link)


def test_the_built_in_model_carries_digests() -> None:
    import sana

    files = sorted((Path(sana.__file__).parent / "assets" / "nano").rglob("*.safetensors"))
    assert len(files) == 3
    assert all(verify(path) for path in files)


def test_checking_stops_when_reading_fails(file: Path) -> None:
    with pytest.raises(KeyError), verified([file]):
        raise KeyError("reading failed")
    import threading

    stop = threading.Event()
    stop.set()
    assert verify(file, stop) is False


# --- A4: changed while it is read -------------------------------------------------------------------------------------


def big(path: Path) -> Path:
    write_tensors(path, {f"t{number}": torch.full((1 << 18,), float(number)) for number in range(8)})
    return path


def test_a_file_cut_after_it_was_opened_is_an_error_and_no_signal(tmp_path: Path) -> None:
    path = big(tmp_path / "some.safetensors")

    def work() -> None:
        tensors = read_tensors(path)
        next(tensors)
        os.truncate(path, 2 * MEGABYTE)
        with pytest.raises(CheckpointError, match="it ended while it was read"):
            list(tensors)

    assert in_child(work) == 0


def test_a_file_cut_between_its_header_and_its_data_gives_no_shifted_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, real = big(tmp_path / "some.safetensors"), module.head_of

    def cutting(file: Any) -> bytes:
        os.truncate(path, 2 * MEGABYTE)
        return real(file)

    monkeypatch.setattr(module, "head_of", cutting)
    tensors = read_tensors(path)
    assert float(next(tensors)[1][0]) == 0
    with pytest.raises(CheckpointError, match="it ended while it was read"):
        list(tensors)


def test_a_file_replaced_while_it_is_opened_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, other, real = big(tmp_path / "some.safetensors"), big(tmp_path / "other"), module.safe_open

    def replacing(*args: Any, **options: Any) -> Any:
        other.rename(path)
        return real(*args, **options)

    monkeypatch.setattr(module, "safe_open", replacing)
    with pytest.raises(CheckpointError, match=r"some\.safetensors was replaced while it was opened: load it again"):
        next(read_tensors(path))


def test_a_loaded_model_does_not_depend_on_its_file(saved: Path) -> None:
    def work() -> None:
        model = load(saved)
        os.truncate(saved / FILE, 0)
        assert same(model, transformer())

    assert in_child(work) == 0


def test_a_file_replaced_while_it_is_read_gives_its_old_content(tmp_path: Path) -> None:
    path = big(tmp_path / "some.safetensors")
    tensors = read_tensors(path)
    found = [next(tensors)]
    write_tensors(tmp_path / "other", {f"t{number}": torch.full((1 << 18,), -1.0) for number in range(8)})
    (tmp_path / "other").rename(path)
    found += list(tensors)
    assert [float(tensor[0]) for _, tensor in found] == [float(number) for number in range(8)]


def test_files_that_cannot_be_read_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="nowhere cannot be opened: No such file"):
        read_header(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"cannot be (opened|read): Is a directory"):
        read_header(tmp_path)
    path = big(tmp_path / "some.safetensors")

    def broken(*args: Any, **options: Any) -> Any:
        raise SafetensorError("Could not read: Input/output error (os error 5)")

    monkeypatch.setattr(module, "safe_open", broken)
    with pytest.raises(CheckpointError, match=r"some\.safetensors cannot be read: Input/output error"):
        read_header(path)

    def failing(*args: Any) -> Any:
        raise OSError(5, "Input/output error")

    monkeypatch.undo()
    monkeypatch.setattr(module, "_fill", failing)
    with pytest.raises(CheckpointError, match=r"some\.safetensors cannot be read: Input/output error"):
        next(read_tensors(path))


# --- A5: values -------------------------------------------------------------------------------------------------------


def test_matrices_that_are_all_zero_are_named_unless_they_were_saved_so(saved: Path) -> None:
    good = load_file(saved / FILE)
    for name in list(good)[::7]:
        save_file({**good, name: torch.zeros_like(good[name])}, saved / FILE)
        if good[name].ndim < 2:
            load(saved)
            continue
        with pytest.raises(CheckpointError, match=f"Tensor '{name}' in .* is all zero, as after an interrupted copy"):
            load(saved)
    model = transformer()
    with torch.no_grad():
        model.proj_out.weight.zero_()
    model.save_pretrained(saved)
    assert same(load(saved), model), "a layer may begin at zero"
