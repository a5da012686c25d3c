"""Computes a tile N times, so that tools/bench.py can count what that takes: ENGINE MODEL SIDE N."""

from __future__ import annotations

import sys

from kdunet_infer.engines import create_engine
from kdunet_infer.model import Model
from kdunet_infer.speed import core_run, mirrored
from kdunet_infer.testing import noise

if __name__ == "__main__":
    engine, name, side, n_tiles = sys.argv[1:]
    model = Model.load(name)
    y, x = model.card.halo_zyx[1:]
    run, n_at_once = core_run(
        create_engine(engine, model, n_threads=1), mirrored(noise((1, int(side), int(side))), (y, x)), (y, x)
    )
    for _ in range(int(n_tiles) // n_at_once):
        run()
