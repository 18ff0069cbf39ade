"""Hugging Face's architectures from small configurations of odd sizes."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from taylorkern.companion import torchvision

from .networks import Network
from .randomness import randomise, settle, strengthen

VOCABULARY = 101
WIDE, HEADS, LAYERS, INNER = 48, 4, 2, 80
CLASSES = {"num_labels": 10}
# Names for the same four sizes, as the families of configurations call them.
BERT = {
    "hidden_size": WIDE,
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "intermediate_size": INNER,
}
SEQUENCE_TO_SEQUENCE = {
    "d_model": WIDE,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": 6,
    "encoder_ffn_dim": INNER,
    "decoder_ffn_dim": 72,
    "decoder_start_token_id": 2,
}
TEXT = {"vocab_size": VOCABULARY, "max_position_embeddings": 64, "pad_token_id": 0}
DECODER = {**BERT, **TEXT, "use_cache": False, "bos_token_id": 1, "eos_token_id": 2}
GROUPED = {**DECODER, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10}
IMAGES = {"image_size": 32, "patch_size": 8}
VIT = {**BERT, **IMAGES, **CLASSES}


@dataclass(frozen=True)
class Recipe:
    model: str  # a class
    inputs: str  # a key of INPUTS
    config: dict[str, Any]
    attention: str = "sdpa"  # or eager


def _text(batch: int) -> dict[str, Tensor]:
    """The second sequence of a batch ends early."""
    tokens = torch.randint(3, VOCABULARY, (batch, 11))
    mask = torch.ones_like(tokens)
    mask[1:, 8:] = 0
    return {"input_ids": tokens, "attention_mask": mask}


def _tokens(batch: int) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(3, VOCABULARY, (batch, 11))}


def _pairs(batch: int) -> dict[str, Tensor]:
    """For an encoder and a decoder."""
    return {**_text(batch), "decoder_input_ids": torch.randint(3, VOCABULARY, (batch, 7))}


def _images(batch: int, size: int = 32) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(batch, 3, size, size, dtype=torch.float64)}


def _images_and_text(batch: int) -> dict[str, Tensor]:
    return {**_text(batch), **_images(batch)}


def _speech(batch: int) -> dict[str, Tensor]:
    return {
        "input_features": torch.randn(batch, 16, 60, dtype=torch.float64),
        "decoder_input_ids": torch.randint(3, VOCABULARY, (batch, 7)),
    }


def _waves(batch: int) -> dict[str, Tensor]:
    return {"input_values": torch.randn(batch, 1200, dtype=torch.float64)}


def _spectrogram(batch: int) -> dict[str, Tensor]:
    return {"input_values": torch.randn(batch, 40, 24, dtype=torch.float64)}


INPUTS = {
    "text": _text,
    "tokens": _tokens,
    "pairs": _pairs,
    "images": _images,
    "images of 64": lambda batch: _images(batch, 64),
    "images and text": _images_and_text,
    "speech": _speech,
    "waves": _waves,
    "spectrogram": _spectrogram,
}

_WAVES = {
    **BERT,
    "vocab_size": 32,
    "conv_dim": (24, 24, 20),
    "conv_kernel": (10, 3, 3),
    "conv_stride": (5, 2, 2),
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "apply_spec_augment": False,
}
_STAGES = {"embedding_size": 16, "hidden_sizes": [24, 40, 48, 56], "depths": [1, 2, 1, 1], **CLASSES}
_CLIP_TEXT = {**BERT, **TEXT, "bos_token_id": 1, "eos_token_id": 2}
_CLIP = {"text_config": _CLIP_TEXT, "vision_config": {**BERT, **IMAGES}, "projection_dim": 40}
_SWIN = {"embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "image_size": 32, "patch_size": 2}
_T5 = {
    "vocab_size": VOCABULARY,
    "d_model": WIDE,
    "d_kv": 10,
    "d_ff": INNER,
    "num_layers": LAYERS,
    "num_heads": HEADS,
    "use_cache": False,
    "decoder_start_token_id": 0,
    "is_encoder_decoder": True,
}
_GPT2 = {
    "vocab_size": VOCABULARY,
    "n_positions": 64,
    "n_embd": WIDE,
    "n_layer": LAYERS,
    "n_head": HEADS,
    "use_cache": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_BART = {**SEQUENCE_TO_SEQUENCE, **TEXT, "use_cache": False, "bos_token_id": 1, "eos_token_id": 2}

RECIPES: dict[str, Recipe] = {
    # images
    "vit": Recipe("ViTForImageClassification", "images", VIT),
    "vit (eager)": Recipe("ViTForImageClassification", "images", VIT, "eager"),
    "deit": Recipe("DeiTForImageClassificationWithTeacher", "images", VIT),
    "beit": Recipe(
        "BeitForImageClassification",
        "images",
        {**VIT, "layer_scale_init_value": 0.1, "use_relative_position_bias": True, "out_indices": [1]},
    ),
    "data2vec-vision": Recipe("Data2VecVisionForImageClassification", "images", {**VIT, "out_indices": [1]}),
    "dinov2": Recipe("Dinov2ForImageClassification", "images", {**VIT, "mlp_ratio": 2, "use_swiglu_ffn": True}),
    "dinov2 with registers": Recipe("Dinov2WithRegistersForImageClassification", "images", {**VIT, "mlp_ratio": 2}),
    "dinov3": Recipe("DINOv3ViTModel", "images", {**BERT, **IMAGES}),
    "vit mae": Recipe("ViTMAEModel", "images", {**BERT, **IMAGES, "mask_ratio": 0.0}),
    "yolos": Recipe(
        "YolosModel", "images", {**BERT, "image_size": [32, 32], "patch_size": 8, "num_detection_tokens": 5}
    ),
    "swin": Recipe("SwinForImageClassification", "images", {**_SWIN, **CLASSES}),
    "swin v2": Recipe("Swinv2ForImageClassification", "images", {**_SWIN, **CLASSES}),
    "hiera": Recipe(
        "HieraForImageClassification",
        "images of 64",
        {
            "embed_dim": 24,
            "image_size": [64, 64],
            "depths": [1, 1, 2],
            "num_heads": [1, 2, 4],
            "embed_dim_multiplier": 2.0,
            "num_query_pool": 2,
            "mlp_ratio": 2.0,
            **CLASSES,
        },
    ),
    "convnext": Recipe("ConvNextForImageClassification", "images of 64", {**_STAGES}),
    "convnext v2": Recipe("ConvNextV2ForImageClassification", "images of 64", {**_STAGES}),
    "resnet": Recipe("ResNetForImageClassification", "images of 64", {**_STAGES, "layer_type": "bottleneck"}),
    "regnet": Recipe("RegNetForImageClassification", "images of 64", {**_STAGES, "groups_width": 8}),
    "bit": Recipe(
        "BitForImageClassification", "images of 64", {**_STAGES, "num_groups": 4, "hidden_sizes": [32, 64, 96, 128]}
    ),
    "mobilenet v1": Recipe("MobileNetV1ForImageClassification", "images of 64", {"depth_multiplier": 0.5, **CLASSES}),
    "mobilenet v2": Recipe("MobileNetV2ForImageClassification", "images of 64", {"depth_multiplier": 0.5, **CLASSES}),
    "efficientnet": Recipe(
        "EfficientNetForImageClassification",
        "images of 64",
        {"width_coefficient": 0.5, "depth_coefficient": 0.5, "hidden_dim": 640, "image_size": 64, **CLASSES},
    ),
    "mobilevit": Recipe(
        "MobileViTForImageClassification",
        "images of 64",
        {
            "hidden_sizes": [36, 40, 48],
            "neck_hidden_sizes": [8, 12, 16, 20, 24, 28, 60],
            "num_attention_heads": 4,
            "image_size": 64,
            **CLASSES,
        },
    ),
    "mobilevit v2": Recipe(
        "MobileViTV2ForImageClassification", "images of 64", {"width_multiplier": 0.5, "image_size": 64, **CLASSES}
    ),
    "segformer": Recipe(
        "SegformerForSemanticSegmentation",
        "images of 64",
        {
            "depths": [1, 1, 2, 1],
            "hidden_sizes": [16, 24, 40, 48],
            "num_attention_heads": [1, 2, 4, 6],
            "decoder_hidden_size": 36,
            **CLASSES,
        },
    ),
    "pvt": Recipe(
        "PvtForImageClassification",
        "images of 64",
        {
            "image_size": 64,
            "depths": [1, 1, 2, 1],
            "hidden_sizes": [16, 24, 40, 48],
            "num_attention_heads": [1, 2, 4, 6],
            **CLASSES,
        },
    ),
    "pvt v2": Recipe(
        "PvtV2ForImageClassification",
        "images of 64",
        {"depths": [1, 1, 2, 1], "hidden_sizes": [16, 24, 40, 48], "num_attention_heads": [1, 2, 4, 6], **CLASSES},
    ),
    "poolformer": Recipe(
        "PoolFormerForImageClassification",
        "images of 64",
        {"hidden_sizes": [16, 24, 40, 48], "depths": [1, 1, 2, 1], **CLASSES},
    ),
    "levit": Recipe(
        "LevitForImageClassificationWithTeacher",
        "images of 64",
        {
            "image_size": 64,
            "hidden_sizes": [32, 48, 64],
            "num_attention_heads": [2, 3, 4],
            "depths": [1, 1, 1],
            "key_dim": [8, 8, 8],
            **CLASSES,
        },
    ),
    "cvt": Recipe(
        "CvtForImageClassification",
        "images of 64",
        {"embed_dim": [16, 24, 48], "num_heads": [1, 2, 4], "depth": [1, 2, 3], **CLASSES},
    ),
    "focalnet": Recipe(
        "FocalNetForImageClassification",
        "images of 64",
        {
            "embed_dim": 24,
            "hidden_sizes": [24, 48],
            "depths": [1, 2],
            "focal_levels": [2, 2],
            "focal_windows": [3, 3],
            **CLASSES,
        },
    ),
    "swiftformer": Recipe(
        "SwiftFormerForImageClassification",
        "images of 64",
        {"embed_dims": [16, 24, 40, 48], "depths": [1, 1, 2, 1], "image_size": 64, **CLASSES},
    ),
    "dpt": Recipe(
        "DPTForDepthEstimation",
        "images",
        {
            **BERT,
            **IMAGES,
            "num_hidden_layers": 4,
            "backbone_out_indices": [0, 1, 2, 3],
            "neck_hidden_sizes": [12, 16, 20, 24],
            "fusion_hidden_size": 20,
        },
    ),
    "clip": Recipe("CLIPModel", "images and text", _CLIP),
    "clip vision": Recipe("CLIPVisionModelWithProjection", "images", {**BERT, **IMAGES, "projection_dim": 40}),
    "siglip": Recipe("SiglipModel", "images and text", {k: _CLIP[k] for k in ("text_config", "vision_config")}),
    # text
    "bert": Recipe("BertForSequenceClassification", "text", {**BERT, **TEXT, **CLASSES}),
    "bert (eager)": Recipe("BertForSequenceClassification", "text", {**BERT, **TEXT, **CLASSES}, "eager"),
    "bert for masked tokens": Recipe("BertForMaskedLM", "text", {**BERT, **TEXT}),
    "roberta": Recipe("RobertaForSequenceClassification", "text", {**BERT, **TEXT, **CLASSES}),
    "camembert": Recipe("CamembertForTokenClassification", "text", {**BERT, **TEXT, **CLASSES}),
    "distilbert": Recipe(
        "DistilBertForSequenceClassification",
        "text",
        {**TEXT, "dim": WIDE, "n_heads": HEADS, "n_layers": LAYERS, "hidden_dim": INNER, **CLASSES},
    ),
    "albert": Recipe("AlbertForSequenceClassification", "text", {**BERT, **TEXT, "embedding_size": 28, **CLASSES}),
    "electra": Recipe("ElectraForPreTraining", "text", {**BERT, **TEXT, "embedding_size": 28}),
    "deberta": Recipe("DebertaForSequenceClassification", "text", {**BERT, **TEXT, **CLASSES}),
    "deberta v2": Recipe(
        "DebertaV2ForSequenceClassification",
        "text",
        {**BERT, **TEXT, **CLASSES, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    ),
    "mpnet": Recipe("MPNetForSequenceClassification", "text", {**BERT, **TEXT, **CLASSES}),
    "modernbert": Recipe("ModernBertForSequenceClassification", "text", {**BERT, **TEXT, **CLASSES}),
    "squeezebert": Recipe(
        "SqueezeBertForSequenceClassification", "text", {**BERT, **TEXT, **CLASSES, "embedding_size": WIDE}
    ),
    "fnet": Recipe("FNetForSequenceClassification", "tokens", {**BERT, **TEXT, **CLASSES}),
    "funnel": Recipe(
        "FunnelForSequenceClassification",
        "text",
        {
            "vocab_size": VOCABULARY,
            "block_sizes": [1, 1],
            "d_model": WIDE,
            "n_head": HEADS,
            "d_head": 10,
            "d_inner": INNER,
            **CLASSES,
        },
    ),
    "xlnet": Recipe(
        "XLNetForSequenceClassification",
        "text",
        {
            "vocab_size": VOCABULARY,
            "d_model": WIDE,
            "n_layer": LAYERS,
            "n_head": HEADS,
            "d_inner": INNER,
            "use_mems_eval": False,
            **CLASSES,
        },
    ),
    "gpt2": Recipe("GPT2LMHeadModel", "text", _GPT2),
    "gpt2 (eager)": Recipe("GPT2LMHeadModel", "text", _GPT2, "eager"),
    "gpt-neo": Recipe(
        "GPTNeoForCausalLM",
        "text",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": WIDE,
            "num_layers": LAYERS,
            "num_heads": HEADS,
            "intermediate_size": INNER,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 5,
            "max_position_embeddings": 64,
            "use_cache": False,
        },
    ),
    "gpt-neox": Recipe("GPTNeoXForCausalLM", "text", DECODER),
    "gpt-j": Recipe("GPTJForCausalLM", "text", {**_GPT2, "rotary_dim": 4}),
    "opt": Recipe("OPTForCausalLM", "text", {**DECODER, "ffn_dim": INNER, "word_embed_proj_dim": 28}),
    "bloom": Recipe(
        "BloomForCausalLM",
        "text",
        {"vocab_size": VOCABULARY, "hidden_size": WIDE, "n_layer": LAYERS, "n_head": HEADS, "use_cache": False},
    ),
    "falcon": Recipe("FalconForCausalLM", "text", {**DECODER, "new_decoder_architecture": False, "multi_query": True}),
    "llama": Recipe("LlamaForCausalLM", "text", GROUPED),
    "llama (eager)": Recipe("LlamaForCausalLM", "text", GROUPED, "eager"),
    "mistral": Recipe("MistralForCausalLM", "text", {**GROUPED, "sliding_window": 5}),
    "mixtral": Recipe("MixtralForCausalLM", "text", {**GROUPED, "num_local_experts": 3, "num_experts_per_tok": 2}),
    "qwen2": Recipe("Qwen2ForCausalLM", "text", {k: v for k, v in GROUPED.items() if k != "head_dim"}),
    "qwen3": Recipe("Qwen3ForCausalLM", "text", GROUPED),
    "gemma": Recipe("GemmaForCausalLM", "text", GROUPED),
    "gemma 2": Recipe("Gemma2ForCausalLM", "text", {**GROUPED, "sliding_window": 5, "query_pre_attn_scalar": 10}),
    "phi": Recipe("PhiForCausalLM", "text", DECODER),
    "phi 3": Recipe("Phi3ForCausalLM", "text", {**DECODER, "num_key_value_heads": 2}),
    "olmo 2": Recipe("Olmo2ForCausalLM", "text", DECODER),
    "stablelm": Recipe("StableLmForCausalLM", "text", {**DECODER, "num_attention_heads": 6, "num_key_value_heads": 2}),
    "mamba": Recipe(
        "MambaForCausalLM",
        "tokens",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": WIDE,
            "num_hidden_layers": LAYERS,
            "state_size": 6,
            "use_cache": False,
        },
    ),
    # pairs of an encoder and a decoder, and sound
    "t5": Recipe("T5ForConditionalGeneration", "pairs", _T5),
    "t5 v1.1": Recipe(
        "T5ForConditionalGeneration", "pairs", {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    ),
    "bart": Recipe("BartForConditionalGeneration", "pairs", _BART),
    "bart (eager)": Recipe("BartForConditionalGeneration", "pairs", _BART, "eager"),
    "pegasus": Recipe("PegasusForConditionalGeneration", "pairs", _BART),
    "m2m-100": Recipe("M2M100ForConditionalGeneration", "pairs", _BART),
    "whisper": Recipe(
        "WhisperForConditionalGeneration",
        "speech",
        {
            **SEQUENCE_TO_SEQUENCE,
            "vocab_size": VOCABULARY,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "num_mel_bins": 16,
            "max_source_positions": 30,
            "max_target_positions": 20,
            "use_cache": False,
        },
    ),
    "wav2vec2": Recipe("Wav2Vec2ForCTC", "waves", _WAVES),
    "wav2vec2, stable": Recipe(
        "Wav2Vec2ForCTC", "waves", {**_WAVES, "do_stable_layer_norm": True, "feat_extract_norm": "layer"}
    ),
    "hubert": Recipe("HubertForCTC", "waves", _WAVES),
    "audio spectrogram": Recipe(
        "ASTForAudioClassification",
        "spectrogram",
        {
            **BERT,
            "patch_size": 8,
            "frequency_stride": 8,
            "time_stride": 8,
            "max_length": 40,
            "num_mel_bins": 24,
            **CLASSES,
        },
    ),
}


def networks() -> list[str]:
    return list(RECIPES)


def build(name: str, seed: int) -> Network:
    torchvision()  # which some of the classes import
    import transformers

    torch.manual_seed(seed)
    recipe = RECIPES[name]
    architecture = getattr(transformers, recipe.model)
    config = architecture.config_class(**recipe.config)
    config._experts_implementation = "eager"  # the other one does not run in float64
    config._attn_implementation = recipe.attention if architecture._supports_sdpa else "eager"
    model = strengthen(randomise(architecture(config).double()))
    make = INPUTS[recipe.inputs]
    example, inputs = make(1), make(2)
    return Network(settle(model, inputs), example, inputs)
