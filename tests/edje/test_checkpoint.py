"""Checkpoint folders: complete, or refused with the cause."""

import json
import shutil
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from typer.testing import CliRunner

from edje import checkpoint as files
from edje.checkpoint import (
    CheckpointError,
    CheckpointExists,
    CheckpointIncomplete,
    CheckpointMismatch,
    CheckpointMissing,
    CheckpointTampered,
    read_config,
    read_digest,
)
from edje.init import main, write_untrained
from edje.model.edje import build_edje
from edje.model.variants import VARIANTS
from edje.model.weights import load_checkpoint, save_checkpoint
from edje.vocabulary import character_tokenizer

TINY = VARIANTS["tiny"]


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    write_untrained(TINY, folder, seed=1)
    return folder


@pytest.fixture
def folder(original, tmp_path):
    return Path(shutil.copytree(original, tmp_path / "tiny"))


def test_a_saved_checkpoint_is_loaded_unchanged(original, tmp_path):
    loaded = load_checkpoint(original)

    again = save_checkpoint(
        tmp_path / "again", loaded.config, loaded.model, (original / files.TOKENIZER_FILE).read_text()
    )

    assert again == loaded.digest == read_digest(original)
    assert load_checkpoint(tmp_path / "again").config == loaded.config == read_config(original)


def test_the_same_seed_gives_the_same_digest_and_another_seed_another(original, tmp_path):
    same = write_untrained(TINY, tmp_path / "same", seed=1)
    other = write_untrained(TINY, tmp_path / "other", seed=2)

    assert same == read_digest(original)
    assert other != same


def test_the_configuration_marks_untrained_weights(original):
    assert read_config(original).trained is False


def test_a_digest_is_sixteen_hexadecimal_digits(original):
    assert len(read_digest(original)) == 16
    int(read_digest(original), 16)


def test_the_digest_depends_on_content_and_not_on_file_layout(folder):
    digest = read_digest(folder)
    path = folder / files.WEIGHTS_FILE
    tensors = safetensors.torch.load_file(path)
    safetensors.torch.save_file(dict(reversed(tensors.items())), path, metadata={"written_by": "somebody else"})
    tokenizer = folder / files.TOKENIZER_FILE
    tokenizer.write_text(json.dumps(json.loads(tokenizer.read_text()), indent=4))

    assert read_digest(folder) == digest


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_a_changed_weight_is_detected(folder):
    flip_a_bit(folder / files.WEIGHTS_FILE)

    with pytest.raises(CheckpointTampered, match="copy the whole folder again"):
        load_checkpoint(folder)


def test_a_changed_tokenizer_is_detected(folder):
    path = folder / files.TOKENIZER_FILE
    path.write_text(path.read_text().replace('"a"', '"A"', 1))

    with pytest.raises(CheckpointTampered):
        read_digest(folder)


def test_a_changed_configuration_is_detected(folder):
    path = folder / files.CONFIG_FILE
    path.write_text(path.read_text().replace('"trained": false', '"trained": true'))

    with pytest.raises(CheckpointTampered):
        read_digest(folder)


@pytest.mark.parametrize("num_bytes", [0, 5, 8, 100, -1])
def test_a_cut_off_file_of_weights_is_incomplete(folder, num_bytes):
    path = folder / files.WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:num_bytes])

    with pytest.raises(CheckpointIncomplete, match="safetensors"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    "header", [b"[]", b'{"x": 1}', b"{", b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[-4,0]}}']
)
def test_a_hostile_header_is_refused(folder, header):
    (folder / files.WEIGHTS_FILE).write_bytes(struct.pack("<Q", len(header)) + header)

    with pytest.raises(CheckpointIncomplete):
        load_checkpoint(folder)


def test_a_header_that_announces_gigabytes_is_not_read(folder):
    (folder / files.WEIGHTS_FILE).write_bytes(struct.pack("<Q", 1 << 40) + b"{}")

    with pytest.raises(CheckpointIncomplete, match="is not a safetensors file"):
        read_digest(folder)


