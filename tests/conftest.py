"""What most tests stand on: a tiny random Llama, pools of random experts, real small models, a cache of their own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from sam.errors import SamError
from sam.experts.card import Pool
from sam.models.base import Base, load
from sam.models.encoder import Encoder, EncoderSpec
from sam.models.sources import MANIFEST
from sam.models.spec import BaseSpec
from sam.paths import cache_dir
from tests.tiny import DOMAINS, HashEncoder, config, write_base, write_pool

USER_CACHE = cache_dir()  # before the tests' own takes its place


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """``SAM_CACHE`` for all tests: nothing is read from, or kept in, the user's own; W&B stays silent and offline."""
    path = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAM_CACHE", str(path))
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        patch.setenv("WANDB_DIR", str(path))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("TOKENIZERS_PARALLELISM", "false")
        yield path


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Gives torch a number of threads for a test; with two, more prompts than a batch are decoded in two lanes."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def one_thread(threads: Callable[[int], None]) -> None:
    threads(1)


@pytest.fixture
def two_threads(threads: Callable[[int], None]) -> None:
    threads(2)


@pytest.fixture(scope="session")
def real_cache(own_cache: Path) -> Path:
    """The tests' cache with the models in it that the user's cache holds converted, so that none is converted again."""
    for folder in (USER_CACHE / "models").glob("*/"):
        link = own_cache / "models" / folder.name
        if (folder / MANIFEST).is_file() and not link.exists():
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(folder, target_is_directory=True)
    return own_cache


@pytest.fixture(scope="session")
def smollm_spec(real_cache: Path) -> BaseSpec:
    """SmolLM2-135M from its wheel, bare."""
    return BaseSpec.from_config({**config("base", "smollm2_135m"), "fold": None})


@pytest.fixture(scope="session")
def smollm(smollm_spec: BaseSpec) -> Base:
    """SmolLM2-135M, loaded; skipped without its wheel. Not to be changed."""
    try:
        return load(smollm_spec, "cpu")
    except SamError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def minilm_spec() -> EncoderSpec:
    """all-MiniLM-L6-v2 from its wheel."""
    return EncoderSpec.from_config(config("encoder", "minilm"))


@pytest.fixture(scope="session")
def minilm(minilm_spec: EncoderSpec) -> Encoder:
    """all-MiniLM-L6-v2, loaded; skipped without its wheel."""
    encoder = Encoder(minilm_spec)
    try:
        encoder.embed(["warm"])
    except SamError as error:
        pytest.skip(str(error))
    return encoder


@pytest.fixture
def hash_encoder() -> HashEncoder:
    return HashEncoder()


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the tiny base model. Not to be changed: copy it."""
    return write_base(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_spec(tiny_base: Path) -> BaseSpec:
    return BaseSpec("tiny", "local", location=str(tiny_base))


@pytest.fixture(scope="session")
def tiny_loaded(tiny_spec: BaseSpec) -> Base:
    """The tiny base model as loaded; use ``tiny``."""
    return load(tiny_spec, "cpu")


@pytest.fixture
def tiny(tiny_loaded: Base) -> Iterator[Base]:
    """The tiny base model, loaded; a test that leaves it changed fails."""
    before = copy.deepcopy(tiny_loaded.model.state_dict())
    yield tiny_loaded
    after = tiny_loaded.model.state_dict()
    changed = [n for n in before if n not in after or not torch.equal(before[n], after[n])]
    if changed or len(after) != len(before) or tiny_loaded.model.training:
        tiny_loaded.model.load_state_dict(before)
        pytest.fail(f"the test left the base model changed: {changed or 'other modules, or in train mode'}")


MakePool = Callable[..., Pool]


@pytest.fixture
def tiny_pool(tiny: Base) -> MakePool:
    """``tiny_pool(folder, n=6, unified=True)``: random experts of the tiny base model, ranks 4 and 8 in turn."""

    def make(folder: Path, n: int = len(DOMAINS), unified: bool = True) -> Pool:
        return write_pool(folder, tiny, n, unified)

    return make


@pytest.fixture(scope="session")
def shared_pool(tiny_loaded: Base, tmp_path_factory: pytest.TempPathFactory) -> Pool:
    """Four experts of the tiny base model and a unified one. Not to be changed: copy the folder."""
    return write_pool(tmp_path_factory.mktemp("pool"), tiny_loaded, 4, unified=True)
