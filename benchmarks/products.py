"""Every product from the prompt's string to the bytes of a PNG file, beside the reference implementation.

    python benchmarks/products.py [--quick] [--only pag sprint] [--size 1024] [--steps 2] [--rounds 3] [--compile]

SANA 0.6B, Gemma-2-2B, the control network and the DC-AE with random weights in bfloat16, a new prompt of 60 tokens each
time; both sides hold the same tensors (about 8 GB). Perturbed attention in block 14, with guidance as well. ControlNet
and image-to-image are given a picture. SANA-Sprint with a control network has no pipeline in the reference: there its
own modules are called in a loop written down here, without anything that it would do twice. `--steps` is for the
products with many steps; the more there are, the nearer the whole comes to the line of the denoising. `--compile` adds
both sides compiled and tells what that costs once. The PNG is written into memory, by Pillow's default on the side of
the reference.
"""

import argparse
import io
import statistics
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import diffusers
import numpy as np
import torch
from harness import heading, measure, table
from PIL import Image
from prompt_to_png import COMPILED, EAGER, OURS, OURS_COMPILED, first_call, scheduler, twin
from random_models import LAYERS, filled, prompts, text_encoder, tokenizer

import sana
from sana.cards import CARDS, Card
from sana.engine.parts import Parts
from sana.engine.png import write_png
from sana.engine.request import ControlRequest

STAGES = ("text", "encode", "denoise", "decode", "png")
PERTURBED = "transformer_blocks.14"
Draw = Callable[[str], Any]


@dataclass(frozen=True, kw_only=True)
class Models:
    """The tensors that both sides of a product hold."""

    card: Card
    tokens: Any
    encoder: Any
    transformer: Any
    controlnet: Any
    vae: Any
    picture: Image.Image
    options: argparse.Namespace

    def parts(self, package: Any, *names: str) -> dict[str, Any]:
        """Return the named parts as the classes of a package, with tokenizer and text encoder."""
        kinds = {
            "transformer": package.SanaTransformer2DModel,
            "controlnet": package.SanaControlNetModel,
            "vae": package.AutoencoderDC,
        }
        made = {name: twin(getattr(self, name), kinds[name]) for name in names}
        return {"tokenizer": self.tokens, "text_encoder": self.encoder, **made}

    def settings(self, **changes: Any) -> dict[str, Any]:
        """Return what every call is given."""
        size, generator = self.options.size, torch.Generator().manual_seed(0)
        return {"height": size, "width": size, "use_resolution_binning": False, "generator": generator, **changes}


@dataclass(frozen=True, kw_only=True)
class Product:
    """One product on both sides."""

    name: str
    card: str
    make: Callable[[Models, Any], tuple[Any, Draw]]
    """Returns what holds the parts, and how it draws a picture."""
    goal: str


def guided(models: Models, package: Any, *, kind: str, parts: tuple[str, ...] = (), **given: Any) -> tuple[Any, Draw]:
    """Return a pipeline of many steps, and its call."""
    own = {"pag_applied_layers": PERTURBED} if "pag_scale" in given else {}
    if own and models.options.quick:
        own = {"pag_applied_layers": "transformer_blocks.1"}
    found = models.parts(package, "transformer", "vae", *parts)
    pipe = getattr(package, kind)(**found, scheduler=scheduler(package), **own)
    steps = models.options.steps
    if parts:
        given["control_image"] = models.picture
    return pipe, lambda prompt: pipe(prompt, **models.settings(num_inference_steps=steps, **given)).images[0]


def sprint(models: Models, package: Any, *, kind: str, **given: Any) -> tuple[Any, Draw]:
    """Return a pipeline of one or two steps, and its call."""
    pipe = getattr(package, kind)(**models.parts(package, "transformer", "vae"), scheduler=package.SCMScheduler())
    if "strength" in given:
        given["image"] = models.picture
    return pipe, lambda prompt: pipe(prompt, **models.settings(**given)).images[0]


def sketch(models: Models, package: Any, *, steps: int) -> tuple[Any, Draw]:
    """Return SANA-Sprint with a control network, and how it draws."""
    found = models.parts(package, "transformer", "vae", "controlnet")
    network = found.pop("controlnet")
    pipe = package.SanaSprintPipeline(**found, scheduler=package.SCMScheduler())
    if package is diffusers:
        pipe.controlnet = network
        return pipe, partial(_reference_sketch, pipe, models, steps)
    parts = Parts(**found, scheduler=pipe.scheduler, controlnet=network, card=models.card, name="sprint")
    size = models.options.size
    control = ControlRequest(kind="map", image=models.picture)
    request = sana.Request(prompt="", steps=steps, seed=0, width=size, height=size, binning=False, controls=(control,))
    return parts, lambda prompt: sana.generate_images(parts, request.replace(prompt=prompt)).images[0]


