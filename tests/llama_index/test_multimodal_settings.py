"""The settings of `ViCropLLM` and `DeCoLLM`: metadata, dictionaries, pickles, copies, and what importing costs."""

import copy
import json
import pickle
from collections.abc import Callable
from typing import Any

import pytest
from llama_index.core import Settings
from llama_index.core.llms import LLM, ChatMessage

BOTH = pytest.mark.parametrize("name", ["ViCropLLM", "DeCoLLM"])
FULL: dict[str, Any] = {
    "crop": {"method": "gradient", "layers": [3, 4], "min_lift": 1.5},
    "deco": {"alpha": 0.25, "layers": [5, 6]},
    "max_new_tokens": 7,
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 3,
    "stop": ["."],
    "seed": 4,
    "system_prompt": "be brief",
    "allow_urls": True,
    "context_window": 512,
}


def llm_class(name: str) -> Any:
    from qr_integrations import llama_index

    return getattr(llama_index, name)


@BOTH
def test_it_is_an_llm_of_llama_index_with_nothing_missing(name: str) -> None:
    assert issubclass(llm_class(name), LLM) and not llm_class(name).__abstractmethods__
    assert llm_class(name).class_name() == name


@BOTH
def test_metadata_are_those_of_the_model_and_the_settings(make_llm: Any, qr_mini_vl: Any, name: str) -> None:
    metadata = make_llm(name, max_new_tokens=9).metadata
    assert (metadata.context_window, metadata.num_output) == (qr_mini_vl.max_tokens, 9)
    assert metadata.is_chat_model and not metadata.is_function_calling_model
    assert metadata.model_name == qr_mini_vl.name
    assert make_llm(name, context_window=300).metadata.context_window == 300


def test_what_needs_no_model_loads_none(in_fresh_python: Callable[[str], str]) -> None:
    code = """
import pickle, sys
from qr_integrations.llama_index import DeCoLLM, ViCropLLM
for kind in (DeCoLLM, ViCropLLM):
    llm = kind(model_name="nowhere/at-all", context_window=4096, max_tokens=8, stop="a")
    again = kind.from_dict(llm.to_dict())
    assert pickle.loads(pickle.dumps(llm)).to_dict() == llm.to_dict() == again.to_dict()
    assert llm.metadata.num_output == 8 and llm.to_payload()["model_name"] == "nowhere/at-all"
print([name for name in ("torch", "transformers", "langchain_core") if name in sys.modules])
"""
    assert in_fresh_python(code) == "[]"


@BOTH
@pytest.mark.parametrize("settings", [{}, FULL], ids=["defaults", "all"])
def test_a_dictionary_and_json_hold_all_settings(qr_mini_vl: Any, name: str, settings: dict[str, Any]) -> None:
    llm = llm_class(name)(model=qr_mini_vl.name, **settings)
    data = llm.to_dict()
    assert data["class_name"] == name and json.loads(llm.to_json())["model"] == qr_mini_vl.name
    assert {key: json.loads(llm.to_json())[key] for key in settings if key not in ("crop", "deco")} == {
        key: value for key, value in settings.items() if key not in ("crop", "deco")
    }
    for again in (llm_class(name).from_dict(data), llm_class(name).from_json(llm.to_json())):
        assert again.to_dict() == data and again.strategy().params == llm.strategy().params
    if settings:
        assert llm.deco.alpha == 0.25 and llm.crop.layers == (3, 4)


@BOTH
@pytest.mark.parametrize("used", [False, True])
def test_a_pickle_is_small_and_answers_the_same(qr_mini_vl: Any, make_llm: Any, name: str, used: bool) -> None:
    llm = make_llm(name, stop=["."], max_new_tokens=3)
    expected = llm.complete("what is red ?").text if used else None
    data = pickle.dumps(llm)
    again = pickle.loads(data)
    assert len(data) < 10_000 and again.to_dict() == llm.to_dict() and again.open() is qr_mini_vl
    assert again.complete("what is red ?").text == (expected or llm.complete("what is red ?").text)


def test_a_copy_shares_the_weights_and_keeps_its_own_settings(make_llm: Any, qr_mini_vl: Any) -> None:
    llm = make_llm(max_new_tokens=3)
    deep, changed = copy.deepcopy(llm), llm.model_copy(update={"max_new_tokens": 1})
    assert deep.open() is qr_mini_vl and deep.to_dict() == llm.to_dict()
    assert changed.complete("red").raw["usage"]["completion_tokens"] == 1 and llm.max_new_tokens == 3


def test_a_change_is_checked_like_a_first_value(make_llm: Any) -> None:
    llm = make_llm()
    llm.deco = {"alpha": 0.2}
    assert llm.deco.alpha == 0.2 and llm.complete("red").raw["qr_method"] == "vicrop+deco"
    with pytest.raises(ValueError, match="no setting 'beta'"):
        llm.deco = {"beta": 0.2}
    with pytest.raises(ValueError, match="max_new_tokens"):
        llm.max_new_tokens = 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"crop": {"method": "psychic"}},
        {"deco": "strongly"},
        {"temperature": -1},
        {"context_window": 0},
        {"allow_url": True},
        {"backend": "b"},
    ],
    ids=str,
)
@pytest.mark.usefixtures("unchecked")
def test_a_wrong_setting_is_an_error_at_once(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        llm_class("ViCropLLM")(**{"model": "a", **wrong})


def test_neither_model_nor_backend_names_the_cure() -> None:
    with pytest.raises(ValueError, match="no model: pass model="):
        llm_class("ViCropLLM")()


def test_it_may_be_the_llm_of_the_process(make_llm: Any) -> None:
    llm = make_llm()
    before = Settings._llm
    try:
        Settings.llm = llm
        assert Settings.llm is llm and Settings.llm.chat([ChatMessage(content="red")]).message.content is not None
    finally:
        Settings._llm = before


def test_events_are_told_no_secrets(make_llm: Any) -> None:
    llm = llm_class("ViCropLLM")(model="a/b", model_kwargs={"token": "hf_secret"}, deco={"alpha": 0.2})
    payload = llm.to_payload()
    assert payload["model_name"] == "a/b" and payload["deco"]["alpha"] == 0.2 and payload["crop"] is True
    assert "hf_secret" not in json.dumps(payload)
