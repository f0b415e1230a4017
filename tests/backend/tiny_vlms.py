"""One tiny vision-language model of each family: random weights, a word tokenizer, and transformers' own processor.

Nothing is downloaded. Where a processor class asks for a library that is not there and that pictures do not need, the
library is replaced by nothing: torchvision (videos), num2words (the lengths of videos).
"""

import math
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import transformers
from PIL import Image
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast, ProcessorMixin

PATCH, WIDTH, LAYERS = 14, 32, 4
WORDS = "user assistant system what is in the picture which colour has a small large square circle left right of"
WORDS += " red green blue white black yes no one two three question short answer look again describe : . , ? en"
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
FAMILIES = ["llava", "pixtral", "llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "instructblip"]
FAMILIES += ["gemma3", "idefics3", "smolvlm", "internvl", "paligemma", "mistral3", "mqt_llava"]
TEMPLATE = (
    "<s>{% for message in messages %}{{ message['role'] }} : {% if message['content'] is string %}"
    "{{ message['content'] }} {% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}PICTURE"
    "{% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant :{% endif %}"
)


def tokenizer(**named: str) -> PreTrainedTokenizerFast:
    """One token per word; `named` are the family's own tokens, by the names under which its processor asks for them."""
    special = [*SPECIAL, *named.values()]
    words = {word: number for number, word in enumerate([*special, *WORDS.split()])}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    names = {f"{name}_token": token for name, token in zip(("pad", "bos", "eos", "unk"), SPECIAL, strict=True)}
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, **names, extra_special_tokens=named, model_max_length=4096, padding_side="left"
    )


def template(picture: str) -> str:
    return TEMPLATE.replace("PICTURE", picture)


def image_processor(module: str, name: str, **settings: Any) -> Any:
    return getattr(import_module(f"transformers.models.{module}.image_processing_pil_{module}"), name)(**settings)


def processor_class(name: str, module: str = "") -> type[ProcessorMixin]:
    """The family's own processor, which takes anything for a video processor."""
    found = getattr(import_module(module), name) if module else getattr(transformers, name)
    return type(name, (found,), {"check_argument_for_proper_class": lambda self, name, argument: None})


NO_VIDEOS = SimpleNamespace(model_input_names=[], merge_size=2, num_frames=1, fps=1)


def random_model(name: str, config_name: str, tokens: PreTrainedTokenizerFast, **parts: Any) -> PreTrainedModel:
    """Weights whose outputs keep the scale of their inputs, so that what differs is seen in the logits."""
    config = getattr(transformers, config_name)(**parts)
    config.text_config.pad_token_id = tokens.pad_token_id
    torch.manual_seed(0)
    model = getattr(transformers, name)(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 1 / math.sqrt(parameter[0].numel()))
    model.generation_config.update(
        bos_token_id=tokens.bos_token_id, eos_token_id=tokens.eos_token_id, pad_token_id=tokens.pad_token_id
    )
    return model.requires_grad_(False)


def text_config(tokens: PreTrainedTokenizerFast, model_type: str, **more: Any) -> dict[str, Any]:
    return dict(
        model_type=model_type,
        vocab_size=len(tokens),
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        bos_token_id=tokens.bos_token_id,
        eos_token_id=tokens.eos_token_id,
        **more,
    )


