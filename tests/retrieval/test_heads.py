"""Head sets: data with provenance, and errors that name the cure."""

import json
from pathlib import Path
from typing import Any

import pytest


def test_published_sets_are_complete_and_say_where_they_come_from() -> None:
    from qr_integrations.retrieval.heads import published_sets

    assert len(published_sets()) == 11
    for heads in published_sets():
        assert len(heads) in (16, 32) and heads.model and heads.detection_data and "commit" in heads.source
        assert all(isinstance(n, int) for head in heads.heads for n in head)


def test_published_by_id_last_part_and_data() -> None:
    from qr_integrations import HeadSet

    by_id = HeadSet.published("meta-llama/Llama-3.1-8B-Instruct")
    assert by_id.detection_data == "LME" and by_id.heads[0] == (13, 18)  # the authors' default
    assert HeadSet.published("/models/llama-3.1-8b-instruct/") == by_id
    assert HeadSet.published("Llama-3.1-8B-Instruct", "NQ").detection_data == "NQ"
    assert HeadSet.published("Qwen2.5-7B-Instruct").detection_data == "NQ"  # there is no LME set
    assert (by_id.layers[0], by_id.top_layer, by_id.top(2).heads) == (8, 17, by_id.heads[:2])


def test_unknown_model_lists_what_is_published() -> None:
    from qr_integrations import HeadSet
    from qr_integrations.errors import HeadError

    with pytest.raises(HeadError, match=r"pass heads='all'.*Llama-3\.1-8B-Instruct"):
        HeadSet.published("gpt-5")


def test_save_and_load(tmp_path: Path) -> None:
    from qr_integrations import HeadSet

    heads = HeadSet.of([[3, 1], [0, 2]], model="m", detection_data="d", objective="qrscore", source="s")
    heads.save(tmp_path / "heads.json")
    assert HeadSet.load(tmp_path / "heads.json") == heads


@pytest.mark.parametrize(
    ("content", "message"),
    [("{}", "needs"), ("[", "not a head set"), ('{"heads": [[1]]}', "heads"), ('{"heads": []}', "at least one")],
)
def test_broken_files_are_named(tmp_path: Path, content: str, message: str) -> None:
    from qr_integrations import HeadSet
    from qr_integrations.errors import HeadError

    (tmp_path / "heads.json").write_text(content)
    with pytest.raises(HeadError, match=message):
        HeadSet.load(tmp_path / "heads.json")
    with pytest.raises(HeadError, match="no head set at"):
        HeadSet.load(tmp_path / "missing.json")


@pytest.mark.parametrize("heads", [[(99, 0)], [(0, 99)], [(0, -1)], [(1, 1), (1, 1)], [], [(1,)], [(1, 2, 3)]])
@pytest.mark.usefixtures("unchecked")
def test_heads_that_the_model_does_not_have(qr_mini: Any, heads: Any) -> None:
    from qr_integrations import QRHeadReranker
    from qr_integrations.errors import HeadError

    with pytest.raises(HeadError, match=r"head"):
        QRHeadReranker(qr_mini, heads=heads)


def test_every_way_to_name_heads(qr_mini: Any, tmp_path: Path) -> None:
    from qr_integrations import HeadSet

    auto = HeadSet.resolve("auto", qr_mini)
    auto.save(tmp_path / "h.json")
    assert HeadSet.resolve(tmp_path / "h.json", qr_mini) == HeadSet.resolve(str(tmp_path / "h.json"), qr_mini) == auto
    assert HeadSet.resolve(list(auto.heads), qr_mini).heads == auto.heads
    shape = {layer: attention.num_heads for layer, attention in qr_mini.attention_layers.items()}
    assert HeadSet.resolve("all", qr_mini).heads == tuple((la, h) for la, n in shape.items() for h in range(n))
    assert json.loads((tmp_path / "h.json").read_text())["objective"] == "qrscore"


def test_the_bundled_heads_leave_layers_to_skip(qr_mini: Any) -> None:
    from qr_integrations import HeadSet

    assert HeadSet.resolve("auto", qr_mini).top_layer < max(qr_mini.attention_layers)


def test_random_heads_are_a_control_that_can_be_repeated(qr_mini: Any) -> None:
    from qr_integrations import HeadSet
    from qr_integrations.errors import HeadError

    drawn = [HeadSet.random(qr_mini, 5, seed=seed).heads for seed in range(4)]
    assert HeadSet.random(qr_mini, 5, seed=1).heads == drawn[1] and len(set(drawn)) == 4
    assert all(len(set(heads)) == 5 and set(heads) <= set(HeadSet.all(qr_mini).heads) for heads in drawn)
    with pytest.raises(HeadError, match="pass 1 to 16"):
        HeadSet.random(qr_mini, 17)


def test_scores_of_a_detection_are_read_back(tmp_path: Path) -> None:
    from qr_integrations.errors import HeadError
    from qr_integrations.retrieval.heads import read_scores

    path = tmp_path / "heads.json"
    path.write_text(json.dumps({"heads": [[1, 0]], "scores": [[0, 0, 0.25], [1, 0, 0.5]]}))
    assert read_scores(path) == {(0, 0): 0.25, (1, 0): 0.5}
    for bad in ('{"heads": [[1, 0]]}', "[1]", "{", '{"scores": [[0, 0]]}'):
        path.write_text(bad)
        with pytest.raises(HeadError, match="qr-integrations detect"):
            read_scores(path)
    with pytest.raises(HeadError, match="qr-integrations detect"):
        read_scores(tmp_path / "none.json")
