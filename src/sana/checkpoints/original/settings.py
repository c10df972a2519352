"""The YAML files of the original code, read by conversion: to a model's configuration, its card, and a recipe of ours.

Only plain values are read, and nothing in a file names code. Source: the published configuration files.
"""

import importlib
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sana.cards import CARDS, Card
from sana.checkpoints.bounds import shown
from sana.checkpoints.foreign import first_line
from sana.config import ControlNetConfig, TransformerConfig
from sana.errors import CheckpointError, InvalidInput, ModelNotFound, did_you_mean
from sana.text.instruction import COMPLEX_HUMAN_INSTRUCTION

_log = logging.getLogger(__name__)

MAX_YAML = 1 << 20
"""Bytes of the largest file that is read; published ones have four thousand."""
MAX_DEPTH = 16
"""Collections inside each other; published files have three. The time that YAML takes grows with their square."""

_MODEL = re.compile(r"Sana(?:MS|MSCM|MSControlNet|MSAdaLN)?_(\d+)M_P(\d)_D(\d+)")
_LARGE = (70, 20, 112)
_WIDTHS = {600: (36, 16, 72), 1600: _LARGE, 2400: _LARGE, 3200: _LARGE, 4800: _LARGE}
"""Millions of parameters in a name -> heads of the linear attention, heads and head width of the other."""
_SAMPLERS = {"flow_dpm-solver": "flow-dpm", "dpm-solver": "flow-dpm", "flow_euler": "flow-euler", "scm": "scm"}
_PRECISIONS = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}


@dataclass(frozen=True, kw_only=True)
class OriginalConfig:
    """What a configuration file of the original code says, in our terms."""

    transformer: TransformerConfig
    controlnet: ControlNetConfig | None
    image_size: int
    dtype: str
    """Precision of the transformer."""
    flow_shift: float
    sampler: str
    pag_layers: tuple[str, ...] | None
    instruction: tuple[str, ...] | None
    """The lines before a prompt."""
    max_length: int
    """Tokens of a prompt."""
    autoencoder: str | None
    """Where the original code takes the autoencoder from."""
    training: Mapping[str, Any]
    remarks: tuple[str, ...] = ()
    """A sentence for every key that is unknown or that was read in another way than it is written."""

    def card(self) -> Card:
        """Return the card of this model, or the nearest one with what the file says."""
        alike = [card for card in CARDS.values() if card.hub_id and card.transformer == self.transformer]
        product = "sprint" if self.transformer.guidance_embeds else "controlnet" if self.controlnet else None
        wanted = [card for card in alike if product is None or card.product == product]
        exact = [card for card in wanted if card.dtypes["transformer"] == self.dtype]
        found = next(iter([*exact, *wanted, *alike]), None)
        known = found or CARDS["sana-sprint-1.6b-1024" if self.transformer.guidance_embeds else "sana-1.6b-1024"]
        return replace(
            known,
            transformer=self.transformer,
            base_size=self.image_size,
            flow_shift=self.flow_shift,
            sampler=self.sampler,
            pag_layers=self.pag_layers or known.pag_layers,
        )

    def recipe(self) -> dict[str, Any]:
        """Return the tables of a training recipe of ours with what the file says of training."""
        train, optimizer = self.training, self.training.get("optimizer") or {}
        arguments = train.get("lr_schedule_args") or {}
        betas = tuple(optimizer.get("betas") or (0.9, 0.999))[:2]
        precision = "float32" if self.dtype == "float32" else "bf16"  # half precision does not train stably
        return {
            "objective": "flow_matching",
            "run": {
                "batch_size": int(train.get("train_batch_size", 1)),
                "accumulate": int(train.get("gradient_accumulation_steps", 1)),
                "seed": int(train.get("seed", 0)),
                "precision": precision,
                "log_every": int(train.get("log_interval", 20)),
                "save_every": int(train.get("save_model_steps", 500)),
                "evaluate_every": int(train.get("eval_sampling_steps", 500)),
                "ema": float(train.get("ema_rate", 0.9999)) if train.get("ema_update") else 0.0,
            },
            "optimizer": {
                "name": "adamw",
                "lr": float(optimizer.get("lr", 1e-4)),
                "betas": betas,
                "weight_decay": float(optimizer.get("weight_decay", 0.0)),
                "warmup": int(arguments.get("num_warmup_steps", 0)),
                "decay_share": 0.0,
                "clip": float(train.get("gradient_clip", 1.0)),
            },
            "flow_matching": {"shift": self.flow_shift, "model": self.transformer.to_dict()},
        }


