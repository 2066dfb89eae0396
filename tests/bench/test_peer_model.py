"""The converted model: made once, never half."""

import pytest

from bench import peer_model


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setattr(peer_model.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr("engine.weights.find_model", lambda name: tmp_path / f"{name}.gguf")
    return tmp_path / "smollm2.gguf"


def test_it_is_converted_once(source, tmp_path):
    made = []

    def convert(given, target):
        made.append(given)
        target.mkdir()
        (target / "config.json").write_text("{}")

    for _ in range(2):
        assert peer_model.converted("bfloat16", convert) == tmp_path / "smollm2-bfloat16"
    assert made == [source] and [p.name for p in tmp_path.iterdir()] == ["smollm2-bfloat16"]


def test_an_interrupted_conversion_is_not_taken_for_the_model(source, tmp_path):
    def fail(given, target):
        target.write_text("half")
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        peer_model.converted("float16.gguf", fail)
    assert peer_model.converted("float16.gguf", lambda given, target: target.write_text("whole") and None).read_text() == "whole"


def test_a_missing_package_reads_as_an_engine_that_is_not_installed(monkeypatch):
    def missing(name):
        raise FileNotFoundError(f"model {name!r} comes in a package")

    monkeypatch.setattr("engine.weights.find_model", missing)
    with pytest.raises(ImportError, match="'smollm2' comes in a package"):
        peer_model.converted("x", lambda source, target: None)
