"""Converted checkpoints compared with the authors' network, and files without the authors' weights."""

import http.server
import io
import json
import pickle
import re
import threading
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer import Typer
from typer.testing import CliRunner

from authors_model import (
    IMAGE,
    IMAGE_SIZE,
    JOINT_HEADS,
    PATCH_SIZE,
    TOWER,
    TOWER_HEADS,
    VOCABULARY,
    AuthorsModel,
    write_vocabulary,
)
from edje.checkpoint import WEIGHTS_FILE, CheckpointTampered, read_config
from edje.convert import import_model, main
from edje.imports.authors import AuthorsError, ImportOptions, config_of, layout_of
from edje.imports.sources import SourceError, find_source, hub_folder
from edje.model.edje import build_edje
from edje.model.variants import VARIANTS
from edje.model.weights import load_checkpoint
from edje.text import Tokenizer

BERT_UNCASED = Path(__file__).parents[3] / "shared" / "data" / "bert_uncased"
HEADS = ["--vision-heads", str(TOWER_HEADS), "--joint-heads", str(JOINT_HEADS)]
PAPERS = [name for name, each in VARIANTS.items() if name.startswith("paper-") and each.joint.kind == "full"]
CAPTIONS = ["A dog runs, on the beach!", "cat", "the cats sleep", "a dog " * 40, "bcdefghijk " * 9, ""]
APP = Typer()
APP.command()(main)


def run(*arguments):
    return CliRunner().invoke(APP, [str(each) for each in arguments])


def refusal(*arguments):
    """The error message of the command, which must not be a traceback."""
    result = run(*arguments)
    assert result.exit_code in (1, 2), result.output
    assert isinstance(result.exception, SystemExit)
    return result.stderr


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    return write_vocabulary(tmp_path_factory.mktemp("vocabulary") / "vocab.txt")


@pytest.fixture(scope="module")
def authors():
    return AuthorsModel("compression")


@pytest.fixture
def convert(tmp_path, vocabulary):
    """Write weights as the authors do, convert them and return the checkpoint's folder."""

    def convert(weights, *options):
        torch.save({"model": weights, "epoch": 3}, tmp_path / "authors.pth")
        result = run(tmp_path / "authors.pth", tmp_path / "ours", "--tokenizer", vocabulary, *HEADS, *options)
        assert result.exit_code == 0, result.output
        return tmp_path / "ours"

    return convert


@pytest.fixture
def refuse(tmp_path, vocabulary):
    """Write weights as the authors do and return the command's error message."""

    def refuse(weights, *options):
        torch.save({"model": weights}, tmp_path / "authors.pth")
        message = refusal(tmp_path / "authors.pth", tmp_path / "ours", "--tokenizer", vocabulary, *(options or HEADS))
        assert not (tmp_path / "ours").exists()
        return message

    return refuse


def random_pixels(seed, count):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, IMAGE_SIZE, IMAGE_SIZE), generator=generator, dtype=torch.uint8)


def our_logits(folder, pixels, captions):
    """Logits of the saved checkpoint for captions and pixels, in one padded batch."""
    model, tokenizer = load_checkpoint(folder).model, Tokenizer.load(folder)
    ids = [torch.tensor(tokenizer.encode(caption)) for caption in captions]
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    lengths = torch.tensor([len(each) for each in ids])
    with torch.inference_mode():
        tokens, _ = model.encode_images(pixels)
        return model.score(model.encode_queries(padded, lengths), tokens, lengths)


@pytest.mark.parametrize("adapter", ["compression", "local"])
def test_a_converted_checkpoint_gives_the_authors_logits(adapter, convert):
    authors = AuthorsModel(adapter)
    pixels = random_pixels(0, len(CAPTIONS))

    logits = our_logits(convert(authors.weights()), pixels, CAPTIONS)

    torch.testing.assert_close(logits, authors(pixels, CAPTIONS), atol=1e-4, rtol=0)
    assert logits.std() > 0.05


