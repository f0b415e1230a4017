"""The model before training: CLIP tower, projector, Llama, word tokenizer, chat template, processor."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from qr_integrations.evaluation.drawn_world.views import MEAN, STD

from .words import all_words

PAD, BOS, EOS, UNKNOWN, IMAGE = "<pad>", "<s>", "</s>", "<unk>", "<image>"
CHAT_TEMPLATE = (
    "{{ '<s>' }}{% for message in messages %}"
    "{% if message['content'] is string %}{% set text = message['content'] %}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>' }}{% endfor %}"
    "{% set text = message['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text') | join(' ') %}"
    "{% endif %}"
    "{{ ' ' + message['role'] | upper + ': ' + text }}{% if message['role'] == 'assistant' %}{{ '</s>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
)
"""All pictures come before the words of a message, so questions about the same pictures share their beginning."""


VICROP = {"layers": "all", "base": 0.25}
"""How to look at pictures again, chosen on scenes that are neither trained nor measured on."""


@dataclass(frozen=True)
class Sizes:
    """Resolution in pixels, and layers, widths and heads of the two halves."""

    resolution: int = 140
    patch: int = 14
    tower_layers: int = 12
    tower_width: int = 192
    tower_heads: int = 4
    tower_inner: int = 384
    layers: int = 8
    width: int = 192
    heads: int = 4
    inner: int = 384

    @property
    def patches(self) -> int:
        """Tokens of one picture."""
        return (self.resolution // self.patch) ** 2


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word, lower case; punctuation stands alone; words it does not know become `<unk>`."""
    special = [PAD, BOS, EOS, UNKNOWN, IMAGE]
    words = {word: number for number, word in enumerate([*special, *all_words()])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        extra_special_tokens={"image_token": IMAGE},
        padding_side="left",
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_processor(sizes: Sizes) -> LlavaProcessor:
    """Pictures are padded to a square, scaled, and cut into patches; the class token is not passed on."""
    square = {"height": sizes.resolution, "width": sizes.resolution}
    images = LlavaImageProcessorPil(
        do_pad=True, size=square, crop_size=square, do_center_crop=False, image_mean=list(MEAN), image_std=list(STD)
    )
    return LlavaProcessor(
        images,
        build_tokenizer(),
        patch_size=sizes.patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def configure(sizes: Sizes, tokenizer: PreTrainedTokenizerFast) -> LlavaConfig:
    """The configuration; features are taken before the tower's last layer, as usual for this architecture."""
    tower = CLIPVisionConfig(
        hidden_size=sizes.tower_width,
        intermediate_size=sizes.tower_inner,
        num_hidden_layers=sizes.tower_layers,
        num_attention_heads=sizes.tower_heads,
        image_size=sizes.resolution,
        patch_size=sizes.patch,
        projection_dim=sizes.tower_width,
        hidden_act="gelu",
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=sizes.width,
        intermediate_size=sizes.inner,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.heads,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlavaConfig(
        vision_config=tower,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        projector_hidden_act="gelu",
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=sizes.patches,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        vicrop=VICROP,
    )


def build_model(sizes: Sizes, tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> LlavaForConditionalGeneration:
    """Random weights. Attention is written out: its backward pass is twice as fast as the fused one on a CPU."""
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(configure(sizes, tokenizer)).float()
    model.set_attn_implementation("eager")
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        min_new_tokens=1,  # words that it does not know are answered with one that it knows, not with silence
    )
    return model
