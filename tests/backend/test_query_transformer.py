"""The matryoshka query transformer: the authors' numbers, and what has to hold for any weights."""

import copy
import io
import json
import math
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from qr_integrations.backend.query_transformer import QueryTransformer

GOLDEN = Path(__file__).parents[1] / "golden" / "vision"
FACTS = json.loads((GOLDEN / "mqt.json").read_text(encoding="utf-8"))
ARRAYS = np.load(GOLDEN / "mqt.npz")
NUMBERS = (1, 2, 7, 16, 64, 256)
REFUSED_BY_THE_AUTHORS = ["0", "257", "-3", "'abc'", "''", "[4]"]
TAKEN_BY_THE_AUTHORS_ALONE = ["'first_stage'", "'64'", "36.9", "True"]


def array(name: str) -> Tensor:
    return torch.from_numpy(ARRAYS[name]).float()


def published(case: dict[str, Any]) -> "QueryTransformer":
    """The authors' weights, under their names."""
    from qr_integrations.backend.query_transformer import QueryTransformer

    module = QueryTransformer(case["kv_dim"], case["num_heads"], case["embed_dim"])
    prefix = case["weights_prefix"]
    module.load_state_dict({name.removeprefix(prefix): array(name) for name in ARRAYS if name.startswith(prefix)})
    return module.eval()


def drawn(width: int = 32, heads: int = 4, out: int = 20, queries: int = 16, patches: int = 36) -> "QueryTransformer":
    """Random weights, biases and norms included."""
    from qr_integrations.backend.query_transformer import QueryTransformer

    torch.manual_seed(0)
    module = QueryTransformer(width, heads, out, queries, patches)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 1 / math.sqrt(parameter.shape[-1]) if parameter.dim() > 1 else 1)
    return module.eval()


def pictures(many: int = 2, patches: int = 36, width: int = 32) -> Tensor:
    return torch.randn(many, patches, width, generator=torch.Generator().manual_seed(1))


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> bool:
    return float((ours - theirs).abs().max()) <= tolerance * float(theirs.abs().max())


@torch.no_grad()
def folded(module: "QueryTransformer", patches: Tensor, count: int | None = None) -> Tensor:
    return module(patches, count)


@pytest.fixture(params=FACTS["cases"], ids=lambda case: case["id"])
def case(request: pytest.FixtureRequest) -> dict[str, Any]:
    return request.param


# ---- the authors' numbers


@pytest.mark.parametrize("count", NUMBERS)
def test_tokens_are_the_authors(case: dict[str, Any], count: int) -> None:
    module, expected = published(case), array(case["outputs"][str(count)])
    patches = array(case["x"])
    assert close(folded(module, patches, count), expected)
    assert close(module.plain(patches, count).detach(), expected)


def test_attention_is_the_authors(case: dict[str, Any]) -> None:
    assert close(published(case).attention()[:, [0, 100]].detach(), array(case["attention_rows"]))


def test_the_stretched_table_is_the_authors(case: dict[str, Any]) -> None:
    from qr_integrations.backend.query_transformer import stretch_table

    stretched = stretch_table(published(case).pos_embed, 24)
    assert close(stretched[case["pos_embed_24x24_rows"]], array(case["pos_embed_24x24"]))


@pytest.mark.parametrize("name", list(FACTS["position_tables"]))
def test_tables_of_places_are_the_authors(name: str) -> None:
    from qr_integrations.backend.query_transformer import sine_cosine_table, stretch_table

    facts = FACTS["position_tables"][name]
    table = sine_cosine_table(facts["embed_dim"], facts["grid"])
    assert close(table[facts["rows"]], array(facts["values"]))
    if "bicubic_rows" in facts:
        stretched = stretch_table(table.half(), 24)[facts["bicubic_rows"]][:, facts["bicubic_columns"]]
        assert close(stretched, array(facts["bicubic_from_half_table_cast_to_float_first"]))


def test_the_table_begins_with_the_column() -> None:
    from qr_integrations.backend.query_transformer import sine_cosine_table

    table = sine_cosine_table(1024, 16)[:, [0, 256, 512, 768]]
    assert table[1].tolist() == pytest.approx([math.sin(1), math.cos(1), 0, 1])
    assert table[16].tolist() == pytest.approx([0, 1, math.sin(1), math.cos(1)])


def test_a_table_stays_as_it_is_on_its_own_grid() -> None:
    from qr_integrations.backend.query_transformer import sine_cosine_table, stretch_table

    table = sine_cosine_table(8, 3)
    assert torch.equal(stretch_table(table, 3), table)


def test_a_constant_table_stays_constant_when_stretched() -> None:
    from qr_integrations.backend.query_transformer import stretch_table

    row = torch.linspace(-1, 1, 8)
    assert close(stretch_table(row.expand(16, -1), 7), row.expand(49, -1), 1e-6)


# ---- arguments


def inputs_of(result: bool) -> set[str]:
    return {fact["input"] for fact in FACTS["token_count_argument"] if (fact["exception"] is None) is result}


