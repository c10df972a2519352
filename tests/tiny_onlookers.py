"""Tiny random models that look at pictures, in the layout of transformers: CLIP, LLaVA and Qwen2-VL."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors

WORDS = ("a", "red", "blue", "fish", "boat", "above", "the", "picture", "of", "number", "one", "two", "describe", "it")
VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'image' %}<image> "
    "{% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %}:{% endif %}"
)


def words(*, around: bool) -> Any:
    """A tokenizer of whole words; with `around`, texts stand between <bos> and <eos> as CLIP wants it."""
    from transformers import PreTrainedTokenizerFast

    names = ("<pad>", "<unk>", "<bos>", "<image>", ":", *WORDS, "<eos>")
    plain = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    if around:
        special = [("<bos>", names.index("<bos>")), ("<eos>", names.index("<eos>"))]
        plain.post_processor = processors.TemplateProcessing(single="<bos> $A <eos>", special_tokens=special)
    return PreTrainedTokenizerFast(
        tokenizer_object=plain,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<eos>",
        extra_special_tokens={"image_token": "<image>"},
        model_max_length=77,
    )


def picture_reader() -> Any:
    """What makes CLIP's input of pictures."""
    import transformers

    with_pil = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    return with_pil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


def save_clip(folder: Path) -> Path:
    """Write a CLIP."""
    from transformers import CLIPConfig, CLIPModel

    tokenizer = words(around=True)
    text = {**VISION, "vocab_size": len(tokenizer), "max_position_embeddings": 77, "eos_token_id": len(tokenizer) - 1}
    torch.manual_seed(3)
    config = CLIPConfig(
        text_config={**text, "bos_token_id": 2, "pad_token_id": 0},
        vision_config={**VISION, "image_size": 32, "patch_size": 8},
        projection_dim=12,
    )
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    picture_reader().save_pretrained(folder)
    return folder


def save_describer(folder: Path) -> Path:
    """Write a LLaVA that answers with random words that depend on the picture."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

    tokenizer = words(around=False)
    torch.manual_seed(5)
    text = LlamaConfig(**VISION, vocab_size=len(tokenizer), bos_token_id=2, eos_token_id=len(tokenizer) - 1,
                       pad_token_id=0, num_key_value_heads=2)  # fmt: skip
    vision = CLIPVisionConfig(**VISION, image_size=32, patch_size=8)
    model = LlavaForConditionalGeneration(
        LlavaConfig(text_config=text, vision_config=vision, image_token_index=3, vision_feature_layer=-1)
    )
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(8 if weight.ndim > 1 else 1)  # so that pictures make a difference
        model.lm_head.weight[:5] = 0
        model.lm_head.weight[-1] = 0
    model.save_pretrained(folder)
    LlavaProcessor(
        image_processor=picture_reader(),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    ).save_pretrained(folder)
    return folder


def save_video_describer(folder: Path) -> Path:
    """Write a Qwen2-VL, whose processor also reads videos."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    tokenizer = words(around=False)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(7)
    text = {**VISION, "num_key_value_heads": 2, "vocab_size": len(tokenizer), "bos_token_id": 2, "pad_token_id": 0}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2}
    config = Qwen2VLConfig(
        text_config={**text, "eos_token_id": len(tokenizer) - 1, "rope_parameters": rope},
        vision_config=vision,
        image_token_id=3,
        video_token_id=len(tokenizer) - 2,
        vision_start_token_id=4,
    )
    model = Qwen2VLForConditionalGeneration(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(8 if weight.ndim > 1 else 1)
        model.lm_head.weight[[*range(5), -1]] = 0
    model.save_pretrained(folder)
    settings = {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2VLProcessor"}
    sizes = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2, "min_pixels": 256, "max_pixels": 1024}
    (folder / "preprocessor_config.json").write_text(json.dumps({**settings, **sizes}))
    (folder / "chat_template.jinja").write_text(TEMPLATE.replace("<image> ", ":<image>: "))
    return folder
