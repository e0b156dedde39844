"""Training: data, losses, the loop, checkpoints.

fitted = fit(model, text_data(context=64, batch_size=12), steps=2000)
"""

from .callbacks import tensorboard
from .checkpoints import best, latest, metadata, restore, save
from .cost import operations
from .data import Images, Text, image_data, text_data
from .depths import Elastic
from .devices import FullySharded
from .loop import Data, Fitted, fit
from .losses import (
    AbstractLoss,
    ExitLoss,
    FlowLoss,
    Valued,
    accuracy,
    chunked_cross_entropy,
    cross_entropy,
    evaluate,
    squared_error,
)
from .optimisers import adamw, matrices
from .processes import is_first, join
from .runs import export, load, tokenizer
from .step import TrainingError
from .tokenizers import BPE, Bytes, Chars, TokenizerFile, tokenizer_from_dict

__all__ = [
    "BPE",
    "AbstractLoss",
    "Bytes",
    "Chars",
    "Data",
    "Elastic",
    "ExitLoss",
    "Fitted",
    "FlowLoss",
    "FullySharded",
    "Images",
    "Text",
    "TokenizerFile",
    "TrainingError",
    "Valued",
    "accuracy",
    "adamw",
    "best",
    "chunked_cross_entropy",
    "cross_entropy",
    "evaluate",
    "export",
    "fit",
    "image_data",
    "is_first",
    "join",
    "latest",
    "load",
    "matrices",
    "metadata",
    "operations",
    "restore",
    "save",
    "squared_error",
    "tensorboard",
    "text_data",
    "tokenizer",
    "tokenizer_from_dict",
]


def __dir__() -> list[str]:
    return __all__