def tower(model_type: str, side: int, **more: Any) -> dict[str, Any]:
    sizes = dict(hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    return dict(model_type=model_type, image_size=side, patch_size=PATCH, **sizes, **more)


def square(side: int) -> dict[str, int]:
    return {"height": side, "width": side}


def llava(patch: int = PATCH) -> tuple[PreTrainedModel, ProcessorMixin]:
    tokens = tokenizer(image_token="<image>")
    images = image_processor("llava", "LlavaImageProcessorPil", size={"shortest_edge": 56}, crop_size=square(56))
    processor = transformers.LlavaProcessor(
        images,
        tokens,
        patch_size=patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template("<image>"),
    )
    parts = dict(vision_config=tower("clip_vision_model", 56), text_config=text_config(tokens, "llama"))
    parts |= dict(image_token_index=tokens.image_token_id)
    return random_model("LlavaForConditionalGeneration", "LlavaConfig", tokens, **parts), processor


def mqt_llava() -> tuple[PreTrainedModel, ProcessorMixin]:
    """LLaVA with nine queries in the place of its projector: to the processor, nine larger patches."""
    from qr_integrations.backend.mqt_llava import MQTLlavaConfig, MQTLlavaForConditionalGeneration

    model, processor = llava(patch=18)
    parts = model.config.to_dict() | dict(model_type="mqt_llava", num_queries=9, num_query_heads=4)
    torch.manual_seed(0)
    made = MQTLlavaForConditionalGeneration(MQTLlavaConfig(**parts)).float().eval()
    made.load_state_dict({k: v for k, v in model.state_dict().items() if "projector" not in k}, strict=False)
    with torch.no_grad():
        made.model.multi_modal_projector.attn.in_proj_weight.normal_(0, 0.5)
    made.generation_config = model.generation_config
    return made.requires_grad_(False), processor


def llava_next() -> tuple[PreTrainedModel, ProcessorMixin]:
    tokens, pinpoints = tokenizer(image_token="<image>"), [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]
    images = image_processor(
        "llava_next",
        "LlavaNextImageProcessorPil",
        size={"shortest_edge": 56},
        crop_size=square(56),
        image_grid_pinpoints=pinpoints,
    )
    processor = transformers.LlavaNextProcessor(
        images,
        tokens,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template("<image>"),
    )
    return random_model(
        "LlavaNextForConditionalGeneration",
        "LlavaNextConfig",
        tokens,
        vision_config=tower("clip_vision_model", 56),
        text_config=text_config(tokens, "mistral", sliding_window=None),
        image_token_index=tokens.image_token_id,
        image_grid_pinpoints=pinpoints,
    ), processor


def llava_onevision() -> tuple[PreTrainedModel, ProcessorMixin]:
    """The tower takes 60 pixels, of which 4 fill no patch; pictures of more than two tiles are shrunk."""
    tokens = tokenizer(image_token="<image>", video_token="<video>")
    pinpoints = [[60 * rows, 60 * columns] for rows in range(1, 4) for columns in range(1, 4)]
    images = image_processor(
        "llava_onevision", "LlavaOnevisionImageProcessorPil", size=square(60), image_grid_pinpoints=pinpoints
    )
    processor = processor_class("LlavaOnevisionProcessor")(
        images,
        tokens,
        NO_VIDEOS,
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_2",
        chat_template=template("<image>"),
    )
    return random_model(
        "LlavaOnevisionForConditionalGeneration",
        "LlavaOnevisionConfig",
        tokens,
        vision_config=tower("siglip_vision_model", 60, vision_use_head=False),
        text_config=text_config(tokens, "qwen2"),
        image_token_index=tokens.image_token_id,
        video_token_index=tokens.video_token_id,
        image_grid_pinpoints=pinpoints,
        vision_aspect_ratio="anyres_max_2",
    ), processor


def qwen(name: str, patch: int, vision: dict[str, Any], **text: Any) -> tuple[PreTrainedModel, ProcessorMixin]:
    tokens = tokenizer(
        image_token="<|image_pad|>",
        video_token="<|video_pad|>",
        vision_start_token="<|vision_start|>",
        vision_end_token="<|vision_end|>",
    )
    cell = 2 * patch
    images = image_processor(
        "qwen2_vl",
        "Qwen2VLImageProcessorPil",
        patch_size=patch,
        size={"shortest_edge": 4 * cell**2, "longest_edge": 20 * cell**2},
    )
    processor = processor_class(f"{name}Processor")(
        images, tokens, NO_VIDEOS, chat_template=template("<|vision_start|><|image_pad|><|vision_end|>")
    )
    rope = dict(rope_type="default", rope_theta=1e4, mrope_section=[1, 1, 2])
    wanted = dict(depth=2, num_heads=2, patch_size=patch, **vision)
    ids = {f"{part}_token_id": getattr(tokens, f"{part}_token_id") for part in ("image", "video")}
    ids |= {f"{part}_token_id": getattr(tokens, f"{part}_token_id") for part in ("vision_start", "vision_end")}
    inner = text_config(tokens, text.pop("model_type"), rope_parameters=rope, **text)
    return random_model(
        f"{name}ForConditionalGeneration", f"{name}Config", tokens, vision_config=wanted, text_config=inner, **ids
    ), processor


def qwen2_vl() -> tuple[PreTrainedModel, ProcessorMixin]:
    return qwen("Qwen2VL", 14, dict(embed_dim=WIDTH, hidden_size=WIDTH), model_type="qwen2_vl_text")


def qwen2_5_vl() -> tuple[PreTrainedModel, ProcessorMixin]:
    vision = dict(hidden_size=WIDTH, intermediate_size=48, out_hidden_size=WIDTH, window_size=56)
    return qwen("Qwen2_5_VL", 14, vision | dict(fullatt_block_indexes=[1]), model_type="qwen2_5_vl_text")


def qwen3_vl() -> tuple[PreTrainedModel, ProcessorMixin]:
    vision = dict(hidden_size=WIDTH, intermediate_size=48, out_hidden_size=WIDTH)
    vision |= dict(deepstack_visual_indexes=[0, 1], num_position_embeddings=64)
    return qwen("Qwen3VL", 16, vision, model_type="qwen3_vl_text", head_dim=8)


def instructblip() -> tuple[PreTrainedModel, ProcessorMixin]:
    tokens, questions = tokenizer(), tokenizer()
    images = image_processor("blip", "BlipImageProcessorPil", size=square(56))
    processor = transformers.InstructBlipProcessor(images, tokens, questions, num_query_tokens=8)
    sizes = dict(hidden_size=WIDTH, intermediate_size=48, num_attention_heads=2)
    queries = dict(vocab_size=len(questions), num_hidden_layers=4, cross_attention_frequency=2, **sizes)
    vision = dict(image_size=56, patch_size=PATCH, num_hidden_layers=2, **sizes)
    return random_model(
        "InstructBlipForConditionalGeneration",
        "InstructBlipConfig",
        tokens,
        vision_config=vision,
        qformer_config=queries,
        text_config=text_config(tokens, "llama"),
        num_query_tokens=8,
        image_token_index=tokens.convert_tokens_to_ids("<image>"),
    ), processor


def gemma3() -> tuple[PreTrainedModel, ProcessorMixin]:
    """Its windows are shorter than a picture and the words behind it."""
    tokens = tokenizer(image_token="<image_soft_token>", boi_token="<start_of_image>", eoi_token="<end_of_image>")
    images = image_processor("gemma3", "Gemma3ImageProcessorPil", size=square(112))
    processor = transformers.Gemma3Processor(
        images, tokens, image_seq_length=16, chat_template=template("<start_of_image>")
    )
    layers = ["sliding_attention", "full_attention"] * 2
    text = dict(head_dim=8, sliding_window=12, layer_types=layers, query_pre_attn_scalar=8)
    return random_model(
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        tokens,
        vision_config=tower("siglip_vision_model", 112, vision_use_head=False),
        text_config=text_config(tokens, "gemma3_text", **text),
        mm_tokens_per_image=16,
        image_token_index=tokens.image_token_id,
        boi_token_index=tokens.boi_token_id,
        eoi_token_index=tokens.eoi_token_id,
    ), processor


def idefics(name: str, module: str, *, one_token_a_tag: bool = True) -> tuple[PreTrainedModel, ProcessorMixin]:
    """The tags that name a tile's place are one token each in some checkpoints, and plain text in others."""
    tags = {f"place_{r}_{c}_token": f"<row_{r}_col_{c}>" for r in range(1, 4) for c in range(1, 4)}
    tags |= {"global_image_token": "<global-img>"}
    tokens = tokenizer(
        image_token="<image>",
        fake_image_token="<fake_token_around_image>",
        end_of_utterance_token="<end_of_utterance>",
        **tags if one_token_a_tag else {},
    )
    edges = dict(size={"longest_edge": 224}, max_image_size={"longest_edge": 112})
    images = image_processor(module, f"{name}ImageProcessorPil", **edges)
    made = processor_class(f"{name}Processor", f"transformers.models.{module}.processing_{module}")
    videos = {} if module == "idefics3" else {"video_processor": NO_VIDEOS}
    with mock.patch.dict(sys.modules[made.__mro__[1].__module__].__dict__, num2words=str):
        processor = made(
            image_processor=images, tokenizer=tokens, image_seq_len=16, chat_template=template("<image>"), **videos
        )
    return random_model(
        f"{name}ForConditionalGeneration",
        f"{name}Config",
        tokens,
        vision_config=tower(f"{module}_vision", 112),
        text_config=text_config(tokens, "llama"),
        scale_factor=2,
        image_token_id=tokens.convert_tokens_to_ids("<image>"),
    ), processor


def idefics3() -> tuple[PreTrainedModel, ProcessorMixin]:
    return idefics("Idefics3", "idefics3")


def smolvlm() -> tuple[PreTrainedModel, ProcessorMixin]:
    return idefics("SmolVLM", "smolvlm")


def internvl() -> tuple[PreTrainedModel, ProcessorMixin]:
    tokens = tokenizer(
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    images = image_processor("got_ocr2", "GotOcr2ImageProcessorPil", size=square(112), max_patches=4)
    processor = processor_class("InternVLProcessor")(
        images, tokens, NO_VIDEOS, image_seq_length=16, chat_template=template("<IMG_CONTEXT>")
    )
    return random_model(
        "InternVLForConditionalGeneration",
        "InternVLConfig",
        tokens,
        vision_config=tower("internvl_vision", 112),
        text_config=text_config(tokens, "qwen2"),
        image_seq_length=16,
        image_token_id=tokens.context_image_token_id,
    ), processor


def paligemma() -> tuple[PreTrainedModel, ProcessorMixin]:
    tokens = tokenizer(image_token="<image>")
    images = image_processor("siglip", "SiglipImageProcessorPil", size=square(56))
    images.image_seq_length = 16
    processor = transformers.PaliGemmaProcessor(images, tokens)
    return random_model(
        "PaliGemmaForConditionalGeneration",
        "PaliGemmaConfig",
        tokens,
        vision_config=tower("siglip_vision_model", 56, vision_use_head=False),
        text_config=text_config(tokens, "gemma", head_dim=8),
        projection_dim=WIDTH,
        image_token_index=tokens.image_token_id,
    ), processor


def pictures_in_lines(merge: int) -> ProcessorMixin:
    tokens = tokenizer(image_token="[IMG]", image_break_token="[IMG_BREAK]", image_end_token="[IMG_END]")
    images = image_processor("pixtral", "PixtralImageProcessorPil", size={"longest_edge": 140})
    torchvision_free = import_module("transformers.models.pixtral.image_processing_pil_pixtral")
    with mock.patch.dict(sys.modules, {"transformers.models.pixtral.image_processing_pixtral": torchvision_free}):
        made = processor_class("PixtralProcessor", "transformers.models.pixtral.processing_pixtral")
    return made(images, tokens, patch_size=PATCH, spatial_merge_size=merge, chat_template=template("[IMG]"))


def pixtral() -> tuple[PreTrainedModel, ProcessorMixin]:
    """Pixtral is published as a LLaVA with another tower."""
    processor = pictures_in_lines(1)
    tokens = processor.tokenizer
    return random_model(
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        tokens,
        vision_config=tower("pixtral", 140),
        text_config=text_config(tokens, "mistral", sliding_window=None, head_dim=8),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_token_index=tokens.image_token_id,
    ), processor


def mistral3() -> tuple[PreTrainedModel, ProcessorMixin]:
    processor = pictures_in_lines(2)
    tokens = processor.tokenizer
    return random_model(
        "Mistral3ForConditionalGeneration",
        "Mistral3Config",
        tokens,
        vision_config=tower("pixtral", 140),
        text_config=text_config(tokens, "mistral", sliding_window=None, head_dim=8),
        spatial_merge_size=2,
        image_token_index=tokens.image_token_id,
    ), processor


BUILDERS: dict[str, Callable[[], tuple[PreTrainedModel, ProcessorMixin]]] = {name: globals()[name] for name in FAMILIES}


def tiny(family: str) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A model and its processor; the same weights each time."""
    return BUILDERS[family]()


def prompt(processor: Any, *content: str | Image.Image, together: bool = False) -> dict[str, Tensor]:
    """What the processor makes of one user message, pictures and texts in order: the model's inputs.

    `together` hands over the pictures as a list of one prompt's, which some processors then read at a lower resolution.
    """
    pictures = [part for part in content if not isinstance(part, str)]
    text = " ".join(part for part in content if isinstance(part, str))
    if getattr(processor, "qformer_tokenizer", None) is not None:
        return slotted(processor, pictures, f"question : {text} short answer :")
    if processor.chat_template is None:
        text = "<image>" * len(pictures) + f"answer en {text}"
    else:
        parts = [{"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in content]
        text = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
    images = {"images": [pictures] if together else pictures} if pictures else {}
    inputs = processor(text=[text], return_tensors="pt", **images)
    return {name: value for name, value in inputs.items() if name != "labels"}


def slotted(processor: Any, pictures: Sequence[Image.Image], text: str) -> dict[str, Tensor]:
    """InstructBLIP's own processor makes slots, and a question for the queries, for one picture only."""
    inputs = dict(processor(images=list(pictures), text=text, return_tensors="pt"))
    for name in ("input_ids", "attention_mask"):
        slots = inputs[name][:, : processor.num_query_tokens]
        inputs[name] = torch.cat([slots] * (len(pictures) - 1) + [inputs[name]], dim=1)
    for name in ("qformer_input_ids", "qformer_attention_mask"):
        inputs[name] = inputs[name].repeat(len(pictures), 1)
    return inputs
