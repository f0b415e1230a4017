"""ViCrop: where a crop is worth it, where it is not and why, and where it is put in the conversation."""

import math
from typing import Any

import numpy as np
import pytest
import transformers
from PIL import Image

from qr_integrations.backend import Backend
from qr_integrations.cropping import merge_maps, tile_picture
from qr_integrations.cropping.asking import GENERIC, SHORT_ANSWER
from qr_integrations.cropping.relative_attention import RelativeAttention
from qr_integrations.cropping.vicrop import ViCrop
from qr_integrations.errors import HeadError, InputError, UnsupportedModelError
from qr_integrations.types import Box, Message
from tests.backend.found_pictures import noise
from tests.backend.seeing import OTHER, QUESTION, backend, counted, fresh, layers, pictures, seen
from tests.backend.tiny_vlms import (
    PATCH,
    image_processor,
    random_model,
    square,
    template,
    text_config,
    tokenizer,
    tower,
)

BIG = (400, 300)
METHODS = ["relative", "gradient", "input_gradient"]


def inside(box: Box | None, size: tuple[int, int]) -> bool:
    return box is not None and 0 <= box.left < box.right <= size[0] and 0 <= box.top < box.bottom <= size[1]


# ---- one picture


@pytest.mark.parametrize("method", METHODS)
def test_a_look(method: Any) -> None:
    opened, picture = backend("llava"), noise(BIG, 0)
    look = ViCrop(method=method).look(opened, picture, QUESTION)
    assert inside(look.box, BIG) and look.reason == ""
    assert look.box is not None and (look.box.width, look.box.height) in [(2 * int(28 * r), 2 * int(28 * r)) for r in R]
    assert look.importance.method == method and look.importance.image_size == BIG
    assert look.sharpness > 0 and look.lift > 0
    assert look.lift == pytest.approx(lift_by_hand(look.importance, look.box), rel=0.15)


R = (1.0, 1.2, 1.4, 1.6, 1.8, 2.0)


def lift_by_hand(importance: Any, box: Box) -> float:
    pixels = importance.on_picture()
    return float(np.nanmean(pixels[box.top : box.bottom, box.left : box.right]) / np.nanmean(pixels))


def test_the_side_of_a_crop() -> None:
    opened, picture = backend("llava"), noise(BIG, 0)
    wide = ViCrop(base=100).look(opened, picture, QUESTION).box
    assert wide is not None and wide.width >= 100
    native = ViCrop().look(backend("qwen3_vl"), noise((600, 500), 0), QUESTION).box
    assert native is not None and native.width >= 224  # as published for Qwen


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [(56, 56), (40, 30), (3, 50), (1, 1)])
def test_a_small_picture_needs_no_crop(method: Any, size: tuple[int, int]) -> None:
    look = ViCrop(method=method).look(backend("llava"), noise(size, 0), QUESTION)
    assert look.box is None and look.reason == "the picture is no larger than its crop"
    answer = backend("llava").answer([Message.user(noise(size, 0), QUESTION)], crop=ViCrop(method=method))
    assert answer.usage.prompt_tokens == len(backend("llava").lay_out([Message.user(noise(size, 0), QUESTION)]))


@pytest.mark.parametrize("size", [(560, 56), (50, 500)])
def test_a_long_picture_of_which_no_more_than_a_crop_is_seen(size: tuple[int, int]) -> None:
    """LLaVA's processor cuts out the centre square, which is as large as the crop; the picture is larger."""
    look = ViCrop().look(backend("llava"), noise(size, 0), QUESTION)
    assert look.box is None and look.reason == "what the model sees of the picture is no larger than its crop"


def test_a_question_about_nothing_in_particular_gives_no_crop() -> None:
    look = ViCrop().look(backend("llava"), noise(BIG, 0), GENERIC)
    assert look.box is None and look.reason == "the map is the same everywhere"
    assert look.lift == pytest.approx(1.0, abs=1e-3)


def test_a_crop_that_does_not_stand_out_is_not_worth_it() -> None:
    opened, picture = backend("llava"), noise(BIG, 0)
    free = ViCrop().look(opened, picture, QUESTION)
    assert ViCrop(min_lift=free.lift * 0.99).look(opened, picture, QUESTION).box == free.box
    gated = ViCrop(min_lift=free.lift * 1.01).look(opened, picture, QUESTION)
    assert gated.box is None and gated.reason == f"the crop stands out {free.lift:.2f} times only"
    assert (gated.lift, gated.sharpness) == (free.lift, free.sharpness)
    answer = opened.answer([Message.user(picture, QUESTION)], crop=ViCrop(min_lift=1e6), max_new_tokens=3)
    assert answer.text == opened.answer([Message.user(picture, QUESTION)], max_new_tokens=3).text
    assert [look.box for look in answer.steps["crop"]] == [None]


