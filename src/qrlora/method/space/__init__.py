"""Spaces: mean and principal components of adapters of one role on one basis, in which the next one is a point."""

from qrlora.method.space.attach import coefficients_on, place_adapter, unexplained
from qrlora.method.space.file import SUFFIX, load_space, save_space
from qrlora.method.space.principal import Principal, principal
from qrlora.method.space.record import Projection, Space
from qrlora.method.space.span import Span, place

__all__ = [
    "SUFFIX",
    "Principal",
    "Projection",
    "Space",
    "Span",
    "coefficients_on",
    "load_space",
    "place",
    "place_adapter",
    "principal",
    "save_space",
    "unexplained",
]
