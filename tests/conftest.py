"""Fixtures that several test files share."""

from __future__ import annotations

import pytest
from hypothesis import settings
from small_models import small_model

from kdunet_infer.model import Model

settings.register_profile("busy-machine", deadline=None)  # a slow example on a shared machine is no failure
settings.load_profile("busy-machine")


@pytest.fixture(scope="session")
def model() -> Model:
    """A U-Net of two levels: stride 2, halo 10."""
    return small_model(levels=2)