@pytest.mark.parametrize("size", [(5, 900), (900, 5), (2, 300), (5000, 40), (3000, 2500)])
@pytest.mark.parametrize("method", METHODS)
def test_pictures_of_any_shape(method: Any, size: tuple[int, int]) -> None:
    picture = Image.new("RGB", size, (200, 30, 30))
    picture.paste((10, 200, 10), (size[0] // 2, size[1] // 2, size[0] // 2 + 30, size[1] // 2 + 30))
    look = ViCrop(method=method).look(backend("llava"), picture, QUESTION)
    assert look.box is None or inside(look.box, size)
    assert math.isfinite(look.lift) and math.isfinite(look.sharpness)


def test_a_broken_picture_is_refused() -> None:
    with pytest.raises(InputError, match="0 x 5 pixels"):
        ViCrop().look(backend("llava"), Image.new("RGB", (0, 5)), QUESTION)


@pytest.mark.parametrize("high_resolution", [False, True])
def test_pictures_are_turned_upright(high_resolution: bool) -> None:
    """A camera's note that it was held sideways counts for the map and for the box."""
    upright, sideways = noise((300, 1300), 0), noise((300, 1300), 0).transpose(Image.Transpose.ROTATE_90)
    sideways.getexif()[0x0112] = 6
    vicrop = ViCrop(high_resolution=high_resolution)
    looks = [vicrop.look(backend("llava"), one, QUESTION) for one in (upright, sideways)]
    assert looks[0].box == looks[1].box
    np.testing.assert_array_equal(looks[0].importance.values, looks[1].importance.values)


def test_pictures_are_looked_at_in_colour() -> None:
    grey = noise(BIG, 0).convert("L")
    looks = [ViCrop().look(backend("llava"), one, QUESTION) for one in (grey, grey.convert("RGB"))]
    np.testing.assert_array_equal(looks[0].importance.values, looks[1].importance.values)


# ---- settings


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        (dict(method="random"), "unknown method 'random': pass 'relative', 'gradient', 'input_gradient'"),
        (dict(geometry="flat"), "unknown geometry"),
        (dict(base=1), "base=1"),
        (dict(min_lift=-0.1), "min_lift=-0.1"),
        (dict(base=math.inf), "base=inf"),
        (dict(base=math.nan), "base=nan"),
        (dict(layers="most"), "layers='most' are no layers: pass None, 'all'"),
        (dict(layers=(1, "2")), "are no layers"),
        (dict(layers=1.5), "layers=1.5 are no layers"),
        (dict(layers=True), "layers=True are no layers"),
        (dict(layers=(1, 2, 1)), "more than once: pass distinct numbers"),
        (dict(layers=[3] * 20_000), "more than once: pass distinct numbers"),
    ],
)
def test_settings_that_cannot_be(settings: Any, match: str, unchecked: None) -> None:
    with pytest.raises(InputError, match=match):
        ViCrop(**settings)


def test_layers(unchecked: None) -> None:
    opened, picture = backend("llava"), noise(BIG, 0)
    as_list: Any = [1, 3]
    assert ViCrop(layers=as_list) == ViCrop(layers=(1, 3))
    assert hash(ViCrop(layers=as_list)) == hash(ViCrop(layers=(1, 3)))
    for asked in (as_list, "all", 2, None):
        found = ViCrop(layers=asked).look(opened, picture, QUESTION).importance.values
        expected = RelativeAttention(opened, layers=tuple(asked) if asked is as_list else asked)
        np.testing.assert_array_equal(found, expected.importance(picture, QUESTION).values)
    for wrong in (9, (1, 9), ()):
        with pytest.raises(HeadError, match="pass layers among"):
            ViCrop(layers=wrong).look(opened, picture, QUESTION)


def test_the_instruction_is_for_looking_only() -> None:
    opened, picture = backend("llava"), noise(BIG, 0)
    told = ViCrop(instruction=SHORT_ANSWER)
    said = ViCrop(generic=f"{GENERIC} {SHORT_ANSWER}").look(opened, picture, f"{QUESTION} {SHORT_ANSWER}")
    np.testing.assert_array_equal(told.look(opened, picture, QUESTION).importance.values, said.importance.values)
    assert told.crop(opened, (Message.user(picture, QUESTION),)).messages[0].text == QUESTION