def read_original_config(path: str | Path) -> OriginalConfig:
    """Read a YAML file of the original code; of a published one its name will do, where the file is not here.

    Errors: ModelNotFound when there is none; CheckpointError when it is no YAML mapping or names no known model.
    """
    file = Path(path).expanduser()
    try:
        text = file.read_bytes()
    except FileNotFoundError as error:
        if file.stem in PUBLISHED:
            return _published(file.stem)
        hint = did_you_mean(file.stem, PUBLISHED)
        raise ModelNotFound(
            f"There is no configuration file '{path}', and no published one of that name.{hint}"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    if len(text) > MAX_YAML:
        raise CheckpointError(f"{path} has more than {MAX_YAML >> 20} MB, which no configuration has: do not use it.")
    yaml: Any = importlib.import_module("yaml")  # it has no types of its own
    try:
        _check_events(yaml, text, str(path))
        value = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} is not valid YAML: {shown(first_line(error))}.") from error
    return convert_original_config(value, str(path))


def _check_events(yaml: Any, text: bytes, where: str) -> None:
    """Refuse aliases and deep nesting, by which a small file becomes a large value or a long wait."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise CheckpointError(f"{where} uses YAML aliases, which no published configuration does: do not use it.")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise CheckpointError(f"{where} nests its values too deep for a configuration: do not use it.")


def _published(stem: str) -> OriginalConfig:
    """Return what a published file says, from the card of its model."""
    name, shift = PUBLISHED[stem]
    card = CARDS[name]
    return OriginalConfig(
        transformer=card.transformer,
        controlnet=card.controlnet,
        image_size=card.base_size,
        dtype=card.dtypes["transformer"],
        flow_shift=shift,
        sampler=card.sampler,
        pag_layers=card.pag_layers,
        instruction=COMPLEX_HUMAN_INSTRUCTION,
        max_length=300,
        autoencoder=None,
        training={},
        remarks=("The file is not here; what was published under its name is used.",),
    )


def convert_original_config(value: Any, where: str) -> OriginalConfig:
    """Convert the content of such a file; errors as `read_original_config`."""
    if not isinstance(value, Mapping) or not isinstance(value.get("model"), Mapping):
        raise CheckpointError(f"{where} is no configuration of the original code: it has no section 'model'.")
    sections = {name: dict(found) if isinstance(found := value.get(name), Mapping) else {} for name in KNOWN}
    remarks = _unknown(value, sections)
    model, scheduler = sections["model"], sections["scheduler"]
    if "predict_v" in scheduler:  # the file of the Sprint teacher, which the original's own parser refuses
        scheduler.setdefault("predict_flow_v", scheduler["predict_v"])
        remarks.append("scheduler.predict_v is read as predict_flow_v.")
    if scheduler.get("predict_flow_v") is False:
        raise CheckpointError(f"{where} predicts noise, not velocity (predict_flow_v); no published SANA model does.")
    try:
        transformer, controlnet = _networks(model, scheduler, sections["text_encoder"], where)
        vis = str(scheduler.get("vis_sampler", "flow_dpm-solver"))
        guided = transformer.guidance_embeds
        if not guided and vis not in _SAMPLERS:
            remarks.append(f"scheduler.vis_sampler {shown(vis)} is not here; flow-dpm takes its place.")
        shift = scheduler.get("inference_flow_shift") or scheduler.get("flow_shift") or (1.0 if guided else 3.0)
        layers = model.get("pag_applied_layers")
        lines = sections["text_encoder"].get("chi_prompt")
        lines = lines.splitlines() if isinstance(lines, str) else lines
        size, length = model.get("image_size", 1024), sections["text_encoder"].get("model_max_length", 300)
        _check_range("image_size", size, 32, 16384)
        _check_range("model_max_length", length, 1, 4096)
        _check_range("flow_shift", shift, 1e-3, 1e3)
        for number in layers or ():
            _check_range("pag_applied_layers", number, 0, transformer.num_layers - 1)
        return OriginalConfig(
            transformer=transformer,
            controlnet=controlnet,
            image_size=int(size),
            dtype=_PRECISIONS.get(str(model.get("mixed_precision", "fp16")), "float32"),
            flow_shift=float(shift),
            sampler="scm" if guided else _SAMPLERS.get(vis, "flow-dpm"),
            pag_layers=tuple(f"transformer_blocks.{int(number)}" for number in layers) if layers else None,
            instruction=tuple(str(line) for line in lines) if lines else None,
            max_length=int(length),
            autoencoder=sections["vae"].get("vae_pretrained"),
            training=sections["train"],
            remarks=tuple(remarks),
        )
    except (TypeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        text = f"{where} cannot be converted ({shown(first_line(error))})"
        raise CheckpointError(f"{text}: compare it with a published file.") from error


def open_fields(value: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """Return what a file, or its content, says of a transformer that the tensors of its weights leave open."""
    named = isinstance(value, str | Path)
    found = (
        read_original_config(value) if isinstance(value, str | Path) else convert_original_config(value, "the mapping")
    )
    for remark in found.remarks:
        _log.warning("%s: %s", value if named else "original_config", remark)
    return {name: getattr(found.transformer, name) for name in ("sample_size", "interpolation_scale", "timestep_scale")}


def _check_range(name: str, value: Any, low: float, high: float) -> None:
    if not low <= float(value) <= high:
        raise InvalidInput(f"{name} is {shown(value)}; it must lie between {low:g} and {high:g}")


def _networks(
    model: Mapping[str, Any], scheduler: Mapping[str, Any], text: Mapping[str, Any], where: str
) -> tuple[TransformerConfig, ControlNetConfig | None]:
    name = str(model.get("model", ""))
    match = _MODEL.fullmatch(name)
    if match is None:
        raise CheckpointError(f"{where} names the model {shown(name)!r}, which is no SANA image model.")
    millions, patch, depth = (int(number) for number in match.groups())
    if millions not in _WIDTHS or depth > 200:
        raise CheckpointError(f"{where} names the model {shown(name)!r}, whose size no SANA model has.")
    heads, cross, cross_dim = _WIDTHS[millions]
    size = int(model.get("image_size", 1024)) // 32
    guided = bool(model.get("cfg_embed")) or name.startswith("SanaMSCM")
    norms = {bool(model.get("qk_norm")), bool(model.get("cross_norm", model.get("qk_norm")))}
    if len(norms) > 1:
        raise InvalidInput("qk_norm and cross_norm differ")
    # Time goes in as a share of 1 where the factor is 1000; Sprint's own loop gives it so, flow samplers do not.
    scaled = float(scheduler.get("timestep_norm_scale_factor") or 1.0)
    fields: dict[str, Any] = {
        "num_attention_heads": heads,
        "attention_head_dim": int(model.get("linear_head_dim", 32)),
        "num_layers": depth,
        "num_cross_attention_heads": cross,
        "cross_attention_head_dim": cross_dim,
        "cross_attention_dim": heads * 32,
        "caption_channels": int(text.get("caption_channels", 2304)),
        "mlp_ratio": float(model.get("mlp_ratio", 2.5)),
        "patch_size": patch,
        "sample_size": size,
        "interpolation_scale": float(model.get("pe_interpolation") or 1.0) if model.get("use_pe") else None,
    }
    transformer = TransformerConfig(
        **fields,
        qk_norm="rms_norm_across_heads" if True in norms else None,
        guidance_embeds=guided,
        guidance_embeds_scale=float(model.get("cfg_embed_scale", 0.1)),
        timestep_scale=1.0 if guided else 1.0 / scaled,
    )
    controlled = "ControlNet" in name
    return transformer, ControlNetConfig(**{**fields, "num_layers": 7}) if controlled else None


def _unknown(value: Mapping[str, Any], sections: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Say which keys no published file has; they change nothing here."""
    remarks = []
    for name, entry in value.items():
        if name in KNOWN and not isinstance(entry or {}, Mapping):
            remarks.append(f"{name} should be a section and is left out.")
        elif name not in KNOWN and name not in _TOP:
            remarks.append(f"{shown(str(name))} is unknown and is left out.{did_you_mean(str(name), (*KNOWN, *_TOP))}")
    for section, keys in sections.items():
        for key in keys:
            if key not in KNOWN[section]:
                hint = did_you_mean(str(key), KNOWN[section])
                remarks.append(f"{section}.{shown(str(key))} is unknown and is left out.{hint}")
    return remarks


