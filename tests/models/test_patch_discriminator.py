"""The discriminator of patches."""

import torch

from sana.models.patch_discriminator import PatchDiscriminator


def test_it_has_the_published_layers_and_answers_once_for_every_patch() -> None:
    torch.manual_seed(0)
    model = PatchDiscriminator()
    convolutions = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    assert [(c.kernel_size[0], c.stride[0], c.out_channels) for c in convolutions] == [
        (4, 2, 64), (4, 2, 128), (4, 2, 256), (4, 1, 512), (4, 1, 1),
    ]  # fmt: skip
    with torch.no_grad():
        assert model(torch.zeros(2, 3, 256, 256)).shape == (2, 1, 30, 30)


def test_every_picture_is_judged_by_itself_and_an_answer_sees_seventy_pixels() -> None:
    torch.manual_seed(0)
    model = PatchDiscriminator(widths=(8, 16, 32, 64))
    pictures = torch.randn(3, 3, 128, 128)
    together = model(pictures)
    torch.testing.assert_close(together[1:2], model(pictures[1:2]), rtol=1e-4, atol=1e-6)
    for norm in (m for m in model.modules() if isinstance(m, torch.nn.GroupNorm)):
        norm.forward = lambda x: x  # type: ignore[method-assign]  # the norm alone sees the whole picture
    one = pictures[:1].clone().requires_grad_()
    model(one)[0, 0, 6, 6].backward()
    rows = one.grad.abs().sum((0, 1, 3)).nonzero().flatten()  # type: ignore[union-attr]
    assert int(rows.max() - rows.min()) + 1 == 70