@pytest.fixture(scope="module")
def converted(tmp_path_factory, authors, vocabulary):
    folder = tmp_path_factory.mktemp("converted")
    torch.save({"model": authors.weights()}, folder / "authors.pth")
    run(folder / "authors.pth", folder / "ours", "--tokenizer", vocabulary, *HEADS)
    return folder / "ours"


@settings(max_examples=15, deadline=None)
@given(
    captions=st.lists(
        st.lists(st.sampled_from(["dog", "Cat", "beach,", "fig", "bead", "xyz"]), max_size=70).map(" ".join),
        min_size=1,
        max_size=5,
    ),
    seed=st.integers(0, 99),
)
def test_any_captions_and_images_give_the_authors_logits(converted, authors, captions, seed):
    pixels = random_pixels(seed, len(captions))

    logits = our_logits(converted, pixels, captions)

    torch.testing.assert_close(logits, authors(pixels, captions), atol=1e-4, rtol=0)


@pytest.mark.skipif(not BERT_UNCASED.is_dir(), reason="BERT's own vocabulary is not here")
@pytest.mark.parametrize("num_words", [0, 7, 61, 62, 300])
def test_text_is_tokenised_as_in_the_authors_pairs(num_words):
    from transformers import BertTokenizerFast

    from edje.vocabulary import wordpiece_tokenizer

    theirs = BertTokenizerFast.from_pretrained(BERT_UNCASED)
    theirs.add_special_tokens({"additional_special_tokens": [IMAGE]})
    ours = Tokenizer(wordpiece_tokenizer(BERT_UNCASED / "vocab.txt").to_str(), VARIANTS["paper-l16"])
    caption = " ".join(["photograph", "greyhounds"][number % 2] for number in range(num_words))

    pair = theirs(caption, IMAGE * 64, truncation="only_first", max_length=128)

    ids = ours.encode(caption)
    assert pair["input_ids"] == [*ids, *[30_522] * 64, 102]
    assert pair["token_type_ids"] == [0] * len(ids) + [1] * 65


