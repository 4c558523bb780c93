"""Triton's interpreter without the work that it repeats: the same operations on the same numbers, in less than half the time."""

from __future__ import annotations

import dataclasses
import functools
from types import SimpleNamespace


@functools.cache
def spare_repetitions() -> None:
    """The interpreter of Triton 3.7 and newer; an older one is left as it is, and is slow.

    Each launch, and each call of one jitted function by another, searches the language for functions to replace by NumPy's, and most of
    the time goes there. The replacements are always the same: they are found once and put in place once a launch. And each sum and product
    of integers is made in int64 too, for an assertion that is discarded without the option ``debug``. NumPy's dtypes are looked up by name.
    """
    try:
        from triton import language
        from triton.runtime import interpreter
    except ImportError:
        return
    if not all(hasattr(interpreter, name) for name in ("_LangPatchScope", "_patch_lang", "_get_np_dtype", "interpreter_builder")):
        return
    builder, search = interpreter.interpreter_builder, interpreter._patch_lang
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    dtypes, numpy_dtype = {}, interpreter._get_np_dtype
    replacements, open_scopes = [], []

    def known_dtype(dtype):
        if dtype.name not in dtypes:
            dtypes[dtype.name] = numpy_dtype(dtype)
        return dtypes[dtype.name]

    class Scope(interpreter._LangPatchScope):
        def restore(self) -> None:
            super().restore()
            open_scopes.remove(self)

    def patch(function):
        if open_scopes:  # a call inside a launch, which has patched all that there is
            return open_scopes[-1]
        if not replacements:
            found = search(SimpleNamespace(__globals__={"tl": language, "core": language.core}))  # whatever a kernel's module may see
            once = dict.fromkeys((thing, name) for thing, name, _ in found._changes)
            replacements.extend((thing, name, vars(thing)[name]) for thing, name in once)
            found.restore()
        scope = Scope()
        open_scopes.append(scope)
        for replacement in replacements:
            scope.set_attr(*replacement)
        return scope

    interpreter._patch_lang, interpreter._get_np_dtype = patch, known_dtype
