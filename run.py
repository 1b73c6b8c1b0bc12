"""Run SaM: one job, or a sweep with -m. `python run.py --help` lists what can be chosen."""

import sys

import hydra
from omegaconf import DictConfig

from sam import extend, launch, overrides
from sam.errors import SamError

launch.register_resolvers()


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> float:
    """One job; returns its main number (mean F1, or held-out F1 of a trained expert)."""
    return launch.job(cfg)


if __name__ == "__main__":
    sys.argv[1:] = launch.arranged(sys.argv[1:])
    extend.importable(sys.argv[1:])
    try:
        overrides.check_overrides(sys.argv[1:])
    except SamError as error:
        launch.fail(str(error))
    main()
    while launch.left_over():
        main()
    sys.exit(launch.finish())