def test_published_geometry_stretches_what_the_model_sees() -> None:
    """LLaVA's processor cuts out the centre square of a wide picture."""
    opened, picture = backend("llava"), noise((900, 300), 0)
    true, published = (ViCrop(geometry=name).look(opened, picture, QUESTION) for name in ("true", "published"))  # type: ignore[arg-type]
    np.testing.assert_array_equal(true.importance.values, published.importance.values)
    assert true.box != published.box


# ---- high resolution


@pytest.mark.parametrize(("size", "shape"), [((2000, 1000), (4, 8)), ((400, 1500), (16, 4)), ((600, 500), (4, 4))])
@pytest.mark.parametrize("method", ["relative", "gradient"])
def test_tiles_are_looked_at_one_by_one(method: Any, size: tuple[int, int], shape: tuple[int, int]) -> None:
    opened, picture = backend("llava"), noise(size, 0)
    vicrop = ViCrop(method=method, high_resolution=True)
    look = vicrop.look(opened, picture, QUESTION)
    assert look.importance.values.shape == shape and look.importance.image_size == size
    assert inside(look.box, size)
    tiling = tile_picture(size)
    maps = [ViCrop(method=method).look(opened, picture.crop(b.as_tuple()), QUESTION).importance for b in tiling.boxes]
    np.testing.assert_array_equal(look.importance.values, merge_maps(tiling, maps).values)
    assert len(maps) == shape[0] * shape[1] // 16


def test_tiles_of_one_picture_leave_the_others_as_they_are() -> None:
    opened = backend("llava")
    wide, small = noise((1600, 400), 0), noise((100, 100), 1)
    found = ViCrop(high_resolution=True).crop(opened, (Message.user(small, wide, QUESTION),)).record
    assert [look.importance.image_size for look in found] == [(100, 100), (1600, 400)]
    assert [look.importance.values.shape for look in found] == [(4, 4), (4, 16)]
    answer = opened.answer([Message.user(small, wide, QUESTION)], crop=ViCrop(high_resolution=True), max_new_tokens=2)
    assert [look.box for look in answer.steps["crop"]] == [look.box for look in found]


# ---- in a conversation


def crop(conversation: list[Message], **settings: Any) -> tuple[Message, ...]:
    return ViCrop(base=30, **settings).crop(backend("llava"), tuple(conversation)).messages


def sizes(message: Message) -> list[Any]:
    return [part if isinstance(part, str) else part.size for part in message.content]


def test_crops_stand_behind_the_pictures_of_their_message() -> None:
    one, two = noise((200, 100), 0), noise((100, 200), 1)
    (changed,) = crop([Message.user("first", one, "then", two, "at last")])
    looks = ViCrop(base=30).crop(backend("llava"), (Message.user("first", one, "then", two, "at last"),)).record
    boxes = [look.box for look in looks]
    cut = [(box.width, box.height) for box in boxes]
    assert sizes(changed) == ["first", (200, 100), "then", (100, 200), *cut, "at last"]
    for picture, box, shown in zip([one, two], boxes, changed.pictures[2:], strict=True):
        assert shown.tobytes() == picture.crop(box.as_tuple()).tobytes()


def test_the_last_message_with_pictures_gets_the_crops() -> None:
    first, second = noise((200, 100), 0), noise((100, 200), 1)
    turns = [Message.user(first, "left ?"), Message.assistant("no"), Message.user(second, "right ?")]
    changed = crop(turns)
    assert changed[:2] == tuple(turns[:2]) and len(changed[2].pictures) == 2
    later = [*turns[:2], Message.user("right ?")]
    changed = crop(later)
    assert len(changed[0].pictures) == 2 and changed[1:] == tuple(later[1:])


def test_what_stands_behind_the_question_is_not_looked_at() -> None:
    first, second = noise((200, 100), 0), noise((100, 200), 1)
    turns = [Message.user(first, "left ?"), Message("assistant", (second, "it is"))]
    changed = crop(turns)
    assert len(changed[0].pictures) == 2 and changed[1] == turns[1]
    assert crop(turns, high_resolution=True)[1] == turns[1]
    for settings in ({}, dict(high_resolution=True)):
        with pytest.raises(InputError, match="nothing to look at"):
            crop([Message.user("left ?"), turns[1]], **settings)


