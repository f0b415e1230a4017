"""MQT-LLaVA for transformers: LLaVA whose projector is a matryoshka query transformer (arXiv 2405.19315).

The number of placeholders of a picture in the prompt says how many tokens are made of it, so that nothing else of a
LLaVA model changes. Importing this module makes ``AutoModelForImageTextToText`` know the model.
"""

from typing import Any, no_type_check

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import pad
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaModel,
)

from qr_integrations.backend.query_transformer import QueryTransformer
from qr_integrations.errors import InputError


@no_type_check  # transformers makes its constructor, which takes more names than its annotations say
class MQTLlavaConfig(LlavaConfig):
    """A `LlavaConfig` with the query transformer's sizes.

    Attributes:
        num_queries: M, the most tokens of a picture.
        num_query_heads: of the query transformer.
    """

    model_type = "mqt_llava"

    num_queries: int = 256
    num_query_heads: int = 16


class MQTLlavaModel(LlavaModel):
    """`LlavaModel` with a query transformer as its projector."""

    config_class = MQTLlavaConfig

    def __init__(self, config: MQTLlavaConfig):
        super().__init__(config)
        tower = config.vision_config
        self.multi_modal_projector = QueryTransformer(
            tower.hidden_size,
            config.num_query_heads,
            config.text_config.hidden_size,
            config.num_queries,
            (tower.image_size // tower.patch_size) ** 2,
        )

    def tokens_of(
        self, pixel_values: Float[Tensor, "B 3 S S"], num_tokens: int | None = None
    ) -> Float[Tensor, "B m D"]:
        """The first `num_tokens` tokens of each picture, all M for None.

        Raises:
            InputError: tokens other than 1 to M, or pictures of another size than the tower's.
        """
        return self.multi_modal_projector(self.patches_of(pixel_values), num_tokens)

    def patches_of(self, pixel_values: Float[Tensor, "B 3 S S"]) -> Float[Tensor, "B N V"]:
        """What the query transformer reads of each picture: the tower's patches, without its class token."""
        layer = self.config.vision_feature_layer
        outputs: Any = self.vision_tower(pixel_values, output_hidden_states=True, return_dict=True)
        patches: Tensor = outputs.hidden_states[layer]
        return patches[:, 1:] if self.config.vision_feature_select_strategy == "default" else patches

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As `LlavaModel.forward`; all pictures of a batch have the same number of placeholders.

        Raises:
            InputError: they have not.
        """
        made = (kwargs.get("mm_encoder_outputs") or {}).get("image")  # `generate` makes all tokens beforehand
        shown: Any = pixel_values if made is None else torch.stack(list(made.pooler_output))
        if input_ids is not None and shown is not None:
            kwargs.pop("mm_encoder_outputs", None)
            places = input_ids == self.config.image_token_id
            count = _equal_share(places, len(shown))
            tokens = (self.tokens_of(shown, count) if made is None else shown[:, :count]).flatten(0, 1)
            inputs_embeds = self.get_input_embeddings()(input_ids)
            inputs_embeds = inputs_embeds.masked_scatter(places[..., None], tokens.to(inputs_embeds.dtype))
            input_ids, pixel_values = None, None
        return super().forward(input_ids=input_ids, pixel_values=pixel_values, inputs_embeds=inputs_embeds, **kwargs)


class MQTLlavaForConditionalGeneration(LlavaForConditionalGeneration):
    """`LlavaForConditionalGeneration` with a query transformer as its projector."""

    config_class = MQTLlavaConfig

    def __init__(self, config: MQTLlavaConfig):
        super().__init__(config)
        self.model = MQTLlavaModel(config)
        self.post_init()

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """For beams, transformers tells whose pictures are whose by counting placeholders: no token more is left."""
        made = (kwargs.get("mm_encoder_outputs") or {}).get("image")
        if made is not None and input_ids is not None and input_ids.numel():
            tokens = torch.stack(list(made.pooler_output))
            made.pooler_output = tokens[:, : _equal_share(input_ids == self.config.image_token_id, len(tokens))]
        return super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **kwargs)


def _equal_share(places: Bool[Tensor, "B T"], num_pictures: int) -> int:
    """How many placeholders each picture has. Between two pictures there may be none or any number of other tokens."""
    total = int(places.sum())
    count, rest = divmod(total, num_pictures)
    kinds, lengths = pad(places, (0, 1)).flatten().unique_consecutive(return_counts=True)
    if rest or not count or (lengths[kinds] % count).any():
        raise InputError(
            f"{total} placeholders are no equal share for each of {num_pictures} pictures: give every picture the same "
            "number of tokens"
        )
    return count


AutoConfig.register("mqt_llava", MQTLlavaConfig)
AutoModel.register(MQTLlavaConfig, MQTLlavaModel)
AutoModelForImageTextToText.register(MQTLlavaConfig, MQTLlavaForConditionalGeneration)