def test_the_converted_tower_equals_transformers_tower(converted, authors):
    pixels = random_pixels(1, 2)

    patches, pooled = load_checkpoint(converted).model.run_tower(pixels)

    expected = authors.vision_encoder(pixel_values=(pixels / 255 - 0.5) / 0.5)
    torch.testing.assert_close(patches, expected.last_hidden_state, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(pooled, expected.pooler_output, atol=1e-5, rtol=1e-5)


def test_the_configuration_follows_from_the_weights(converted):
    config = read_config(converted)

    assert config.trained
    assert (config.preprocess.image_size, config.vision.patch_size, config.num_patches) == (32, 8, 16)
    assert (config.vision.dim, config.vision.num_layers, config.vision.hidden_dim) == (32, 2, 48)
    assert (config.adapter.kind, config.adapter.num_tokens, config.adapter.hidden_dim) == ("compression", 6, 56)
    assert (config.joint.dim, config.joint.num_layers, config.joint.hidden_dim) == (24, 3, 40)
    assert (config.joint.vocab_size, config.joint.max_positions) == (len(VOCABULARY) + 1, 96)


@pytest.mark.parametrize("name", PAPERS)
def test_the_papers_models_are_recognised_by_their_shapes(name):
    variant = VARIANTS[name]
    layout = replace(
        layout_of(["vision_projection.0.weight"] if variant.adapter.kind == "local" else []),
        tower_layers=variant.vision.num_layers,
        joint_layers=variant.joint.num_layers,
    )
    ours = build_edje(variant, device="meta").state_dict()
    shapes = {
        theirs: rule.their_shape(tuple(ours[rule.ours].shape)) for rule in layout.rules() for theirs in rule.theirs
    }

    config = config_of(layout, shapes, ImportOptions(sep_id=102))

    assert config == replace(variant, trained=True)


def wrapped(weights):
    return {f"module.{name}": tensor for name, tensor in weights.items()}


def of_transformers_5(weights):
    return {name.replace("vision_encoder.vision_model.", "vision_encoder."): each for name, each in weights.items()}


def of_transformers_4(weights):
    counters = {
        "vision_encoder.vision_model.embeddings.position_ids": torch.arange(16)[None],
        "language_model.bert.embeddings.position_ids": torch.arange(96)[None],
        "language_model.bert.embeddings.token_type_ids": torch.zeros(1, 96, dtype=torch.long),
    }
    return weights | counters


def without_outer_words(weights):
    return {name: tensor for name, tensor in weights.items() if not name.startswith("text_embeddings.")}


def with_all_outer_embeddings(weights):
    inner = "language_model.bert.embeddings."
    copies = {name.replace(inner, "text_embeddings."): each for name, each in weights.items() if name.startswith(inner)}
    return without_outer_words(weights) | copies


def below_model(weights):
    return {f"model.{name}": tensor for name, tensor in weights.items()}


def with_a_teacher(weights):
    return weights | {f"teacher.{name}": tensor for name, tensor in weights.items()}


@pytest.mark.parametrize(
    "spelling",
    [
        wrapped,
        of_transformers_5,
        of_transformers_4,
        without_outer_words,
        with_all_outer_embeddings,
        with_a_teacher,
        below_model,
    ],
)
def test_the_same_weights_in_another_spelling_are_the_same_model(spelling, authors, converted, convert):
    folder = convert(spelling(authors.weights()))

    assert load_checkpoint(folder).digest == load_checkpoint(converted).digest


def test_of_two_different_tables_of_words_the_outer_one_is_read(authors, convert):
    weights = authors.weights()
    weights["language_model.bert.embeddings.word_embeddings.weight"] = torch.zeros(len(VOCABULARY) + 1, 24)

    folder = convert(weights)

    torch.testing.assert_close(
        load_checkpoint(folder).model.joint.words.weight, weights["text_embeddings.weight"], atol=0, rtol=0
    )


def test_half_precision_weights_are_converted_to_float32(authors, convert):
    folder = convert({name: tensor.bfloat16() for name, tensor in authors.weights().items()})

    state = load_checkpoint(folder).model.state_dict()
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}


def test_unneeded_tensors_are_reported(authors, tmp_path, vocabulary):
    torch.save({"model": authors.weights()}, tmp_path / "authors.pth")

    result = run(tmp_path / "authors.pth", tmp_path / "ours", "--tokenizer", vocabulary, *HEADS)

    assert "tensors of the first stage" in result.stderr
    assert "tensors of the masked language model's head" in result.stderr


NEEDED = [
    "vision_encoder.vision_model.embeddings.patch_embedding.weight",
    "vision_encoder.vision_model.encoder.layers.1.self_attn.k_proj.bias",
    "vision_encoder.vision_model.head.probe",
    "vision_projection.query",
    "vision_projection.attention.in_proj_weight",
    "language_model.bert.embeddings.word_embeddings.weight",
    "language_model.bert.encoder.layer.0.intermediate.dense.weight",
    "language_model.bert.encoder.layer.1.attention.self.value.weight",
    "classification_head.0.dense.weight",
    "classification_head.1.bias",
]


CHOSEN = ImportOptions(sep_id=3, tower_heads=TOWER_HEADS, joint_heads=JOINT_HEADS)


@pytest.mark.parametrize("name", NEEDED)
def test_a_missing_tensor_is_named(name, authors):
    weights = authors.weights()
    del weights[name]

    with pytest.raises(AuthorsError, match=f"1 missing: {re.escape(name)}$"):
        import_model(weights, CHOSEN)


