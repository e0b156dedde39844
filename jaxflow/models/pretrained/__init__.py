"""Published transformers as flows, from a folder on this machine.

x <- x + F_l[mu](x)   is Euler's step of length 1 along the layers x' = F_{l(t)}[mu](x)

gpt2             LanguageModel, layers in time                           gpt2.py
llama and kin    LanguageModel, layers in time                           llama.py
bert, albert     Encoder, layers in time; ALBERT's block is constant     encoders.py
files.py, schema.py   what is read is not trusted
sources.py       which tensor of a file is which parameter
"""

from pathlib import Path
from typing import Any

from ..._rules import floating
from ..base import AbstractModel
from . import encoders, gpt2, llama
from .files import Folder
from .schema import choice
from .sources import Plan, fill

FAMILIES = {
    "gpt2": gpt2.plan,
    "llama": llama.plan,
    "mistral": llama.plan,
    "qwen2": llama.plan,
    "bert": encoders.bert,
    "albert": encoders.albert,
}

__all__ = ["FAMILIES", "from_pretrained"]


def from_pretrained(folder: str | Path, *, dtype: Any = None) -> AbstractModel:
    """A published transformer as a flow: GPT-2, Llama and its kin, BERT and ALBERT.

    Euler's method with one step a layer gives what the transformers library computes; `with_depth`
    and `with_curve` change the depth and the curve as of any model.

    **Arguments:**

    - `folder`: holds config.json, whose "model_type" is one of gpt2, llama, mistral, qwen2, bert
      and albert, and model.safetensors, or model.safetensors.index.json and the files it names, as
      `save_pretrained` of the transformers library writes them. Nothing is downloaded.
    - `dtype`: of the parameters, such as bfloat16; `None` is that of the file. They are read in it,
      without a copy of all of them in another. Of 16 bits, attention and feed-forward compute in
      it; the state and norms are float32.

    The text of a model goes through its tokenizer:

    ```python
    model = jaxflow.models.from_pretrained("gpt2")
    words = jaxflow.training.TokenizerFile.read("gpt2/tokenizer.json")
    text = model.generate(words.encode("Depth is"), 20, key=jax.random.key(0))
    print(words.decode(text))
    ```

    The folder is not trusted: nothing but JSON and safetensors is read, no file outside of it, and
    names, shapes and dtypes of all tensors are checked before the first is read.

    **Returns:** a `jaxflow.models.LanguageModel`, or of BERT and ALBERT a
    `jaxflow.models.Encoder`.

    **Raises:** `ValueError` for a folder that holds no such model, naming what is wrong; a
    `TypeError` where `dtype` is none; `MemoryError` where the parameters do not fit; `ImportError`
    without the safetensors library.
    """
    opened = Folder(folder)
    config = opened.config()
    made: Plan = FAMILIES[choice(config, "model_type", FAMILIES)](config)
    return fill(made, opened, floating("dtype", dtype))


def __dir__() -> list[str]:
    return __all__
