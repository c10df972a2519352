"""What saving leaves behind when it is interrupted, what it flushes, and how much memory loading takes."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_pipeline import FILE, INDEX, TRANSFORMER, load, transformer

from sana.checkpoints import weights as weights_module
from sana.checkpoints.pretrained import SanaTransformer2DModel
from sana.errors import ModelNotFound, NonFinite


def peak_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux to measure peak memory")
def test_loading_peaks_at_about_one_copy(tmp_path: Path) -> None:
    wide = {"num_attention_heads": 64, "cross_attention_dim": 512, "num_layers": 5, "caption_channels": 512}
    model = SanaTransformer2DModel(**{**TRANSFORMER, **wide})
    model.save_pretrained(tmp_path)
    size = sum(weight.numel() * 4 for weight in model.parameters())
    assert size > 70_000_000
    del model
    load(tmp_path)  # warm: lazily loaded code counts too
    Path("/proc/self/clear_refs").write_text("5")
    before = peak_bytes()
    again = load(tmp_path)
    assert (peak_bytes() - before) / size < 1.25
    assert again.num_parameters() * 4 == size


def test_interrupted_save_does_not_look_complete(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []

    def failing(tensors: Any, path: Path, **options: Any) -> None:
        path.write_bytes(b"half")
        written.append(path)
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        save_file(tensors, path, **options)

    monkeypatch.setattr(weights_module, "save_file", failing)
    with pytest.raises(OSError, match="No space left"):
        transformer().save_pretrained(saved, max_shard_size="30KB")
    assert not any(path.exists() for path in written), "nothing half written stays behind"
    with pytest.raises(ModelNotFound, match="its saving was interrupted"):
        load(saved)


def test_files_are_flushed_before_they_get_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[tuple[str, str]] = []
    real_sync, real_replace = weights_module.sync, Path.replace

    def sync(path: Path) -> None:
        events.append(("sync", path.name))
        real_sync(path)

    def replace(path: Path, target: Path) -> Path:
        events.append(("name", target.name))
        return real_replace(path, target)

    monkeypatch.setattr(weights_module, "sync", sync)
    monkeypatch.setattr(Path, "replace", replace)
    transformer().save_pretrained(tmp_path, max_shard_size="40KB")
    named = [name for kind, name in events if kind == "name"]
    assert named[-2:] == [INDEX, "config.json"]
    assert len(named) == 4
    for index, (kind, name) in enumerate(events):
        if kind == "name":
            assert events[index - 1] == ("sync", f".{name}.saving-{os.getpid()}")


def test_orphans_of_a_killed_save_are_swept(saved: Path) -> None:
    orphan = saved / f".{FILE}.saving-12345"
    orphan.write_bytes(b"half")
    transformer().save_pretrained(saved)
    assert not orphan.exists()


def test_files_have_the_permissions_of_their_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    transformer().save_pretrained(tmp_path)
    assert {oct(path.stat().st_mode & 0o777) for path in tmp_path.iterdir()} == {"0o644"}


def test_model_that_is_not_finite_is_not_saved(tmp_path: Path) -> None:
    model = transformer()
    with torch.no_grad():
        model.proj_out.bias[1] = torch.nan
    with pytest.raises(NonFinite, match=r"'proj_out.bias' holds NaN or infinity, so the model is not saved"):
        model.save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []
