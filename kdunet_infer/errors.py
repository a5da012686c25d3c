"""What can go wrong, as a tree. Every message says what is wrong, with which value, where, and what to do.

KdunetError
├── GeometryError      a box, shape or region of interest that cannot be (ValueError)
├── VolumeError        a path that is no volume, or one that cannot be used as asked
│   ├── VolumeNotFound     nothing at that path (FileNotFoundError)
│   ├── CorruptChunk       a chunk that cannot be read or decoded
│   └── TargetExists       an output that is already there (FileExistsError)
├── ModelError         a file that is no usable model
│   ├── ModelNotFound      no released model of that name and no file at that path (FileNotFoundError)
│   └── ModelCardError     a card with a missing, unknown or impossible field (ValueError)
├── EngineError        an engine that cannot run the model, or failed while running it
│   ├── EngineUnavailable  a runtime or device that is not here (ImportError)
│   ├── UnsupportedModel   a network that this engine does not compute
│   └── EngineInputError   tiles an engine cannot take (ValueError)
├── ConfigError        a training configuration that cannot be (ValueError)
└── TrainingError      a training run that cannot start or go on
"""

from __future__ import annotations


class KdunetError(Exception):
    """Base of every error that a user can cause; its text is one sentence fit to print."""

    def __str__(self) -> str:
        """The sentence on one line; what is quoted in it, such as a path or a field of a file, may hold any character."""
        return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in super().__str__())


class GeometryError(KdunetError, ValueError):
    """A box, shape or region of interest that cannot be."""


class VolumeError(KdunetError):
    """A path that is no volume, or a volume that cannot be used as asked."""


class VolumeNotFound(VolumeError, FileNotFoundError):
    """Nothing at the given path."""


class CorruptChunk(VolumeError):
    """A chunk that exists and cannot be read or decoded; the message names it by its index."""


class TargetExists(VolumeError, FileExistsError):
    """An output that is already there; overwriting needs an explicit word."""


class ModelError(KdunetError):
    """A file that is no usable model."""


class ModelNotFound(ModelError, FileNotFoundError):
    """No released model of that name and no file at that path."""


class ModelCardError(ModelError, ValueError):
    """A model card with a missing, unknown or impossible field."""


class EngineError(KdunetError):
    """An engine that cannot run the model, or failed while running it."""


class EngineUnavailable(EngineError, ImportError):
    """A runtime or device that is not on this machine; the message says how to install it."""


class UnsupportedModel(EngineError):
    """A network that this engine does not compute; the message names one that does."""


class EngineInputError(EngineError, ValueError):
    """Tiles that an engine cannot take: wrong dtype, rank, or size off the network's stride."""


class ConfigError(KdunetError, ValueError):
    """A training configuration that cannot be."""


class TrainingError(KdunetError):
    """A training run that cannot start or go on."""
