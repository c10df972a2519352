"""CARDS: one table of every released SANA checkpoint and of the built-in models. Torch-free.

Sources: the model tables of the public documentation (hub ids, variants, dtypes), the model cards (licence, languages,
limits, bias) and the published configuration files. Parameter counts are those of the transformer.
"""

from dataclasses import replace
from typing import Any

from sana.card import FULL as FULL
from sana.card import HALF
from sana.card import Card as Card
from sana.config import AutoencoderConfig, ControlNetConfig, TransformerConfig

SANA_AUTOENCODER = AutoencoderConfig(
    encoder_block_types=("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
    decoder_block_types=("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
    upsample_block_type="interpolate",
    downsample_block_type="Conv",
    scaling_factor=0.41407,
)
"""DC-AE f32c32, versions sana-1.0 and sana-1.1."""

_LARGE = TransformerConfig()
_SMALL = TransformerConfig(
    num_attention_heads=36,
    num_layers=28,
    num_cross_attention_heads=16,
    cross_attention_head_dim=72,
    cross_attention_dim=1152,
)
_SMALL_CONTROL = ControlNetConfig(
    num_attention_heads=36, num_cross_attention_heads=16, cross_attention_head_dim=72, cross_attention_dim=1152
)
_LARGE_NORMED = replace(_LARGE, qk_norm="rms_norm_across_heads")
_SMALL_NORMED = replace(_SMALL, qk_norm="rms_norm_across_heads")
_HUB = "Efficient-Large-Model/"
_SMALL_PAG = ("transformer_blocks.14",)


def _original(repository: str, name: str | None = None) -> str:
    return f"hf://{_HUB}{repository}/checkpoints/{name or repository}.pth"


_BF16 = Card(
    name="sana-1.6b-1024",
    hub_id=_HUB + "Sana_1600M_1024px_BF16_diffusers",
    original=_original("Sana_1600M_1024px_BF16"),
    variant="bf16",
    transformer=_LARGE,
    params=1_604_462_752,
    base_size=1024,
    autoencoder=SANA_AUTOENCODER,
    note="The usual choice.",
)
_FP16 = replace(
    _BF16,
    name="sana-1.6b-1024-fp16",
    hub_id=_HUB + "Sana_1600M_1024px_diffusers",
    original=_original("Sana_1600M_1024px"),
    variant="fp16",
    dtypes=HALF,
    languages=("en",),
    note="Users report blotches from some half-precision runs; sana-1.6b-1024 is the clean one.",
)
_MULTILING = replace(_FP16, languages=_BF16.languages, note="")
_SANA_15 = replace(
    _BF16,
    name="sana1.5-1.6b-1024",
    hub_id=_HUB + "SANA1.5_1.6B_1024px_diffusers",
    original=_original("SANA1.5_1.6B_1024px"),
    variant=None,
    transformer=_LARGE_NORMED,
    params=1_604_641_952,
    note="Higher published scores than sana-1.6b-1024 at the same cost.",
)
_SPRINT = replace(
    _SANA_15,
    name="sana-sprint-1.6b-1024",
    hub_id=_HUB + "Sana_Sprint_1.6B_1024px_diffusers",
    original=_original("Sana_Sprint_1.6B_1024px"),
    product="sprint",
    sampler="scm",
    steps=2,
    transformer=replace(_LARGE_NORMED, guidance_embeds=True),
    params=1_610_237_472,
    note="One to four steps.",
)
_TEACHER = replace(
    _SANA_15,
    name="sana-sprint-teacher-1.6b-1024",
    hub_id=_HUB + "SANA_Sprint_1.6B_1024px_teacher_diffusers",
    original=_original("SANA_Sprint_1.6B_1024px_teacher"),
    transformer=replace(_LARGE_NORMED, timestep_scale=0.001),
    note="For distillation; it needs the full number of steps.",
)
# Small widths, no multi-scale attention; the recipes in recipes/nano train exactly these.
_NANO_WIDTHS = (16, 16, 64, 128, 256, 256)
_NANO_BACKBONE: dict[str, Any] = {
    "num_attention_heads": 8,
    "num_cross_attention_heads": 4,
    "cross_attention_head_dim": 64,
    "cross_attention_dim": 256,
    "caption_channels": 192,
    "mlp_ratio": 2.0,
    "sample_size": 8,
    "qk_norm": "rms_norm_across_heads",
    "interpolation_scale": 1.0,
}
_NANO = Card(
    name="nano",
    folder="nano",
    transformer=TransformerConfig(**_NANO_BACKBONE, num_layers=6),
    params=6_254_624,
    base_size=256,
    autoencoder=AutoencoderConfig(
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=_NANO_WIDTHS,
        decoder_block_out_channels=_NANO_WIDTHS,
        encoder_layers_per_block=(0, 1, 1, 1, 1, 1),
        decoder_layers_per_block=(0, 1, 1, 1, 2, 2),
        encoder_qkv_multiscales=((),) * 6,
        decoder_qkv_multiscales=((),) * 6,
        encoder_out_shortcut=False,
        decoder_in_shortcut=False,
        scaling_factor=1.00543,
    ),
    flow_shift=2.5,
    pag_layers=("transformer_blocks.3",),
    dtypes=FULL,
    sizes=((256, 256),),
    languages=("en", "zh", "emoji"),
    licence="Apache-2.0",
    research_only=False,
    draws_cutouts=True,
    note="A toy that comes with the package: it draws the paper cut-outs it was trained on, to show that all works.",
    limits=(
        "it knows a few shapes, colours and places, and nothing else",
        "words beyond these are ignored or misread",
    ),
    bias="It saw drawn shapes only: no people, no photographs.",
    not_for="Pictures to be used: it is there to try and to test the program.",
)
_NANO_SPRINT = replace(
    _NANO,
    name="nano-sprint",
    folder="nano-sprint",
    base="nano",
    shared=("tokenizer", "text_encoder", "vae"),
    product="sprint",
    sampler="scm",
    steps=2,
    transformer=replace(_NANO.transformer, guidance_embeds=True),
    params=6_386_208,
    note="A toy, too: nano distilled to draw in one to four steps.",
)
_NANO_CONTROL = replace(
    _NANO,
    name="nano-controlnet",
    folder="nano-controlnet",
    base="nano",
    shared=("tokenizer", "text_encoder", "vae", "transformer", "scheduler"),
    product="controlnet",
    controlnet=ControlNetConfig(**_NANO_BACKBONE, num_layers=3),
    control_params=3_711_232,
    control="ink",
    note="A toy, too: nano with a branch that follows the outlines of a picture, while the prompt decides the colours.",
)

_CONTROL = replace(
    _BF16,
    name="sana-1.6b-1024-controlnet-hed",
    hub_id=_HUB + "Sana_1600M_1024px_BF16_ControlNet_HED",
    original=_original("Sana_1600M_1024px_BF16_ControlNet_HED"),
    base="sana-1.6b-1024",
    variant=None,
    product="controlnet",
    controlnet=ControlNetConfig(),
    control_params=631_576_960,
    control="soft-edge",
    note="Follows soft edges or a sketch. One original file with the transformer; it is wired as its authors did.",
)

_ALL = (
    _NANO,
    _NANO_SPRINT,
    _NANO_CONTROL,
    _BF16,
    _FP16,
    replace(
        _MULTILING,
        name="sana-1.6b-1024-multiling",
        hub_id=_HUB + "Sana_1600M_1024px_MultiLing_diffusers",
        original=_original("Sana_1600M_1024px_MultiLing"),
        note="Users report bad pictures in half precision; sana-1.6b-1024 knows the same languages.",
    ),
    replace(
        _FP16,
        name="sana-1.6b-512",
        hub_id=_HUB + "Sana_1600M_512px_diffusers",
        original=_original("Sana_1600M_512px"),
        transformer=replace(_LARGE, sample_size=16),
        base_size=512,
        note="",
    ),
    replace(
        _MULTILING,
        name="sana-1.6b-512-multiling",
        hub_id=_HUB + "Sana_1600M_512px_MultiLing_diffusers",
        original=_original("Sana_1600M_512px_MultiLing"),
        transformer=replace(_LARGE, sample_size=16),
        base_size=512,
    ),
    replace(
        _MULTILING,
        name="sana-0.6b-1024",
        hub_id=_HUB + "Sana_600M_1024px_diffusers",
        original=_original("Sana_600M_1024px", "Sana_600M_1024px_MultiLing"),
        pag_layers=_SMALL_PAG,
        transformer=_SMALL,
        params=591_747_872,
        note="Trained with flow shift 4, published with 3.",
    ),
    replace(
        _MULTILING,
        name="sana-0.6b-512",
        hub_id=_HUB + "Sana_600M_512px_diffusers",
        original=_original("Sana_600M_512px", "Sana_600M_512px_MultiLing"),
        pag_layers=_SMALL_PAG,
        transformer=replace(_SMALL, sample_size=16),
        params=591_747_872,
        base_size=512,
        note="The smallest download.",
    ),
    replace(
        _BF16,
        name="sana-1.6b-2k",
        hub_id=_HUB + "Sana_1600M_2Kpx_BF16_diffusers",
        original=_original("Sana_1600M_2Kpx_BF16"),
        transformer=replace(_LARGE, sample_size=64, interpolation_scale=1.0),
        base_size=2048,
        note="Decoding needs much memory: tile it.",
    ),
    replace(
        _BF16,
        name="sana-1.6b-4k",
        hub_id=_HUB + "Sana_1600M_4Kpx_BF16_diffusers",
        original=_original("Sana_1600M_4Kpx_BF16"),
        transformer=replace(_LARGE, sample_size=128, interpolation_scale=2.0),
        base_size=4096,
        flow_shift=6.0,
        note="Decoding needs very much memory: tile it, with tiles of 1024 pixels.",
    ),
    _SANA_15,
    replace(
        _SANA_15,
        name="sana1.5-4.8b-1024",
        hub_id=_HUB + "SANA1.5_4.8B_1024px_diffusers",
        original=_original("SANA1.5_4.8B_1024px"),
        transformer=replace(_LARGE_NORMED, num_layers=60),
        params=4_721_825_952,
        note="The highest published scores of the family, at three times the work of the 1.6B models.",
    ),
    _SPRINT,
    replace(
        _SPRINT,
        name="sana-sprint-0.6b-1024",
        hub_id=_HUB + "Sana_Sprint_0.6B_1024px_diffusers",
        original=_original("Sana_Sprint_0.6B_1024px"),
        pag_layers=_SMALL_PAG,
        transformer=replace(_SMALL_NORMED, guidance_embeds=True),
        params=593_501_216,
    ),
    _TEACHER,
    replace(
        _TEACHER,
        name="sana-sprint-teacher-0.6b-1024",
        hub_id=_HUB + "Sana_Sprint_0.6B_1024px_teacher_diffusers",
        original=_original("Sana_Sprint_0.6B_1024px_teacher"),
        pag_layers=_SMALL_PAG,
        transformer=replace(_SMALL_NORMED, timestep_scale=0.001),
        params=591_876_896,
    ),
    _CONTROL,
    replace(
        _CONTROL,
        name="sana-0.6b-1024-controlnet-hed",
        hub_id=_HUB + "Sana_600M_1024px_ControlNet_HED",
        original=_original("Sana_600M_1024px_ControlNet_HED"),
        base="sana-0.6b-1024",
        pag_layers=_SMALL_PAG,
        transformer=_SMALL,
        params=591_747_872,
        controlnet=_SMALL_CONTROL,
        control_params=168_765_696,
        dtypes=HALF,
    ),
    replace(
        _CONTROL,
        name="sana-0.6b-1024-controlnet",
        hub_id="ishan24/Sana_600M_1024px_ControlNetPlus_diffusers",
        original=None,
        base=None,
        variant="fp16",
        pag_layers=_SMALL_PAG,
        transformer=_SMALL,
        params=591_747_872,
        controlnet=_SMALL_CONTROL,
        control_params=168_765_696,
        dtypes=HALF,
        note="Follows soft edges or a sketch. A folder that others converted, wired as the pipelines for it do.",
    ),
)

CARDS: dict[str, Card] = {card.name: card for card in _ALL}
"""Every known model by name."""