@torch.no_grad()
def _reference_sketch(pipe: Any, models: Models, steps: int, prompt: str) -> Image.Image:
    """Draw with the reference's own modules."""
    embeds, mask = pipe.encode_prompt(prompt)
    pixels = pipe.image_processor.preprocess(models.picture).to(pipe.vae.dtype)
    control = pipe.vae.encode(pixels).latent * pipe.vae.config.scaling_factor
    pipe.scheduler.set_timesteps(steps, max_timesteps=1.57080, intermediate_timesteps=1.3 if steps == 2 else None)
    generator = torch.Generator().manual_seed(0)
    side, data = models.options.size // 32, pipe.scheduler.config.sigma_data
    latents = torch.randn(1, 32, side, side, generator=generator) * data
    guidance = torch.full((1,), 4.5).to(embeds.dtype) * pipe.transformer.config.guidance_embeds_scale
    for t in pipe.scheduler.timesteps[:-1]:
        flow = torch.sin(t) / (torch.cos(t) + torch.sin(t))
        norm = torch.sqrt(flow**2 + (1 - flow) ** 2)
        rows, told = (latents / data * norm).to(embeds.dtype), flow.expand(1)
        given = {"encoder_hidden_states": embeds, "encoder_attention_mask": mask, "return_dict": False}
        samples = pipe.controlnet(rows, timestep=1000 * told, controlnet_cond=control, **given)[0]
        velocity = pipe.transformer(
            rows, timestep=told, guidance=guidance, controlnet_block_samples=tuple(samples), **given
        )[0].float()
        found = ((1 - 2 * flow) * rows + (1 - 2 * flow + 2 * flow**2) * velocity) / norm
        latents, denoised = pipe.scheduler.step(found * data, t, latents, generator=generator, return_dict=False)
    latents = (denoised / data).to(pipe.vae.dtype) / pipe.vae.config.scaling_factor
    return pipe.image_processor.postprocess(pipe.vae.decode(latents, return_dict=False)[0], output_type="pil")[0]


class Side:
    """One implementation of a product: from a prompt to bytes, with the CPU seconds of each stage."""

    def __init__(self, owner: Any, draw: Draw, texts: Iterator[str], fast: bool) -> None:
        self.draw, self.texts, self.fast = draw, texts, fast
        self.spent: dict[str, float] = defaultdict(float)
        self.seconds: dict[str, list[float]] = {stage: [] for stage in STAGES}
        self._inside = False
        parts = owner if isinstance(owner, Parts) else getattr(owner, "parts", None)
        if parts is not None:
            self._clock(parts.prompts, "encode", "text")
        else:
            self._clock(owner, "encode_prompt", "text")
        for name in ("encode", "decode"):
            self._clock(owner.vae, name, name)
        if hasattr(owner, "set_progress_bar_config"):
            owner.set_progress_bar_config(disable=True)

    def _clock(self, owner: Any, name: str, stage: str) -> None:
        work: Callable[..., Any] = getattr(owner, name)

        def clocked(*arguments: Any, **options: Any) -> Any:
            if self._inside:
                return work(*arguments, **options)
            self._inside, start = True, time.process_time()
            try:
                return work(*arguments, **options)
            finally:
                self._inside = False
                self.spent[stage] += time.process_time() - start

        setattr(owner, name, clocked)

    def __call__(self) -> bytes:
        self.spent.clear()
        start = time.process_time()
        image = self.draw(next(self.texts))
        drawn = time.process_time()
        file = io.BytesIO()
        if self.fast:
            write_png(file, image)
        else:
            image.save(file, format="PNG")
        self.spent["png"] = time.process_time() - drawn
        self.spent["denoise"] = drawn - start - sum(self.spent[stage] for stage in ("text", "encode", "decode"))
        for stage in STAGES:
            self.seconds[stage].append(self.spent[stage])
        return file.getvalue()


def compiled(owner: Any) -> Any:
    """Compile what an implementation offers for it."""
    if isinstance(owner, Parts) or hasattr(owner, "parts"):
        getattr(owner, "parts", owner).compile()
        return owner
    owner.vae.to(memory_format=torch.channels_last)
    owner.transformer.compile()
    owner.vae.decoder.compile()
    if getattr(owner, "controlnet", None) is not None:
        owner.controlnet.compile()
    return owner


def run(product: Product, models: Models) -> None:
    """Print the tables of one product."""
    options = models.options
    packages = {OURS: (sana, False), EAGER: (diffusers, False)}
    if options.compile:
        packages.update({OURS_COMPILED: (sana, True), COMPILED: (diffusers, True)})
    sides = {}
    for name, (package, fast) in packages.items():
        owner, draw = product.make(models, package)
        sides[name] = Side(compiled(owner) if fast else owner, draw, prompts(models.tokens, 60), package is sana)
    same = [np.asarray(sides[name].draw("a red fox above a yellow boat")).astype(float) for name in (OURS, EAGER)]
    costs = {name: first_call(side) for name, side in sides.items() if name in (OURS_COMPILED, COMPILED)}
    timings = measure(sides, options.rounds, warmups=options.warmups, threads=options.threads)
    notes = (f"{options.size} px", f"{options.threads} thread(s), {options.rounds} rounds", *reduced(options))
    print(heading(product.name, product.card, "bfloat16", *notes, product.goal))
    print(table(timings, peers=[name for name in (EAGER, COMPILED) if name in sides]))
    print(f"\n{stages(sides, options.rounds)}")
    print(f"\nMean difference of the two eager pictures: {np.abs(same[0] - same[1]).mean():.2f} of 255.")
    print("".join(f"First picture of '{name}': {seconds:.0f} CPU s.\n" for name, seconds in costs.items()))


