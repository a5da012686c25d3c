"""The defaults of fine-tuning. Knows no torch, so that `--help` need not wait for it."""

from __future__ import annotations

from kdunet.config import OptimConfig, RunConfig

FINETUNE = RunConfig(
    validate_every=50,
    on_collapse="ignore",  # what is kept is the best on the held-out voxels, and the start is among it
    optim=OptimConfig(steps=500, learning_rate=3e-3, ema_decay=0.98, freeze_batch_norm=False),
)
"""What `kdunet finetune` does unless it is told otherwise; data, width and start come from what it is given.

Measured with mito-epfl-2unet on VNC slices 10 to 13, where it has an IoU of 0.31 before; one run each of 300 steps with 1, 3
and 8 annotated slices. Batches normalised by their own statistics: 0.778, 0.808, 0.799; by those of the start, frozen: 0.751,
0.761, 0.759; without any normalisation, 3 slices: 0.771. Learning rates with 3 slices: 1e-3 0.789, 3e-3 0.808, 1e-2 0.810 (and
of 1 slice 0.778 and 0.776 for the last two); 500 steps at 1e-2: 0.816. The average forgets within 50 steps, a tenth of the run.
"""