@pytest.mark.parametrize("name", NEEDED)
@pytest.mark.parametrize("change", [lambda each: torch.cat((each, each)), lambda each: each[None]])
def test_a_tensor_of_another_shape_is_named(name, change, authors):
    weights = authors.weights()
    weights[name] = change(weights[name])

    with pytest.raises(AuthorsError, match=re.escape(name)):
        import_model(weights, CHOSEN)


def test_all_wrong_tensors_are_named_at_once(authors, refuse):
    weights = authors.weights()
    for name in NEEDED[1:3]:
        del weights[name]
    weights["language_model.bert.encoder.layer.0.extra"] = torch.zeros(1)
    weights["optimizer.step"] = torch.zeros(1)
    weights["vision_projection.key.weight"] = torch.zeros(32, 31)

    message = refuse(weights)

    assert "2 missing" in message
    assert "1 wrongly shaped: vision_projection.key.weight is 32 x 31, expected 32 x 32" in message
    assert "2 unexpected: language_model.bert.encoder.layer.0.extra, optimizer.step" in message
    assert all(name in message for name in NEEDED[1:3])


def test_another_architecture_is_refused_with_a_few_names_and_a_count(refuse):
    message = refuse(
        {"classification_head.0.bias": torch.zeros(1)}
        | {f"layer{number}.conv.weight": torch.zeros(3) for number in range(90)}
    )

    assert "91 unexpected: " in message
    assert "and 51 more" in message


@pytest.mark.parametrize(
    ("names", "remedy"),
    [
        (["vision.norm.weight", "adapter.query", "joint.norm.weight"], "already converted"),
        (["bert.embeddings.word_embeddings.weight"], "`joint.bert` in a recipe"),
        (["text_model.head.weight", "vision_model.head.probe"], 'tower = "hub:FOLDER"'),
        (["layer1.weight"], "give the authors' file"),
    ],
)
def test_the_weights_of_another_kind_of_model_are_refused_with_the_way_to_use_them(names, remedy, refuse):
    message = refuse({name: torch.zeros(1) for name in names})

    assert "has a name of the authors' weights" in message
    assert sorted(names)[0] in message
    assert remedy in message


def test_weights_that_are_not_finite_are_named(authors, refuse):
    weights = {name: tensor.clone() for name, tensor in authors.weights().items()}
    weights["vision_projection.key.bias"][3] = torch.nan

    assert "1 not finite: vision_projection.key.bias" in refuse(weights)


def test_unknown_numbers_of_heads_are_asked_for(authors, refuse):
    assert "--vision-heads" in refuse(authors.weights(), "--joint-heads", JOINT_HEADS)
    assert "--joint-heads" in refuse(authors.weights(), "--vision-heads", TOWER_HEADS)


def test_heads_that_do_not_divide_the_width_are_refused(authors, refuse):
    assert "must be multiples of the numbers of heads" in refuse(
        authors.weights(), "--vision-heads", 5, "--joint-heads", JOINT_HEADS
    )


@pytest.fixture
def tower_json(tmp_path):
    path = tmp_path / "tower.json"
    path.write_text(json.dumps({"vision_config": TOWER | {"patch_size": PATCH_SIZE, "layer_norm_eps": 1e-4}}))
    return path


def test_a_configuration_file_gives_the_heads_that_shapes_do_not_imply(tower_json, authors, convert):
    folder = convert(authors.weights(), "--vision-config", tower_json)

    assert read_config(folder).vision.norm_eps == 1e-4


def test_a_configuration_file_of_another_model_is_refused(tower_json, authors, refuse):
    tower_json.write_text(tower_json.read_text().replace("48", "64"))

    message = refuse(authors.weights(), *HEADS, "--vision-config", tower_json)

    assert "intermediate_size is 64 instead of 48" in message


def test_heads_that_contradict_the_configuration_file_are_refused(tower_json, authors, refuse):
    message = refuse(
        authors.weights(), "--vision-heads", 8, "--joint-heads", JOINT_HEADS, "--vision-config", tower_json
    )

    assert "leave one of them out" in message


