"""What a run begins with, made before the loop: sizes, pictures, grid, text, controls.

Shapes: C latent channels, h w latent size, H W pixels.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor

from sana.data.pictures import fit
from sana.engine.angles import Angles, grid_of
from sana.engine.attachments import ControlRequest, FileRef
from sana.engine.canvas import Canvas, Kept, feathered, fitted_mask, masked, outpainted
from sana.engine.control_maps import control_map
from sana.engine.edits import Edit, encode_picture, latent_mask, to_tensor
from sana.engine.parts import Parts
from sana.engine.pictures import is_see_through, read_mask, read_picture, reference
from sana.engine.predictor import Control
from sana.engine.request import Request, ResolvedRequest, shown
from sana.engine.resolution import BINS, check_step, cut_told, nearest_bin
from sana.errors import InvalidInput
from sana.flow.samplers import BoundSampler, find_sampler
from sana.models.linear_dit import pag_layers
from sana.text.instruction import COMPLEX_HUMAN_INSTRUCTION

Say = Callable[[str], None]

BLURRED = 2.0
"""How many pixels of a result may stand for one that was drawn, before it is said."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Attached:
    """A request with its pictures read, each as the canvas has it; nothing is computed yet."""

    settings: ResolvedRequest
    """The request, in which files are named as records name them."""
    canvas: Canvas
    image: Image.Image | None = None
    """The picture to begin with."""
    mask: Image.Image | None = None
    """What of it is drawn anew."""
    kept: Kept | None = None
    """What is laid over the result."""
    controls: Sequence[tuple[ControlRequest, Image.Image]] = ()
    """Each control with its map."""
    notes: Sequence[str] = ()
    """What the user should know."""


