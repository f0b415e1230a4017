"""Every family's tokens and pixels are told apart by picture, and a prompt is read on exactly behind any of them."""

from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaConfig

from qr_integrations.backend.picture_families import picture_family, read_rest, rest_inputs
from qr_integrations.errors import InputError, UnsupportedModelError
from qr_integrations.types import Grid
from tests.backend.found_pictures import TALL, WIDE, features, find, image_token, noise, tiny_once, two
from tests.backend.tiny_vlms import FAMILIES, idefics, prompt, tiny

LIMIT = 1e-5
QUESTION_FIRST = {"instructblip", "paligemma"}
SHARING = [name for name in FAMILIES if name not in QUESTION_FIRST]


# ---- where its token stands


@pytest.mark.parametrize("name", FAMILIES)
def test_positions_are_placeholders_one_for_each_cell(name: str) -> None:
    _, _, inputs, pictures = two(name)
    ids = inputs["input_ids"][0].tolist()
    for picture in pictures:
        assert len(picture.positions) == picture.grid.rows * picture.grid.columns
        assert {ids[place] for place in picture.positions} == {image_token(name)}
        assert list(picture.positions) == sorted(set(picture.positions))
        assert picture.start <= picture.positions[0] and picture.positions[-1] < picture.stop
    inside = {place for picture in pictures for place in range(picture.start, picture.stop)}
    assert all((token != image_token(name)) or place in inside for place, token in enumerate(ids))
    assert pictures[0].stop <= pictures[1].start


@pytest.mark.parametrize("name", SHARING)
def test_a_picture_ends_where_words_begin(name: str) -> None:
    words = "left", "right"
    processor: Any = tiny_once(name)[1]
    _, _, inputs, pictures = find(name, noise(WIDE, 0), words[0], noise(TALL, 1), words[1])
    behind = [int(inputs["input_ids"][0, picture.stop]) for picture in pictures]
    assert behind == processor.tokenizer.convert_tokens_to_ids(list(words))
    assert inputs["input_ids"][0, pictures[1].start - 1] == behind[0]


def test_queries_stand_in_one_row() -> None:
    _, family, _, pictures = two("instructblip")
    assert [picture.grid for picture in pictures] == [Grid(1, 8), Grid(1, 8)]
    assert pictures[1].positions == tuple(range(8, 16))
    assert not family.has_places


def test_a_class_token_that_is_passed_on_is_no_cell() -> None:
    model, processor = tiny("llava")
    model.config.vision_feature_select_strategy = processor.vision_feature_select_strategy = "full"
    inputs = prompt(processor, noise(WIDE, 0), noise(TALL, 1))
    pictures = picture_family(model.config).locate(model.config, processor, inputs, [WIDE, TALL])
    assert [picture.stop - picture.start for picture in pictures] == [17, 17]
    assert [picture.positions[0] - picture.start for picture in pictures] == [1, 1]
    model(**inputs)  # takes these placeholders


def test_tags_may_be_plain_text() -> None:
    model, processor = idefics("Idefics3", "idefics3", one_token_a_tag=False)
    inputs = prompt(processor, noise(WIDE, 0), noise(TALL, 1), "what is in the picture ?")
    pictures = picture_family(model.config).locate(model.config, processor, inputs, [WIDE, TALL])
    assert [picture.tiles for picture in pictures] == [3, 5]
    assert sum(picture.tiles for picture in pictures) == inputs["pixel_values"].shape[1]


@pytest.mark.parametrize("name", FAMILIES)
def test_other_pictures_than_those_of_the_prompt_are_refused(name: str) -> None:
    model, family, inputs, _ = two(name)
    with pytest.raises(InputError, match="pass"):
        family.locate(model.config, tiny_once(name)[1], inputs, [WIDE, TALL, TALL])
    with pytest.raises(InputError, match="pass"):
        family.locate(model.config, tiny_once(name)[1], inputs, [WIDE])