def stages(sides: dict[str, Side], rounds: int) -> str:
    """Return a table of the median CPU seconds of each stage."""
    lines = [["stage, CPU s", *sides], ["---"] * (1 + len(sides))]
    for stage in STAGES:
        lines.append([stage, *(f"{statistics.median(side.seconds[stage][-rounds:]):.3f}" for side in sides.values())])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def reduced(options: argparse.Namespace) -> list[str]:
    """Return what is smaller than published."""
    told = [f"{options.blocks} blocks of the transformer"] if options.blocks else []
    return [*told, f"{options.text_layers} layers of text"] if options.text_layers < LAYERS else told


def main() -> None:
    """Print the tables of all products, or of those asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PRODUCTS, default=list(PRODUCTS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warmups", type=int, default=1)
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--blocks", type=int, default=0, help="blocks of the transformer; all if not given")
    parser.add_argument("--text-layers", type=int, default=LAYERS)
    parser.add_argument("--compile", action="store_true", help="also both sides compiled")
    parser.add_argument("--quick", action="store_true", help="256 px, few layers, one round without warm-up")
    options = parser.parse_args()
    if options.quick:
        options.size, options.rounds, options.warmups, options.blocks, options.text_layers = 256, 1, 0, 3, 2
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    tokens, encoder = tokenizer(), text_encoder(options.text_layers)
    card = CARDS["sana-0.6b-1024"]
    vae = filled(lambda: sana.AutoencoderDC(**card.autoencoder.to_dict()), torch.bfloat16, 2)
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels).resize((options.size, options.size))
    for name in options.only:
        product = PRODUCTS[name]
        card = CARDS[product.card]
        fields = {**card.transformer.to_dict(), **({"num_layers": options.blocks} if options.blocks else {})}
        transformer = filled(partial(sana.SanaTransformer2DModel, **fields), torch.bfloat16, 1)
        controlnet = filled(partial(make_branch, fields, 2 if options.blocks else 7), torch.bfloat16, 3)
        shared = {"tokens": tokens, "encoder": encoder, "vae": vae, "picture": picture, "options": options}
        run(product, Models(card=card, transformer=transformer, controlnet=controlnet, **shared))


def make_branch(fields: dict[str, Any], num_layers: int) -> sana.SanaControlNetModel:
    """Return a control network for a transformer; published ones have no norms of queries and keys."""
    known = sana.SanaControlNetModel.config_type.from_dict({}).to_dict()
    return sana.SanaControlNetModel(**{**{name: fields[name] for name in known}, "num_layers": num_layers})


_MUST = "must 1.3x, aim 1.7x"
PRODUCTS = {
    "pag": Product(
        name="Perturbed-attention guidance with classifier-free guidance",
        card="sana-0.6b-1024",
        make=partial(guided, kind="SanaPAGPipeline", pag_scale=3.0),
        goal=_MUST,
    ),
    "controlnet": Product(
        name="ControlNet with classifier-free guidance",
        card="sana-0.6b-1024",
        make=partial(guided, kind="SanaControlNetPipeline", parts=("controlnet",)),
        goal=_MUST,
    ),
    "image-to-image": Product(
        name="Image-to-image, SANA-Sprint, one of two steps (strength 0.5)",
        card="sana-sprint-0.6b-1024",
        make=partial(sprint, kind="SanaSprintImg2ImgPipeline", num_inference_steps=2, strength=0.5),
        goal=_MUST,
    ),
    "sprint": Product(
        name="SANA-Sprint, one step",
        card="sana-sprint-0.6b-1024",
        make=partial(sprint, kind="SanaSprintPipeline", num_inference_steps=1, intermediate_timesteps=None),
        goal="must 1.6x, compiled 2.2x; aim 2.0x and 3.5x",
    ),
    "sketch-1": Product(
        name="SANA-Sprint with ControlNet, one step",
        card="sana-sprint-0.6b-1024",
        make=partial(sketch, steps=1),
        goal="real-time sketching",
    ),
    "sketch-2": Product(
        name="SANA-Sprint with ControlNet, two steps",
        card="sana-sprint-0.6b-1024",
        make=partial(sketch, steps=2),
        goal="real-time sketching",
    ),
}


if __name__ == "__main__":
    main()
