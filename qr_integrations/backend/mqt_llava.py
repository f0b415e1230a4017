"""MQT-LLaVA for transformers: LLaVA whose projector is a matryoshka query transformer (arXiv 2405.19315).

The number of placeholders of a picture in the prompt says how many tokens are made of it, so that nothing else of a
LLaVA model changes. Importing this module makes ``AutoModelForImageTextToText`` know the model.
"""

from typing import Any

from torch import Tensor
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

    def tokens_of(self, pixel_values: Tensor, num_tokens: int | None = None) -> Tensor:
        """The first `num_tokens` tokens of each picture, ``[B, m, D]``."""
        layer = self.config.vision_feature_layer
        outputs: Any = self.vision_tower(pixel_values, output_hidden_states=True, return_dict=True)
        patches = outputs.hidden_states[layer]
        if self.config.vision_feature_select_strategy == "default":
            patches = patches[:, 1:]
        return self.multi_modal_projector(patches, num_tokens)

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
        if pixel_values is not None and input_ids is not None:
            places = input_ids == self.config.image_token_id
            count, rest = divmod(int(places.sum()), len(pixel_values))
            if rest or not count:
                raise InputError(
                    f"{int(places.sum())} placeholders are no equal share for each of {len(pixel_values)} pictures: "
                    "give every picture the same number of tokens"
                )
            inputs_embeds = self.get_input_embeddings()(input_ids)
            tokens = self.tokens_of(pixel_values, count).flatten(0, 1)
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


AutoConfig.register("mqt_llava", MQTLlavaConfig)
AutoModel.register(MQTLlavaConfig, MQTLlavaModel)
AutoModelForImageTextToText.register(MQTLlavaConfig, MQTLlavaForConditionalGeneration)
