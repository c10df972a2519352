"""Card: what must be known about a model before it is loaded. Torch-free; `sana.cards` is the table of them."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from sana.config import AutoencoderConfig, ControlNetConfig, TransformerConfig

NVIDIA_LICENCE = "NVIDIA licence (NSCL v2-custom) and Gemma terms of use"
GEMMA_TERMS = ("https://ai.google.dev/gemma/terms", "https://ai.google.dev/gemma/prohibited_use_policy")
PUBLISHED_LIMITS = (
    "photographs are not perfectly real",
    "longer text in a picture is not legible",
    "hands, fingers and crowded scenes often go wrong",
    "the autoencoder loses fine detail",
)
PUBLISHED_BIAS = "It can repeat, or make stronger, the social biases of its training pictures."
PUBLISHED_SCOPE = "True pictures of real people or events: it was not trained for facts."
HALF = {"transformer": "float16", "text_encoder": "bfloat16", "vae": "bfloat16"}
BFLOAT = {"transformer": "bfloat16", "text_encoder": "bfloat16", "vae": "bfloat16"}
FULL = {"transformer": "float32", "text_encoder": "float32", "vae": "float32"}

TEXT_ENCODER_PARAMS = 2_614_341_888
"""Gemma-2-2B without its language head, which every published model brings along."""
AUTOENCODER_PARAMS = 312_250_275
"""DC-AE f32c32, encoder and decoder."""
TOKENIZER_BYTES = 40_000_000
_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True, kw_only=True)
class Card:
    """What must be known about a model before it is loaded, and what it is best run with."""

    name: str
    """Name on the command line."""
    transformer: TransformerConfig
    """Architecture of the diffusion transformer."""
    params: int
    """Parameters of the transformer."""
    base_size: int
    """Side in pixels of the pictures it was trained on."""
    hub_id: str | None = None
    """Repository on the Hugging Face hub; None for a built-in model."""
    original: str | None = None
    """The same model as a file of the original code, `hf://organisation/repository/path`; None where there is none."""
    base: str | None = None
    """The card whose folder supplies the parts that this model does not bring along; None where it brings all."""
    folder: str | None = None
    """Folder under the package's assets for a built-in model; None for one that is downloaded."""
    shared: tuple[str, ...] = ()
    """Parts of a built-in model that lie in the folder of `base`."""
    variant: str | None = None
    """File variant to load, or None where the repository has only plain files."""
    product: str = "text-to-image"
    """text-to-image, sprint or controlnet."""
    controlnet: ControlNetConfig | None = None
    """Architecture of the control branch."""
    control_params: int = 0
    """Parameters of the control branch."""
    control: str | None = None
    """Kind of picture that the control branch follows, as `--control` names it."""
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    """Architecture of the autoencoder."""
    flow_shift: float = 3.0
    """Shift of the sigma grid towards noise; scm has none."""
    sampler: str = "flow-dpm"
    """Sampler the model is run with by default: flow-dpm or scm."""
    dtypes: Mapping[str, str] = field(default_factory=lambda: dict(BFLOAT))
    """Recommended dtype of each part. The text encoder and the autoencoder break in float16."""
    steps: int = 20
    """Default number of steps."""
    guidance: float = 4.5
    """Default guidance scale."""
    pag_layers: tuple[str, ...] = ("transformer_blocks.8",)
    """Blocks that perturbed-attention guidance perturbs by default."""
    sizes: tuple[tuple[int, int], ...] | None = None
    """The only (height, width) it draws; None means any multiple of 32."""
    languages: tuple[str, ...] = ("en", "zh", "emoji")
    """What prompts may be written in."""
    licence: str = NVIDIA_LICENCE
    """Terms of the weights."""
    research_only: bool = True
    """Whether the model card limits use to research."""
    draws_cutouts: bool = False
    """Whether it knows the drawn world of paper cut-outs, which has prompts and an exact judge of its own."""
    note: str = ""
    """What a user should know before choosing it."""
    limits: tuple[str, ...] = PUBLISHED_LIMITS
    """What it does badly."""
    bias: str = PUBLISHED_BIAS
    """What its training data may have taught it."""
    not_for: str = PUBLISHED_SCOPE
    """What it must not be used for, besides what the licence forbids."""

    @property
    def terms(self) -> tuple[str, ...]:
        """Where the terms of the weights can be read."""
        return () if not self.hub_id else (f"https://huggingface.co/{self.hub_id}", *GEMMA_TERMS)

    @property
    def is_single_file(self) -> bool:
        """Whether it is published as an original file, without a folder around it."""
        return self.base is not None and self.folder is None

    @property
    def home(self) -> str:
        """The card by whose name all parts of a pipeline are found in folders: its own, or that of `base`."""
        return self.name if self.base is None or self.folder is not None else self.base

    @property
    def download_bytes(self) -> dict[str, int]:
        """About how many bytes of each part are downloaded: its parameters in the precision they are published in."""
        if not self.hub_id:
            return {}
        counts = {
            "text_encoder": TEXT_ENCODER_PARAMS,
            "transformer": self.params,
            "vae": AUTOENCODER_PARAMS,
            **({"controlnet": self.control_params} if self.control_params else {}),
        }
        own = ("transformer", "controlnet") if self.is_single_file else ()  # the original files are all in float32
        kinds = {"controlnet": self.dtypes["transformer"], **self.dtypes, **dict.fromkeys(own, "float32")}
        sizes = {part: count * _BYTES[kinds[part]] for part, count in counts.items()}
        return {"tokenizer": TOKENIZER_BYTES, **sizes}