def test_crops_that_the_processor_adds_are_refused() -> None:
    model, processor = tiny("gemma3")
    wide = noise((600, 300), 0)
    inputs = processor(
        images=[wide],
        text=["<start_of_image>"],
        do_pan_and_scan=True,
        pan_and_scan_min_crop_size=64,
        return_tensors="pt",
    )
    assert len(inputs["pixel_values"]) == 3
    with pytest.raises(InputError, match="do_pan_and_scan=False"):
        picture_family(model.config).locate(model.config, processor, inputs, [wide.size])


@pytest.mark.parametrize("name", SHARING)
def test_a_prompt_without_pictures_has_none(name: str) -> None:
    assert find(name, "what is left ?")[3] == []


# ---- what belongs to it


@pytest.mark.parametrize("name", FAMILIES)
def test_a_selection_is_what_the_processor_makes_of_that_picture_alone(name: str) -> None:
    _, family, inputs, pictures = two(name)
    assert family.select(inputs, pictures, 1, 1) == {}
    for number, picture in enumerate((noise(WIDE, 0), noise(TALL, 1))):
        alone = find(name, picture, "what is in the picture ?")[2]
        chosen = family.select(inputs, pictures, number, number + 1)
        pixel_side = {key for key in alone if key.startswith(("pixel", "image", "batch", "qformer"))}
        assert set(chosen) == pixel_side
        for key, value in chosen.items():
            assert torch.equal(value, alone[key]), key


@pytest.mark.parametrize("name", FAMILIES)
def test_a_selection_fills_the_placeholders_of_its_pictures(name: str) -> None:
    model, family, inputs, pictures = two(name)
    whole = features(model, family.select(inputs, pictures, 0, 2))
    parts = [features(model, family.select(inputs, pictures, number, number + 1)) for number in (0, 1)]
    ids = inputs["input_ids"][0]
    expected = [int((ids[picture.start : picture.stop] == image_token(name)).sum()) for picture in pictures]
    assert [len(part) for part in parts] == expected
    torch.testing.assert_close(torch.cat(parts), whole, atol=LIMIT, rtol=0)


def test_what_a_processor_forgets_about_the_second_picture_is_made_up_for() -> None:
    model, family, expected, _ = two("instructblip")
    processor: Any = tiny_once("instructblip")[1]
    text = "question : what is in the picture ? short answer :"
    made = processor(images=[noise(WIDE, 0), noise(TALL, 1)], text=text, return_tensors="pt")
    with pytest.raises(RuntimeError):
        model(**made)
    completed = family.complete(model.config, made, 2)
    assert completed.keys() == expected.keys()
    assert all(torch.equal(completed[name], expected[name]) for name in expected)
    again = family.complete(model.config, completed, 2)
    assert all(torch.equal(completed[name], again[name]) for name in expected)


@pytest.mark.parametrize("name", SHARING)
def test_other_processors_forget_nothing(name: str) -> None:
    model, family, inputs, _ = two(name)
    completed = family.complete(model.config, inputs, 2)
    assert completed.keys() == inputs.keys() and all(completed[key] is inputs[key] for key in inputs)


# ---- reading on


@pytest.mark.parametrize(
    ("name", "together"), [*((name, False) for name in SHARING), ("llava_onevision", True), ("gemma3", True)]
)
def test_the_rest_is_read_as_if_all_were_read_at_once(name: str, together: bool) -> None:
    model, family, inputs, pictures = two(name, together=together)
    expected = model(**inputs, logits_to_keep=1).logits
    cuts = [1, pictures[0].stop, pictures[1].stop, inputs["input_ids"].shape[1] - 1]  # behind 0, 1, 2, 2 pictures
    for cut in cuts:
        kept = DynamicCache()
        read_rest(model, family, inputs, pictures, 0, kept, stop=cut)
        assert kept.get_seq_length() == cut
        found = read_rest(model, family, inputs, pictures, cut, kept)
        torch.testing.assert_close(found, expected, atol=LIMIT, rtol=0)


