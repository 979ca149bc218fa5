"""Run ReMax and its pipeline: ``python cli.py fit --config configs/remax.yaml``."""

from remax_lightning.cli import main

if __name__ == "__main__":
    main()
