"""What the options of the losses may be: to a type checker and an editor as types, to the checks at run time as tuples of their values."""

from __future__ import annotations

from typing import Literal, get_args

Reduction = Literal["mean", "sum", "none"]
LoneAnchors = Literal["zero", "skip", "error"]
ContrastMode = Literal["all", "one"]
Form = Literal["out", "in"]
Denominator = Literal["all", "negatives"]
Across = Literal["gather", "ring"]
Backend = Literal["auto", "cuda", "triton", "cpu", "chunked", "reference"]

REDUCTIONS: tuple[Reduction, ...] = get_args(Reduction)
LONE_ANCHORS: tuple[LoneAnchors, ...] = get_args(LoneAnchors)
CONTRAST_MODES: tuple[ContrastMode, ...] = get_args(ContrastMode)
FORMS: tuple[Form, ...] = get_args(Form)
DENOMINATORS: tuple[Denominator, ...] = get_args(Denominator)
ACROSS: tuple[Across, ...] = get_args(Across)