_TOP = (
    "work_dir",
    "resume_from",
    "load_from",
    "debug",
    "report_to",
    "tracker_project_name",
    "name",
    "loss_report_name",
)
PUBLISHED: dict[str, tuple[str, float]] = {
    "Sana_600M_img512": ("sana-0.6b-512", 3.0),
    "Sana_600M_img1024": ("sana-0.6b-1024", 4.0),
    "Sana_600M_app": ("sana-0.6b-1024", 4.0),
    "Sana_1600M_img512": ("sana-1.6b-512", 3.0),
    "Sana_1600M_img1024": ("sana-1.6b-1024-fp16", 3.0),
    "Sana_1600M_app": ("sana-1.6b-1024-fp16", 3.0),
    "Sana_1600M_img2048_bf16": ("sana-1.6b-2k", 3.0),
    "Sana_1600M_img4096_bf16": ("sana-1.6b-4k", 6.0),
    "Sana_1600M_1024px_allqknorm_bf16_lr2e5": ("sana1.5-1.6b-1024", 3.0),
    "Sana_4800M_1024px_came8bit_grow_constant_allqknorm_bf16_lr2e5": ("sana1.5-4.8b-1024", 3.0),
    "SanaSprint_1600M_1024px_allqknorm_bf16_scm_ladd": ("sana-sprint-1.6b-1024", 1.0),
    "SanaSprint_600M_1024px_allqknorm_bf16_scm_ladd": ("sana-sprint-0.6b-1024", 1.0),
    "Sana_1600M_1024px_controlnet_bf16": ("sana-1.6b-1024-controlnet-hed", 3.0),
    "Sana_600M_img1024_controlnet": ("sana-0.6b-1024-controlnet-hed", 4.0),
}
"""Name of a published file -> card of its model, and the shift that the file says (0.6B was published here with 3)."""

