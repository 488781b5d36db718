"""Names of adapters' parameters: the same whatever an adapter is called.

PEFT puts the name that an adapter has in a program into the names of its parameters
(``to_q.lora_A.default.weight``), and a file of its weights does not hold it: an adapter that was
called ``default`` in training may be called ``default_0`` when it is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

# a part of an adapted layer, as PEFT calls it, followed by the adapter's name
_ADAPTER = re.compile(
    r"(?<=\.)(?P<part>lora_(?:A|B|embedding_A|embedding_B|magnitude_vector)|lora_bias|"
    r"hada_\w+|lokr_\w+|ia3_l|oft_\w+|vera_lambda_\w+|modules_to_save)\.(?P<adapter>[^.]+)(?=\.|$)"
)
_COMMON = "default"


def adapter_of(name: str) -> str | None:
    """The adapter that a parameter belongs to; ``None`` for none."""
    found = _ADAPTER.search(name)
    return found["adapter"] if found else None


def common_names(names: Iterable[str]) -> dict[str, str]:
    """Each parameter's name as if the adapter were called ``default``.

    Where there are several adapters, their names tell them apart, and are left.

    Args:
        names: All names of a model's parameters, or of a file's.
    """
    names = list(names)
    if len({adapter_of(name) for name in names} - {None}) != 1:
        return {name: name for name in names}
    return {name: _ADAPTER.sub(rf"\g<part>.{_COMMON}", name) for name in names}


def common_list(names: Iterable[str]) -> list[str]:
    """The :func:`common_names` alone, in order."""
    return list(common_names(names).values())