def test_a_tokenizer_of_another_model_is_refused(authors, refuse, tmp_path):
    larger = tmp_path / "larger.txt"
    larger.write_text("\n".join([*VOCABULARY, "more"]))

    assert "another model" in refuse(authors.weights(), "--tokenizer", larger, *HEADS)


class Hostile:
    def __reduce__(self):
        return (pytest.fail, ("code in a pickle was run",))


def saved(value, **options):
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a complete file of torch.save"),
        (b"a letter, not weights", "file of torch.save"),
        (b"PK", "file of torch.save"),
        (saved({"model": {"a": torch.zeros(999)}})[:-99], "file of torch.save"),
        (saved({"model": {"a": torch.zeros(999)}})[:999], "file of torch.save"),
        (saved({"model": Hostile()}), "which could run code"),
        (pickle.dumps(Hostile()), "which could run code"),
        (saved({"model": 5}), "give the authors' file"),
        (saved([torch.zeros(1)]), "give the authors' file"),
        (saved({"model": {"a": torch.zeros(1), "b": "text"}}), "not tensors: b"),
        (saved({"model": {}}), "give the authors' file"),
    ],
)
def test_a_file_without_weights_is_refused_with_the_cause(content, message, tmp_path, vocabulary):
    (tmp_path / "some.pth").write_bytes(content)

    assert message in refusal(tmp_path / "some.pth", tmp_path / "ours", "--tokenizer", vocabulary, *HEADS)


def test_a_file_in_torchs_old_format_is_read(authors, converted, tmp_path, vocabulary):
    torch.save({"model": authors.weights()}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)

    result = run(tmp_path / "old.pth", tmp_path / "ours", "--tokenizer", vocabulary, *HEADS)

    assert result.exit_code == 0, result.output
    assert load_checkpoint(tmp_path / "ours").digest == load_checkpoint(converted).digest


def test_an_existing_folder_is_left_unchanged(converted, tmp_path, vocabulary):
    before = sorted(converted.iterdir())

    assert "exists" in refusal(tmp_path / "any.pth", converted, "--tokenizer", vocabulary)
    assert sorted(converted.iterdir()) == before


def test_a_converted_checkpoint_that_was_changed_is_not_loaded(authors, convert):
    folder = convert(authors.weights())
    content = bytearray((folder / WEIGHTS_FILE).read_bytes())
    content[-1] ^= 1
    (folder / WEIGHTS_FILE).write_bytes(content)

    with pytest.raises(CheckpointTampered):
        load_checkpoint(folder)


@pytest.mark.parametrize("source", ["nothing/here.pth", "nothing.pth", "package:no_such_package/model"])
def test_a_missing_source_is_reported(source, tmp_path, vocabulary):
    message = refusal(source, tmp_path / "ours", "--tokenizer", vocabulary)

    assert "does not exist" in message or "not installed" in message


@pytest.mark.parametrize("name", ["authors.safetensors", "authors.pth"])
def test_a_safetensors_file_with_the_authors_names_is_read(name, authors, converted, tmp_path, vocabulary):
    path = tmp_path / name
    tensors = {each: tensor.contiguous().clone() for each, tensor in authors.weights().items()}
    path.write_bytes(safetensors.torch.save(tensors))

    done = run(path, tmp_path / "ours", "--tokenizer", vocabulary, *HEADS)

    assert done.exit_code == 0, done.output
    assert load_checkpoint(tmp_path / "ours").digest == load_checkpoint(converted).digest


def test_a_folder_of_weights_may_hold_one_safetensors_file(authors, tmp_path, vocabulary):
    (tmp_path / "weights").mkdir()
    tensors = {each: tensor.contiguous().clone() for each, tensor in authors.weights().items()}
    (tmp_path / "weights" / "some.safetensors").write_bytes(safetensors.torch.save(tensors))

    done = run(tmp_path / "weights", tmp_path / "ours", "--tokenizer", vocabulary, *HEADS)

    assert done.exit_code == 0, done.output