def test_only_pictures_that_are_worth_it_are_cut() -> None:
    """The small one is no larger than its crop."""
    small, large = noise((30, 30), 0), noise((200, 200), 1)
    for pair in ([small, large], [large, small]):
        (changed,) = crop([Message.user(*pair, QUESTION)])
        assert [picture.size for picture in changed.pictures[:2]] == [one.size for one in pair]
        assert len(changed.pictures) == 3
    (same,) = crop([Message.user(small, QUESTION)])
    assert same == Message.user(small, QUESTION)


def test_each_picture_is_looked_at_with_the_others_beside_it() -> None:
    opened, conversation = backend("llava"), seen(3)
    maps = RelativeAttention(opened).of_conversation(conversation).maps
    for look, importance in zip(ViCrop().crop(opened, conversation).record, maps, strict=True):
        np.testing.assert_array_equal(look.importance.values, importance.values)


def test_the_question_decides() -> None:
    opened, (picture,) = backend("llava"), pictures(1)
    one, other = (ViCrop(base=30).look(opened, picture, question).importance.values for question in (QUESTION, OTHER))
    assert not np.array_equal(one, other)


def test_a_look_costs_two_short_passes() -> None:
    """The picture is read once; the words of two questions are read behind it, up to the layer that is looked at."""
    opened, (picture,) = backend("llava"), pictures(1)
    with counted(layers(opened)[0]) as bottom, counted(layers(opened)[3]) as top:
        ViCrop(layers=1).look(opened, picture, QUESTION)
    assert len(bottom) == 3 and bottom[0] > 16 > max(bottom[1:])
    assert top == bottom[:1]


# ---- models that cannot


def test_a_text_model_is_told_apart(qr_mini: Backend) -> None:
    for settings in ({}, dict(layers=1), dict(method="gradient"), dict(method="input_gradient")):
        with pytest.raises(InputError, match="reads text only"):
            ViCrop(**settings).look(qr_mini, pictures(1)[0], QUESTION)
    with pytest.raises(InputError, match="reads text only"):
        qr_mini.answer(seen(1), crop=ViCrop())


def vip_llava() -> Backend:
    """A family without a row."""
    tokens = tokenizer(image_token="<image>")
    images = image_processor("llava", "LlavaImageProcessorPil", size={"shortest_edge": 56}, crop_size=square(56))
    processor = transformers.LlavaProcessor(
        images,
        tokens,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template("<image>"),
    )
    model = random_model(
        "VipLlavaForConditionalGeneration",
        "VipLlavaConfig",
        tokens,
        vision_config=tower("clip_vision_model", 56),
        text_config=text_config(tokens, "llama"),
        image_token_index=tokens.image_token_id,
        vision_feature_layers=[-1, -2],
    )
    return Backend(model, tokens, processor=processor, name="tiny VipLlava")


def test_a_family_without_a_row_answers_but_does_not_look_again() -> None:
    opened = vip_llava()
    assert opened.sees_pictures
    answer = opened.answer(seen(2), max_new_tokens=4)
    assert answer.usage.prompt_tokens == len(opened.lay_out(seen(2))) > 32
    for settings in ({}, dict(layers=1), dict(method="gradient"), dict(method="input_gradient")):
        with pytest.raises(UnsupportedModelError, match=r"'vipllava'.*ask without looking"):
            opened.answer(seen(2), crop=ViCrop(**settings))
    assert opened.answer(seen(2), max_new_tokens=4).text == answer.text


def test_a_look_leaves_nothing_behind() -> None:
    opened = fresh("llava")
    before = opened.answer(seen(1), max_new_tokens=5).text
    for method in METHODS:
        ViCrop(method=method).look(opened, pictures(1)[0], QUESTION)  # type: ignore[arg-type]
    assert opened.answer(seen(1), max_new_tokens=5).text == before
    assert all(parameter.grad is None for parameter in opened.model.parameters())


def test_a_side_may_be_a_share_of_pictures_that_lost_something(qr_mini_vl: Any) -> None:
    from qr_integrations.cropping import crop_side

    assert crop_side(qr_mini_vl, (1000, 600), 0.3) == 300
    assert crop_side(qr_mini_vl, (1000, 600)) == 250, "what the checkpoint's config states"
    assert crop_side(qr_mini_vl, (1000, 600), 336) == 336
    assert crop_side(qr_mini_vl, (140, 90), 0.3) == 140, "nothing was lost in a picture of 140 pixels"
    assert crop_side(backend("llava"), (1000, 600)) == backend("llava").model.config.vision_config.image_size
