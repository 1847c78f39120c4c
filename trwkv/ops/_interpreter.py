"""What Triton's interpreter, which runs kernels on a CPU, must be taught."""

from typing import Any


def prepare_interpreter() -> None:
    """Makes it compute as a GPU does, and not slower than it need be. Modules of kernels call this when imported."""
    fuse_multiply_add()
    replace_language_once()


def fuse_multiply_add() -> None:
    """Makes Triton's interpreter round `tl.fma` on float32 once, as every GPU does; as it comes it rounds twice.

    What a kernel adds below the last place (what rounding takes from a sum, the end of k log2(e)) would be lost.
    """
    import numpy
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        if x.data.dtype != "float32":
            return TensorHandle(x.data * y.data + z.data, z.dtype.scalar)
        exact = x.data.astype("float64") * y.data + z.data  # the product exactly; the sum to float64
        with numpy.errstate(over="ignore"):  # it becomes infinite, as on a GPU
            return TensorHandle(exact.astype("float32"), z.dtype.scalar)

    InterpreterBuilder.create_fma = create_fma


def replace_language_once() -> None:
    """Lets the interpreter replace what triton.language holds once for a launch.

    As it comes it does so again in every call of a device function, although a launch has replaced it all when it
    begins: more than half of the time of kernels made of small functions.
    """
    import triton.language as tl
    from triton.language.core import is_builtin
    from triton.runtime import interpreter

    replace = getattr(interpreter, "_patch_lang", None)
    if replace is None or hasattr(replace, "languages"):
        return
    languages: dict[Any, list[Any]] = {}  # that a function sees

    def replace_once(function: Any) -> Any:
        if function not in languages:
            languages[function] = [x for x in function.__globals__.values() if x is tl or x is tl.core]
        if any(is_builtin(language.load) for language in languages[function]):
            return replace(function)
        return interpreter._LangPatchScope()  # replaced already: nothing to restore

    replace_once.languages = languages  # type: ignore[attr-defined]
    interpreter._patch_lang = replace_once