KNOWN: dict[str, frozenset[str]] = {
    section: frozenset(words.split())
    for section, words in {
        "data": """
            data_dir image_size caption_proportion external_caption_suffixes external_clipscore_suffixes
            clip_thr clip_thr_temperature del_img_clip_thr load_text_feat load_vae_feat transform type
            sort_dataset hq_only valid_num caption_selection_type aspect_ratio_type meta_path num_frames
        """,
        "model": """
            model teacher_model image_size mixed_precision fp32_attention load_from resume_from
            aspect_ratio_type multi_scale pe_interpolation micro_condition attn_type
            autocast_linear_attn linear_head_dim ffn_type mlp_acts mlp_ratio use_pe pos_embed_type
            qk_norm cross_norm cross_attn_type class_dropout_prob cfg_scale cfg_embed cfg_embed_scale
            guidance_type pag_applied_layers logvar ladd_multi_scale head_block_ids extra num_layers
        """,
        "vae": """
            vae_type vae_pretrained scale_factor vae_latent_dim vae_downsample_rate sample_posterior
            weight_dtype if_cache cache_dir extra
        """,
        "text_encoder": """
            text_encoder_name caption_channels y_norm y_norm_scale_factor model_max_length chi_prompt
            extra
        """,
        "scheduler": """
            train_sampling_steps predict_flow_v predict_v noise_schedule pred_sigma learn_sigma
            flow_shift inference_flow_shift weighting_scheme weighting_scheme_discriminator logit_mean
            logit_std logit_mean_discriminator logit_std_discriminator sigma_data vis_sampler
            timestep_norm_scale_factor add_noise_timesteps extra
        """,
        "controlnet": """
            control_signal_type validation_scribble_maps
        """,
        "train": """
            num_workers seed train_batch_size num_epochs gradient_accumulation_steps grad_checkpointing
            gradient_clip optimizer optimizer_D load_from_optimizer load_from_lr_scheduler
            resume_lr_scheduler lr_schedule lr_schedule_args auto_lr ema_update ema_rate use_fsdp
            early_stop_hours log_interval save_model_epochs save_model_steps eval_sampling_steps
            visualize local_save_vis deterministic_validation online_metric eval_metric_step
            online_metric_dir debug_nan skip_step work_dir validation_prompts loss_type huber_c gc_step
            mask_type mask_loss_coef snr_loss real_prompt_ratio training_hours cfg_interval
            scm_cfg_scale tangent_warmup_steps adv_lambda scm_lambda scm_loss misaligned_pairs_D
            discriminator_loss ladd_multi_scale train_largest_timestep largest_timestep
            largest_timestep_prob suffix_checkpoints start_step use_lr lora_rank negative_prompt
            null_embed_root extra
        """,
    }.items()
}
"""Section -> keys of the published files and of the original's own settings."""
