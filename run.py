"""Run SaM: one job, or a sweep with -m. `python run.py --help` lists what can be chosen."""

import sys

import hydra
from omegaconf import DictConfig

from sam import launch

launch.register_resolvers()


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> float:
    """One job; returns its main number (mean F1, or held-out F1 of a trained expert)."""
    return launch.job(cfg)


if __name__ == "__main__":
    launch.check_choices(sys.argv[1:])
    main()
    sys.exit(launch.finish())
