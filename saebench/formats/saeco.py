"""saeco (sae_components): <stem>.arch_ref beside torch pickles under a .safetensors name. Refused.

The .arch_ref names a class and its configuration. What the SAE computes is that class's code, and
the state dict holds the tensors of every module that it is built of, under the names that this code
gives them, with a normaliser whose kind is in the configuration: from the file alone no forward
pass is certain. So it is recognised, and refused with the way out.
"""

from __future__ import annotations

from saebench.errors import WeightsError
from saebench.formats.content import Content
from saebench.formats.facts import Facts
from saebench.saes import Sae

NAME = "saeco"
_SUFFIX = ".arch_ref"


def recognise(content: Content) -> bool:
    """By the .arch_ref of its name beside it."""
    return any(name.endswith(_SUFFIX) for name in content.beside)


def read(content: Content, facts: Facts) -> Sae:
    """Errors: WeightsError, always."""
    facts.settle()
    name = next(name for name in content.beside if name.endswith(_SUFFIX))
    raise WeightsError(
        f"{name} beside it says that it is a checkpoint of saeco: what it computes is in the code "
        "of its class, not in the file",
        "where saeco runs, write its encoder, biases and decoder with saebench.formats.write_sae",
    )