@pytest.mark.parametrize("name", SHARING)
def test_the_comparison_would_see_a_wrong_picture(name: str) -> None:
    model, family, inputs, pictures = two(name)
    kept, cut = DynamicCache(), pictures[0].stop
    expected = model(**inputs, logits_to_keep=1).logits
    read_rest(model, family, inputs, pictures, 0, kept, stop=cut)
    other = find(name, noise(WIDE, 0), noise(TALL, 2), "what is in the picture ?")[2]
    assert (read_rest(model, family, other, pictures, cut, kept) - expected).abs().max() > 0.01


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_positions_do_not_remember_the_last_prompt(name: str) -> None:
    model, family, inputs, pictures = two(name)
    fresh = rest_inputs(model, family, inputs, pictures, pictures[0].stop)["position_ids"]
    model(**find(name, noise((64, 64), 3), "left")[2])
    again = rest_inputs(model, family, inputs, pictures, pictures[0].stop)["position_ids"]
    assert torch.equal(fresh, again)
    ids = inputs["input_ids"]
    without_types = {key: value for key, value in inputs.items() if key != "mm_token_type_ids"}
    assert torch.equal(family.positions(model, without_types), family.positions(model, inputs))
    assert fresh.max() + 1 < ids.shape[1]  # a picture takes fewer positions than it has tokens


@pytest.mark.parametrize("name", SHARING)
def test_no_picture_is_cut_in_two(name: str) -> None:
    model, family, inputs, pictures = two(name)
    with pytest.raises(InputError, match=r"picture #1 .* cut where a picture ends"):
        rest_inputs(model, family, inputs, pictures, pictures[1].positions[-1])
    with pytest.raises(InputError, match="picture #0"):
        rest_inputs(model, family, inputs, pictures, 0, pictures[0].positions[-1])


@pytest.mark.parametrize("name", sorted(QUESTION_FIRST))
def test_where_pictures_are_read_with_the_question_a_prompt_is_read_whole(name: str) -> None:
    model, family, inputs, pictures = two(name)
    found = read_rest(model, family, inputs, pictures, 0, DynamicCache())
    torch.testing.assert_close(found, model(**inputs, logits_to_keep=1).logits, atol=LIMIT, rtol=0)
    with pytest.raises(UnsupportedModelError, match="whole"):
        read_rest(model, family, inputs, pictures, pictures[0].stop, DynamicCache())


@pytest.mark.parametrize("name", FAMILIES)
def test_whether_a_pictures_tokens_depend_on_the_question_is_as_the_row_says(name: str) -> None:
    states = []
    for question in ("what is left ?", "which colour has right ?"):
        model, family, inputs, (picture,) = find(name, noise(WIDE, 0), question)
        hidden = model(**inputs, output_hidden_states=True)
        hidden = getattr(hidden, "language_model_outputs", hidden).hidden_states[-1]
        states.append(hidden[0, list(picture.positions)])
    same = bool((states[0] - states[1]).abs().max() < LIMIT)
    assert same == family.shares_prefix


# ---- the table


def test_an_unknown_family_is_named() -> None:
    with pytest.raises(UnsupportedModelError, match=r"'llama'.*llava.*mistral3"):
        picture_family(LlamaConfig())


@pytest.mark.parametrize("name", FAMILIES)
def test_a_crop_is_as_large_as_what_the_tower_takes(name: str) -> None:
    model = tiny_once(name)[0]
    free = {"qwen2_vl", "qwen2_5_vl", "qwen3_vl", "mistral3"}
    given = {"llava_onevision": 60, "pixtral": 140}
    given |= dict.fromkeys(["llava", "mqt_llava", "llava_next", "instructblip", "paligemma"], 56)
    assert picture_family(model.config).side(model.config) == (224 if name in free else given.get(name, 112))


@pytest.mark.parametrize("name", ["llava", "instructblip", "paligemma"])
def test_a_published_prompt_takes_pictures_and_a_question(name: str) -> None:
    template = picture_family(tiny_once(name)[0].config).template
    assert template is not None
    text = template.format(pictures="<image>", question="what is left ?")
    assert "what is left ?" in text
    assert text.startswith("<image>") == (name != "instructblip")  # whose processor puts the slots in front itself