@pytest.mark.parametrize("name", [files.WEIGHTS_FILE, files.TOKENIZER_FILE])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()

    with pytest.raises(CheckpointIncomplete, match=name):
        load_checkpoint(folder)


def test_a_folder_without_a_checkpoint_is_reported_with_a_remedy(tmp_path):
    with pytest.raises(CheckpointMissing, match=r"edje\.init"):
        read_digest(tmp_path)


def test_half_a_configuration_is_incomplete(folder):
    path = folder / files.CONFIG_FILE
    path.write_text(path.read_text()[:100])

    with pytest.raises(CheckpointIncomplete, match="cut off or damaged"):
        read_config(folder)


def rewrite(folder: Path, **changes: object) -> None:
    path = folder / files.CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("version", [files.FORMAT_VERSION - 1, files.FORMAT_VERSION + 1])
def test_an_earlier_or_later_format_is_refused_by_its_number_and_not_as_tampered(folder, version):
    rewrite(folder, format_version=version)

    with pytest.raises(CheckpointMismatch, match=f"format {version}"):
        read_digest(folder)


def test_an_unknown_setting_is_refused_by_name(folder):
    config = json.loads((folder / files.CONFIG_FILE).read_text())["config"]
    rewrite(folder, config=config | {"rotary": True})

    with pytest.raises(CheckpointMismatch, match="rotary"):
        read_config(folder)


def test_weights_of_another_architecture_are_refused_by_the_first_difference(tmp_path):
    wide = replace(TINY, joint=replace(TINY.joint, hidden_dim=256))
    save_checkpoint(tmp_path / "model", TINY, build_edje(wide), character_tokenizer().to_str())

    with pytest.raises(CheckpointMismatch, match=r"joint\.layers\.0\.mlp\.fc1\.bias is \(256,\), expected \(128,\)"):
        load_checkpoint(tmp_path / "model")


def test_an_existing_checkpoint_is_never_overwritten(original):
    with pytest.raises(CheckpointExists, match="remove it"):
        write_untrained(TINY, original, seed=0)


def test_a_save_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    def disk_full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("edje.files.sync", disk_full)

    with pytest.raises(OSError, match="no space"):
        write_untrained(TINY, tmp_path / "model", seed=0)
    assert list(tmp_path.iterdir()) == []


def test_loaded_weights_are_frozen_and_in_evaluation_mode(original):
    model = load_checkpoint(original).model

    assert not model.training
    assert not any(parameter.requires_grad or parameter.device.type != "cpu" for parameter in model.parameters())
    assert model.pixel_scale.device == torch.device("cpu")


def test_reading_a_digest_does_not_import_torch(original):
    script = f"""
import sys, pathlib
from edje.checkpoint import read_config, read_digest
folder = pathlib.Path({str(original)!r})
read_config(folder), read_digest(folder)
sys.exit('torch' in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", script], check=False, cwd=Path(__file__).parents[2]).returncode == 0


@pytest.fixture
def command():
    import typer

    app = typer.Typer()
    app.command()(main)
    return lambda *arguments: CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})


def test_the_command_reports_an_untrained_checkpoint(command, tmp_path):
    result = command("tiny", str(tmp_path / "model"), "--seed", "3")

    assert result.exit_code == 0
    assert "UNTRAINED" in result.output
    assert read_digest(tmp_path / "model") in result.output


def test_the_command_lists_the_known_variants(command, tmp_path):
    result = command("huge", str(tmp_path / "model"))

    assert result.exit_code != 0
    assert "paper-l16" in result.output


def test_all_checkpoint_errors_share_a_base_class():
    for error in (CheckpointExists, CheckpointIncomplete, CheckpointMismatch, CheckpointMissing, CheckpointTampered):
        assert issubclass(error, CheckpointError)