def test_the_authors_arguments_are_all_looked_at() -> None:
    assert inputs_of(False) == {*REFUSED_BY_THE_AUTHORS, "None"}
    assert inputs_of(True) == {*TAKEN_BY_THE_AUTHORS_ALONE, "1", "2", "7", "16", "255", "256"}


@pytest.mark.parametrize("literal", REFUSED_BY_THE_AUTHORS + TAKEN_BY_THE_AUTHORS_ALONE)
@pytest.mark.usefixtures("unchecked")
def test_only_whole_numbers_of_tokens_can_be_made(literal: str) -> None:
    import ast

    from qr_integrations.errors import InputError

    module = drawn(queries=256)
    with pytest.raises(InputError, match="pass 1 to 256"):
        folded(module, pictures(), ast.literal_eval(literal))


@pytest.mark.parametrize("count", [1, 7, 16])
def test_as_many_tokens_as_asked_for(count: int) -> None:
    assert folded(drawn(), pictures(), count).shape == (2, count, 20)


def test_none_means_all() -> None:
    assert torch.equal(folded(drawn(), pictures()), folded(drawn(), pictures(), 16))


@pytest.mark.parametrize("patches", [fact["patches"] for fact in FACTS["other_patch_counts"]])
def test_another_resolution_is_refused_as_by_the_authors(patches: int) -> None:
    from qr_integrations.errors import InputError

    module = published(FACTS["cases"][1])
    for read in (module, module.pooled):
        with pytest.raises(InputError, match=f"{patches} patches do not fit .* made for 576"):
            read(pictures(1, patches))


@pytest.mark.parametrize(
    ("sizes", "cure"),
    [
        ((32, 4, 8, 15, 36), "15 queries form no square"),
        ((32, 4, 8, 16, 35), "35 patches form no square"),
        ((30, 3, 8, 16, 36), "multiple of both"),
        ((32, 3, 8, 16, 36), "multiple of both"),
    ],
)
def test_sizes_that_cannot_be(sizes: tuple[int, ...], cure: str) -> None:
    from qr_integrations.backend.query_transformer import QueryTransformer
    from qr_integrations.errors import InputError

    with pytest.raises(InputError, match=cure):
        QueryTransformer(*sizes)


# ---- what holds for any weights


@pytest.mark.parametrize("queries_and_patches", [(16, 36), (64, 64), (4, 100), (25, 9)])
@pytest.mark.parametrize("share", [0.01, 0.3, 1.0])
def test_the_short_way_gives_what_torch_gives(queries_and_patches: tuple[int, int], share: float) -> None:
    """Both orders of the products: pooling first, and the values first."""
    queries, patches = queries_and_patches
    module, seen = drawn(queries=queries, patches=patches), pictures(3, patches)
    count = max(1, int(share * queries))
    keys = module.ln_k(stretched(module)).expand(3, -1, -1)
    asked = module.ln_q(module.query[:count] + module.pos_embed[:count]).expand(3, -1, -1)
    expected = module.attn(asked, keys, module.ln_v(seen), need_weights=True)[0] @ module.proj
    assert close(folded(module, seen, count), expected.detach())
    assert close(module.plain(seen, count).detach(), expected.detach())


def stretched(module: "QueryTransformer") -> Tensor:
    from qr_integrations.backend.query_transformer import stretch_table

    return stretch_table(module.pos_embed, module.side)


@pytest.mark.parametrize("count", [1, 3, 15])
def test_fewer_tokens_are_the_first_of_more(count: int) -> None:
    module, seen = drawn(), pictures()
    assert close(folded(module, seen, count), folded(module, seen)[:, :count])


def test_attention_is_the_same_for_all_pictures_and_rows_sum_to_one() -> None:
    module = drawn()
    weights = [
        module.attn(
            module.ln_q(module.query + module.pos_embed)[None],
            module.ln_k(stretched(module))[None],
            module.ln_v(seen[None]),
            average_attn_weights=False,
        )[1]
        for seen in pictures(2)
    ]
    attention = module.attention().detach()
    assert torch.equal(*weights)
    assert close(attention, weights[0][0].detach())
    assert attention.sum(-1).numpy() == pytest.approx(1, abs=1e-5)


def test_tokens_are_affine_in_the_normed_patches() -> None:
    module = drawn()
    module.ln_v = nn.Identity()
    first, second = pictures(1), pictures(2)[1:]
    mixed = folded(module, 0.3 * first + 0.7 * second)
    assert close(mixed, 0.3 * folded(module, first) + 0.7 * folded(module, second))


def test_a_picture_is_read_in_its_places() -> None:
    module, seen = drawn(), pictures(1)
    order = torch.randperm(36, generator=torch.Generator().manual_seed(2))
    assert not close(folded(module, seen[:, order]), folded(module, seen), 1e-2)


def test_a_batch_is_read_as_its_pictures_are() -> None:
    module, seen = drawn(), pictures(3)
    for count in (1, 16):
        singles = torch.cat([folded(module, one[None], count) for one in seen])
        assert close(folded(module, seen, count), singles)


def test_pooled_patches_stay_in_the_towers_space() -> None:
    module, patch = drawn(), torch.linspace(-1, 1, 32)
    with torch.no_grad():
        pooled = module.pooled(patch.expand(1, 36, -1), 3)
        assert close(pooled, module.ln_v(patch).expand(1, 3, -1))