def test_a_folder_without_weights_is_refused(tmp_path, vocabulary):
    (tmp_path / "weights").mkdir()

    message = refusal(tmp_path / "weights", tmp_path / "ours", "--tokenizer", vocabulary)

    assert "holds no file *.pth or *.safetensors" in message


@pytest.mark.parametrize("content", [b"", b"a letter", bytes(8) + b"{}"])
def test_a_broken_safetensors_file_is_refused_with_the_cause(content, tmp_path, vocabulary):
    (tmp_path / "some.safetensors").write_bytes(content)

    message = refusal(tmp_path / "some.safetensors", tmp_path / "ours", "--tokenizer", vocabulary, *HEADS)

    assert "is not a complete safetensors file" in message
    assert "download or copy it again" in message


def test_a_folder_with_two_files_of_weights_is_refused_with_their_names(tmp_path, vocabulary):
    for name in ("one.pth", "two.pth"):
        (tmp_path / name).touch()

    assert "one.pth, two.pth" in refusal(tmp_path, tmp_path / "ours", "--tokenizer", vocabulary)


REVISION = "a" * 40


class Hub(http.server.BaseHTTPRequestHandler):
    """A server with the part of the hub's interface that downloads one repository."""

    files: dict[str, bytes]

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.partition("?")[0]
        content = self.files.get(path.rpartition("/")[2])
        if path.startswith("/api/models/owner/name/revision/"):
            self.answer(json.dumps(self.model()).encode())
        elif path.startswith("/api/models/owner/name/tree/"):
            entries = [{"type": "file", "path": each, "size": 1, "oid": "b" * 40} for each in self.files]
            self.answer(json.dumps(entries).encode())
        elif path.startswith("/owner/name/resolve/") and content is not None:
            self.answer(content)
        else:
            self.send_error(404)

    def model(self):
        return {"id": "owner/name", "sha": REVISION, "siblings": [{"rfilename": name} for name in self.files]}

    def answer(self, content):
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", '"' + "c" * 40 + '"')
        self.send_header("X-Repo-Commit", REVISION)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_repository_on_the_hub_becomes_a_folder_with_the_files_asked_for(hub, tmp_path):
    Hub.files = {"model.pth": b"weights", "README.md": b"words", "vocab.txt": b"[PAD]"}

    folder = hub_folder("owner/name", ["*.pth"], endpoint=hub, cache=tmp_path)

    assert [path.name for path in folder.iterdir()] == ["model.pth"]
    assert (folder / "model.pth").read_bytes() == b"weights"


@pytest.mark.parametrize("repository", ["owner/other", "no name at all"])
def test_a_missing_repository_is_reported(repository, hub, tmp_path):
    with pytest.raises(SourceError, match="cannot be fetched"):
        hub_folder(repository, ["*.pth"], endpoint=hub, cache=tmp_path)


def test_an_unreachable_hub_is_reported(tmp_path):
    with pytest.raises(SourceError, match="download the file"):
        hub_folder("owner/name", ["*.pth"], endpoint="http://127.0.0.1:9", cache=tmp_path)


def test_without_a_network_the_tokenizer_is_asked_for(monkeypatch, tmp_path):
    monkeypatch.setattr("edje.imports.sources.hub_folder", Mock(side_effect=SourceError("no network")))

    assert "--tokenizer" in refusal(tmp_path / "some.pth", tmp_path / "ours")


@pytest.mark.parametrize("source", ["hub:owner/name", "owner/name"])
def test_a_bare_name_means_the_hub_where_no_such_path_exists(source, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("edje.imports.sources.hub_folder", lambda repository, _: Path("fetched") / repository)

    assert find_source(source, ["*.pth"]) == Path("fetched/owner/name")
