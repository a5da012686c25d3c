"""The k-Unet: five levels of width k, 2k, 4k, 8k, 16k.

The variant is fixed by the two published parameter counts (64-Unet 31,042,434; 2-Unet 30,902): biased 3x3 convolutions, each
followed by batch normalisation, on both paths; 2x2 transposed convolutions with bias; two output classes. Ronneberger et al.
2015, arXiv:1505.04597, with "same" padding; batch normalisation as in Mangalam & Salzmann 2018, arXiv:1812.00249.

No layer's statistics depend on the tile (no InstanceNorm, no global pooling): that is what makes tiled inference exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from kdunet import planar
from kdunet_infer.errors import ConfigError

N_LEVELS = 5
N_CLASSES = 2


class DoubleConv(nn.Sequential):
    """(3x3 convolution with bias, batch normalisation, ReLU) twice: (n, n_in, y, x) -> (n, n_out, y, x)."""

    uses_planar = False
    """Whether narrow layers are computed by `kdunet.planar`."""

    def __init__(self, n_in: int, n_out: int, *, batch_norm: bool = True) -> None:
        super().__init__(
            nn.Conv2d(n_in, n_out, 3, padding=1),
            nn.BatchNorm2d(n_out) if batch_norm else nn.Identity(),
            nn.ReLU(inplace=True),
            nn.Conv2d(n_out, n_out, 3, padding=1),
            nn.BatchNorm2d(n_out) if batch_norm else nn.Identity(),
            nn.ReLU(inplace=True),
        )

    def forward(self, features: Tensor) -> Tensor:
        """The six layers, or where `uses_planar` is set each narrow three as one."""
        if not self.uses_planar:
            return cast(Tensor, super().forward(features))  # type: ignore[no-untyped-call]
        for convolution, normalisation, relu in ((self[0], self[1], self[2]), (self[3], self[4], self[5])):
            assert isinstance(convolution, nn.Conv2d)
            if planar.suits(convolution):
                batch_norm = normalisation if isinstance(normalisation, nn.BatchNorm2d) else None
                features = planar.conv_norm_relu(features, convolution, batch_norm)
            else:
                features = relu(normalisation(convolution(features)))
        return features


class UNet(nn.Module):
    """Images (n, 1, y, x) on their uint8 scale -> logits (n, 2, y, x); y and x multiples of `stride`.

    The network subtracts and divides by its own intensity constants, so that teacher and student can share a crop.

    `batch_norm` is "both", "decoder" or "none": the published counts need it on both paths, the EPFL report's text says the
    expansive path, its first experiments have none. `init` is "he-normal" or "torch", PyTorch's own.
    """

    mean: Tensor
    std: Tensor
    uses_planar = False
    """Whether narrow layers are computed by `kdunet.planar`."""

    def __init__(
        self,
        width: int,
        *,
        n_levels: int = N_LEVELS,
        intensity: tuple[float, float] = (0.0, 1.0),
        batch_norm: str = "both",
        init: str = "he-normal",
    ) -> None:
        super().__init__()
        if width < 1:
            raise ConfigError(f"width is {width}; a k-Unet needs a width of at least 1, such as --width 2.")
        self.width, self.n_levels, self.batch_norm = width, n_levels, batch_norm
        widths = [width * 2**level for level in range(n_levels)]
        down, up = batch_norm == "both", batch_norm != "none"
        self.encoder = nn.ModuleList(DoubleConv(a, b, batch_norm=down) for a, b in zip([1, *widths], widths, strict=False))
        self.pool = nn.MaxPool2d(2)
        self.up = nn.ModuleList(nn.ConvTranspose2d(2 * w, w, 2, stride=2) for w in reversed(widths[:-1]))
        self.decoder = nn.ModuleList(DoubleConv(2 * w, w, batch_norm=up) for w in reversed(widths[:-1]))
        self.head = nn.Conv2d(width, N_CLASSES, 1)
        self.register_buffer("mean", torch.tensor(float(intensity[0])))
        self.register_buffer("std", torch.tensor(float(intensity[1])))
        if init == "he-normal":
            self.apply(_he_normal)

    @property
    def architecture(self) -> dict[str, Any]:
        """What `UNet.of` needs to build this network again, as JSON."""
        return {"kind": "unet", "width": self.width, "levels": self.n_levels, "batch_norm": self.batch_norm}

    @classmethod
    def of(cls, architecture: Mapping[str, Any]) -> UNet:
        """A network of that architecture, its weights yet to be loaded; KeyError where a part is missing."""
        batch_norm = architecture.get("batch_norm", "both")  # the first files did not say
        return cls(architecture["width"], n_levels=architecture["levels"], batch_norm=batch_norm)

    @property
    def stride(self) -> int:
        """The grid of the network, in pixels: 2 to the number of poolings."""
        return 1 << (self.n_levels - 1)

    def forward(self, image: Tensor) -> Tensor:
        """Images (n, 1, y, x) float, 0 to 255 -> logits (n, 2, y, x)."""
        features = (image - self.mean) / self.std  # (n, 1, y, x)
        skips = []
        for level, block in enumerate(self.encoder):
            features = block(self._pooled(features) if level else features)  # (n, k 2^level, y / 2^level, x / 2^level)
            skips.append(features)
        skips.pop()  # the bottleneck is not skipped to
        for up, block in zip(self.up, self.decoder, strict=True):
            features = block(torch.cat([skips.pop(), self._upsampled(features, up)], dim=1))
        logits: Tensor = planar.mix(features, self.head) if self._is_narrow(features) else self.head(features)
        return logits  # (n, 2, y, x)

    def accelerated(self) -> UNet:
        """This network, its narrow layers from now on by `kdunet.planar` where that can run; the same up to rounding."""
        if planar.available():
            for module in self.modules():
                if isinstance(module, UNet | DoubleConv):
                    module.uses_planar = True
        return self

    def _pooled(self, features: Tensor) -> Tensor:
        pooled: Tensor = planar.max_pool(features) if self._is_narrow(features) else self.pool(features)
        return pooled

    def _upsampled(self, features: Tensor, up: nn.Module) -> Tensor:
        assert isinstance(up, nn.ConvTranspose2d)
        return planar.up(features, up) if self._is_narrow(features) else up(features)

    def _is_narrow(self, features: Tensor) -> bool:
        return self.uses_planar and features.shape[1] <= planar.MAX_CHANNELS


def n_parameters(network: nn.Module) -> int:
    """Trained parameters: weights and biases, BN scale and shift; no running statistics."""
    return sum(parameter.numel() for parameter in network.parameters())


def receptive_field_radius(n_levels: int = N_LEVELS) -> int:
    """Pixels that the outputs of a core on the stride grid can feel beyond the core's edge: 94 for five levels.

    Followed backward through the deepest path as an interval: a DoubleConv widens it by 2, a transposed convolution halves
    its ends, a pooling doubles them. Skips reach less. A core off the grid reaches further, so tiles keep to it.
    """
    stride = 1 << (n_levels - 1)
    reaches = [_reach(pixel, n_levels) for pixel in range(stride)]
    return max(max(-begin, end - (stride - 1)) for begin, end in reaches)


def halo(n_levels: int = N_LEVELS) -> int:
    """The context a core needs on each side, in pixels: the receptive-field radius rounded up to the stride."""
    stride = 1 << (n_levels - 1)
    return -(-receptive_field_radius(n_levels) // stride) * stride


def _reach(pixel: int, n_levels: int) -> tuple[int, int]:
    begin, end = pixel - 2, pixel + 2  # d0's two convolutions
    for _ in range(n_levels - 1):  # up the decoder, backward: deeper levels
        begin, end = begin // 2 - 2, end // 2 + 2
    for _ in range(n_levels - 1):  # down the encoder, backward: shallower levels
        begin, end = 2 * begin - 2, 2 * end + 1 + 2
    return begin, end


def _he_normal(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