# ---- what is kept


def test_weights_survive_a_round_trip() -> None:
    from safetensors.torch import load, save

    module, seen = drawn(), pictures()
    other = type(module)(32, 4, 20, 16, 36).eval()
    before = folded(other, seen)
    other.load_state_dict(load(save(module.state_dict())))
    assert not close(before, folded(module, seen))
    assert torch.equal(folded(other, seen), folded(module, seen))


def changed_in_place(module: "QueryTransformer") -> None:
    with torch.no_grad():
        module.query.add_(torch.randn(16, 32))


def an_optimiser_step(module: "QueryTransformer") -> None:
    module.train()
    module(pictures(), 16).square().sum().backward()
    torch.optim.SGD(module.parameters(), 0.1).step()
    module.eval()


def other_weights(module: "QueryTransformer") -> None:
    module.load_state_dict({name: 2 * value for name, value in drawn().state_dict().items()}, assign=True)


def to_half_and_back(module: "QueryTransformer") -> None:
    with torch.no_grad():
        module.query.mul_(300)
    module.half().float()


def another_parameter_in_the_same_place(module: "QueryTransformer") -> None:
    module.query = nn.Parameter(module.query.data.mul_(-3).detach())


CHANGES = [changed_in_place, an_optimiser_step, other_weights, to_half_and_back, another_parameter_in_the_same_place]


@pytest.mark.parametrize("change", CHANGES)
def test_what_was_computed_from_old_weights_is_not_used(change: Any) -> None:
    module, seen = drawn(), pictures()
    before = folded(module, seen)
    change(module)
    after = folded(module, seen)
    assert not close(after, before, 1e-3)
    assert close(after, module.plain(seen, 16).detach())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_another_precision(dtype: torch.dtype) -> None:
    module, seen = drawn(), pictures()
    expected = folded(module, seen)
    tokens = folded(module.to(dtype), seen.to(dtype))
    assert tokens.dtype is dtype
    assert close(tokens.float(), expected, 3e-2)


def test_copies_and_pickles_do_without_what_can_be_computed() -> None:
    module, seen = drawn(), pictures()
    fresh, used = io.BytesIO(), io.BytesIO()
    torch.save(module, fresh)
    expected = folded(module, seen)
    torch.save(module, used)
    assert len(used.getvalue()) == len(fresh.getvalue())
    copied = copy.deepcopy(module)
    assert torch.equal(folded(copied, seen), expected)
    changed_in_place(copied)
    assert torch.equal(folded(module, seen), expected)


def test_what_was_kept_in_inference_mode_serves_gradients_later() -> None:
    module = drawn().requires_grad_(False)
    with torch.inference_mode():
        module(pictures(), 4)
    seen = pictures().requires_grad_()
    module(seen, 4).square().sum().backward()
    again = pictures().requires_grad_()
    module.plain(again, 4).square().sum().backward()
    assert seen.grad is not None and again.grad is not None
    assert close(seen.grad, again.grad)


@pytest.mark.parametrize("training", [True, False])
def test_what_learns_gets_gradients(training: bool) -> None:
    module = drawn().train(training)
    with torch.no_grad():
        module(pictures(), 16)
    module(pictures(), 5).square().sum().backward()
    gradients = {name: one.grad for name, one in module.named_parameters()}
    assert all(one is not None and one.abs().max() > 0 for one in gradients.values())
    assert gradients["query"] is not None and gradients["query"][5:].abs().max() == 0
    assert "pos_embed" not in gradients


def test_any_number_of_threads_may_ask_while_nothing_is_kept() -> None:
    module, seen = drawn(), pictures()
    expected = {count: folded(copy.deepcopy(module), seen, count) for count in range(1, 17)}
    wrong: list[int] = []
    start = threading.Barrier(8)

    def ask(number: int) -> None:
        start.wait()
        for count in [(number + step) % 16 + 1 for step in range(16)]:
            if not torch.equal(folded(module, seen, count), expected[count]):
                wrong.append(count)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# ---- in a model: the number of placeholders says how many tokens are made


def told(*lengths: int) -> Tensor:
    """What the model says behind two pictures that have so many placeholders; 0 is a word between them."""
    from tests.backend.seeing import backend

    opened = backend("mqt_llava")
    visual = opened.model.config.image_token_id
    ids = [token for length in lengths for token in ([visual] * length or [7])]
    pixels = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        logits: Tensor = opened.model(input_ids=torch.tensor([[*ids, 8]]), pixel_values=pixels).logits
    return logits[0, -1]


def test_pictures_may_stand_side_by_side() -> None:
    assert torch.equal(told(3, 3), told(6))
    assert not torch.equal(told(3, 0, 3), told(6))


@pytest.mark.parametrize("lengths", [(3, 2), (2, 0, 4), (5, 0, 1), (0,)])
def test_pictures_with_unequal_shares_are_refused(lengths: tuple[int, ...]) -> None:
    from qr_integrations.errors import InputError

    with pytest.raises(InputError, match="no equal share"):
        told(*lengths)
