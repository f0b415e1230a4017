"""What the tests of fine-tuning share: tiny random models of several families, and made-up lists."""

import random
from typing import Any

import pytest
import torch

RARE = [f"rare{i}" for i in range(40)]
COMMON = [f"common{i}" for i in range(20)]
LAYERS, WIDTH = 3, 32
SIZES = dict(hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4)
SIZES |= dict(num_key_value_heads=2, max_position_embeddings=1024)
FAMILIES: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "Qwen3": ("Qwen3Config", SIZES | dict(head_dim=16), ["k_proj", "q_proj"]),
    "GPT-2": ("GPT2Config", dict(n_embd=WIDTH, n_head=4, n_layer=LAYERS, n_positions=1024), ["c_attn"]),
    "Phi-3": ("Phi3Config", SIZES | dict(pad_token_id=0), ["qkv_proj"]),
    "DeepSeek-V3": (
        "DeepseekV3Config",
        SIZES
        | dict(num_key_value_heads=4, kv_lora_rank=16, q_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8)
        | dict(v_head_dim=12, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, n_shared_experts=1)
        | dict(n_group=2, topk_group=1),
        ["kv_a_proj_with_mqa", "kv_b_proj", "q_a_proj", "q_b_proj"],
    ),
}


def qr() -> Any:
    import qr_integrations  # not before jaxtyping's import hook is in place

    return qr_integrations


def settings(**given: Any) -> Any:
    from training.head_trainer import FinetuneSettings

    return FinetuneSettings(**given)


def finetune(*given: Any, **options: Any) -> Any:
    from training.finetune_heads import finetune as run

    return run(*given, **options)


def refused(says: str, kind: str = "InputError") -> Any:
    from qr_integrations import errors

    return pytest.raises(getattr(errors, kind), match=says)


def tiny(family: str = "Qwen3", **options: Any) -> Any:
    """A random model of a family, new at each call, that splits texts into words."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    from qr_integrations.retrieval.layout import FIND

    split = pre_tokenizers.Whitespace()
    prompt = f"Here are some paragraphs: [ ] N/A {' '.join(map(str, range(10)))} {FIND.format(query='')}"
    words = ["<unk>", *dict.fromkeys(word for word, _ in split.pre_tokenize_str(prompt)), *COMMON, *RARE]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = split
    name, kwargs, _ = FAMILIES[family]
    config = getattr(transformers, name)(vocab_size=len(words), bos_token_id=None, eos_token_id=None, **kwargs)
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, **options).eval()
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.dim() > 1):
            parameter.normal_(std=0.2)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<unk>")
    return qr().Backend(model, fast, name=f"tiny {family}")


def made_up(number: int, seed: int = 7) -> list[Any]:
    """Lists of four documents, one or two of which hold the rare words of the question."""
    draw, found = random.Random(seed), []
    for i in range(number):
        rare = draw.sample(RARE, 8)
        texts = [[*rare[2 * d : 2 * d + 2], *draw.choices(COMMON, k=4)] for d in range(4)]
        gold = {0: 1} if i % 2 else {0: 1, 3: 2}
        if 3 in gold:
            texts[3][:2] = rare[:2]
        documents = tuple(qr().Document(" ".join(draw.sample(text, len(text)))) for text in texts)
        found.append(qr().JudgedList(" ".join(rare[:2]), documents, gold, id=str(i)))
    return found


def trainer(backend: Any, heads: Any, lists: Any = None, valid: Any = (), **given: Any) -> Any:
    from training.head_trainer import HeadTrainer

    return HeadTrainer(backend, qr().HeadSet.of(heads), lists or made_up(4), valid, settings(**given))


def moved(run: Any) -> Any:
    """The same, with an adapter that changes what the model computes."""
    random_numbers = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in run.adapter.parameters.values():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=random_numbers))
    return run


def scores(reranker: Any, judged: Any) -> dict[int, float]:
    return {item.index: item.score for item in reranker.rank(judged.query, judged.documents)}