def drawn_size(parts: Parts, settings: Request) -> tuple[int, int]:
    """Return the (height, width) that the model draws for a request, before the picture is brought to its own size.

    Raises:
        InvalidInput: the size is no multiple of the latent's pixel, and there are no bins to fall back on.
    """
    height, width = settings.height, settings.width
    assert height is not None
    assert width is not None
    sample_size = parts.transformer.config.sample_size
    if settings.binning and sample_size in BINS:
        return nearest_bin(height, width, sample_size)
    step = parts.compression * parts.transformer.config.patch_size
    if settings.image is not None:  # the canvas of a picture is larger than it, by less than a step
        return -(-height // step) * step, -(-width // step) * step
    check_step(height, width, step)
    return height, width


def canvas_of(parts: Parts, settings: ResolvedRequest) -> Canvas:
    """Return the way from the result's pixels to those that are drawn. Errors as `drawn_size`."""
    drawn = drawn_size(parts, settings)
    resized = settings.binning and parts.transformer.config.sample_size in BINS
    return Canvas(height=settings.height, width=settings.width, drawn=drawn, resized=resized)


def attach(parts: Parts, settings: ResolvedRequest) -> Attached:
    """Read the pictures of a request and check them against it and the model.

    Raises:
        ModelNotFound: a file is not there.
        InvalidInput: a picture cannot be used, or the model has no use for it.
    """
    canvas = canvas_of(parts, settings)
    told = [cut_told(canvas.drawn, settings.height, settings.width)]
    if not settings.prompt.strip():
        told.insert(0, "The prompt is empty, so nothing says what the picture should show.")
    networks = _networks(parts, len(settings.controls))
    found = Attached(settings=settings, canvas=canvas, notes=[text for text in told if text is not None])
    if settings.image is not None:
        found = _with_image(found, settings)
    if not networks:
        return found
    pictures = [read_picture(one.image, "control image") for one in settings.controls]
    named = tuple(
        dataclasses.replace(one, image=reference(one.image, picture))
        for one, picture in zip(settings.controls, pictures, strict=True)
    )
    maps = [control_map(one.kind, canvas.place(p)) for one, p in zip(settings.controls, pictures, strict=True)]
    return dataclasses.replace(
        found, settings=found.settings.replace(controls=named), controls=list(zip(named, maps, strict=True))
    )


def _with_image(found: Attached, settings: ResolvedRequest) -> Attached:
    assert settings.image is not None
    picture, canvas, border = read_picture(settings.image), found.canvas, settings.outpaint
    mask = read_mask(settings.mask) if settings.mask is not None else None
    named = settings.replace(
        image=reference(settings.image, picture),
        mask=None if mask is None or settings.mask is None else reference(settings.mask, mask),
    )
    notes = [*found.notes, *_told(settings, canvas)]
    whole = masked(mask, picture.size, border)
    base = fit(outpainted(picture, border), settings.width, settings.height)
    kept = None
    if whole is not None:
        whole = fitted_mask(whole, settings.width, settings.height)
        kept = Kept(picture=base, share=feathered(whole, settings.feather))
    return dataclasses.replace(
        found,
        settings=named,
        image=canvas.place(base),
        mask=None if whole is None else canvas.place(whole),
        kept=kept,
        notes=notes,
    )


def _told(settings: ResolvedRequest, canvas: Canvas) -> list[str]:
    """Return what may surprise about a picture that is edited."""
    told = []
    assert settings.image is not None
    if is_see_through(settings.image):
        told.append("The picture has see-through pixels; they are taken as white.")
    high, wide = canvas.drawn
    if settings.height * settings.width > BLURRED * high * wide:
        told.append(
            f"The result has {settings.width} x {settings.height} pixels, but the model draws {wide} x {high}: what is"
            " new in it has less detail. Take a model for larger pictures, or make the picture smaller."
        )
    return told


def _networks(parts: Parts, count: int) -> Sequence[Any]:
    """Return the control network of each of the controls. Raises InvalidInput."""
    if not count:
        return ()
    loaded = parts.controlnet
    if loaded is None:
        raise InvalidInput(
            f"`controls` needs a control network, and {parts.name} comes without one. Take a ControlNet model."
        )
    if not isinstance(loaded, list | tuple):
        return [loaded] * count
    if len(loaded) != count:
        raise InvalidInput(f"There are {len(loaded)} control networks for {count} `controls`. Give one for each.")
    return loaded


def sampler_of(settings: ResolvedRequest, shift: float, angles: Angles) -> BoundSampler:
    """Return the sampler with its grid: that of the steps, or for image-to-image its end that the strength leaves."""
    sampler = find_sampler(settings.sampler)
    if settings.sampler == "scm":
        grid = grid_of(angles, settings.steps, settings.max_timesteps, settings.intermediate_timesteps)
    else:
        grid = sampler.make_grid(settings.steps, shift)
    return sampler.on(grid if settings.strength is None else grid.tail(settings.strength))


def perturbed_blocks(parts: Parts, settings: ResolvedRequest) -> tuple[int, ...]:
    """Return the blocks that perturbed-attention guidance acts in; none without it.

    Raises:
        InvalidInput: the transformer has no such blocks, or a name is none of them.
    """
    if not settings.pag_scale or settings.pag_layers is None:
        return ()
    names = settings.pag_layers
    return pag_layers(parts.transformer, names if isinstance(names, str) else list(names))


def adapters_of(parts: Parts, settings: ResolvedRequest) -> tuple[ResolvedRequest, dict[str, float] | None]:
    """Load the adapters of a request, and return it with them as records name them, and how strongly each acts.

    None leaves those that act on the transformer anyway. Errors as `Adapters.load`.
    """
    if not settings.loras:
        return settings, None
    adapters, named = parts.adapters, []
    strengths: dict[str, float] = {}
    for one in settings.loras:
        if isinstance(one.source, FileRef):
            raise InvalidInput(
                f"The LoRA is only known by what its record says ({one.source.name}). Give the file itself."
            )
        name = adapters.ensure(one.source, keep=strengths)
        strengths[name] = strengths.get(name, 0.0) + one.scale
        file = str(one.source).replace("\\", "/").rstrip("/").rpartition("/")[2]
        named.append(dataclasses.replace(one, source=FileRef(name=file[:255], sha256=adapters.report(name).sha256)))
    return settings.replace(loras=tuple(named)), strengths


def edit_of(parts: Parts, attached: Attached, say: Say) -> Edit | None:
    """Encode the picture that the run begins with; None without one."""
    if attached.image is None:
        return None
    latents = encode_picture(parts.vae, to_tensor(attached.image), say).float()
    mask = None
    if attached.mask is not None:
        mask = latent_mask(attached.mask, attached.canvas.drawn[0] // latents.shape[-2])
    return Edit(latents=latents, mask=mask)


def controls_of(parts: Parts, attached: Attached, say: Say) -> list[Control]:
    """Encode the map of each control, and join it with its network."""
    made = []
    networks = _networks(parts, len(attached.controls))
    for network, (one, picture) in zip(networks, attached.controls, strict=True):
        made.append(
            Control(
                network=network,
                latents=encode_picture(parts.vae, to_tensor(picture), say),
                scale=one.scale,
                start=one.start,
                end=one.end,
            )
        )
    return made


def conditions(parts: Parts, settings: ResolvedRequest, say: Say) -> list[tuple[Tensor, Tensor]]:
    """Encode the prompt, and before it the negative prompt if guidance needs one: embeds and mask of each."""
    limit, clean = settings.max_prompt_tokens, settings.clean_caption
    instruction = COMPLEX_HUMAN_INSTRUCTION if settings.instruction else None
    positive = parts.prompts.encode([settings.prompt], instruction, limit, clean)
    if positive.truncated[0]:
        say(f"The prompt is longer than {limit} tokens; this end of it was not read: {shown(positive.truncated[0])}")
    groups = [(positive.embeds, positive.mask)]
    if settings.guidance > 1 and not parts.transformer.config.guidance_embeds:
        negative = parts.prompts.encode([settings.negative_prompt], None, limit, clean)
        groups.insert(0, (negative.embeds, negative.mask))
    return groups
