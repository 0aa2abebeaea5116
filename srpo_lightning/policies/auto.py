"""The policy for a model whose family nobody has to name."""

from abc import ABCMeta
from typing import Any

from srpo_lightning.files.pretrained import read_json
from srpo_lightning.policies.family import families, family_of
from srpo_lightning.policies.flow_policy import FlowPolicy


class _OfItsFamily(ABCMeta):
    """Makes a family's class where its own is asked for, which the command line reads the settings of."""

    def __call__(cls, pretrained: str, *args: Any, **settings: Any) -> Any:
        transformer = read_json(pretrained, "transformer", "config.json")
        family = family_of(transformer)
        if family is None:
            raise ValueError(
                f"pretrained is {pretrained}, whose transformer is a {transformer.get('_class_name')}, which no family "
                f"here reads: give a model for {', '.join(own.__name__ for own in families())}, or add a family "
                "(docs/adding_a_family.md)"
            )
        return family(pretrained, *args, **settings)


class AutoPolicy(FlowPolicy, metaclass=_OfItsFamily):
    """The policy of the family that the model in `pretrained` belongs to, as its transformer/config.json says.

    Raises:
        ValueError: listing the families, if none of them reads the model.
    """


AutoPolicy.__abstractmethods__ = frozenset()  # what a family must say, this one need not: it is never made itself
