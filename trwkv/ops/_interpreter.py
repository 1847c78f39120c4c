"""What Triton's interpreter, which runs kernels on a CPU, must be taught."""

from typing import Any


def prepare_interpreter() -> None:
    """Makes it compute as a GPU does, and not slower than it need be. Modules of kernels call this when imported."""
    fuse_multiply_add()
    find_builtins_once()


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


def find_builtins_once() -> None:
    """Keeps which members of triton.language the interpreter replaces.

    As it comes it looks for them in every call of a device function, although a launch has replaced them all when it
    begins: more than half of the time of kernels made of small functions.
    """
    from triton.language.core import is_builtin
    from triton.runtime import interpreter

    find_and_replace = getattr(interpreter, "_patch_builtin", None)
    if find_and_replace is None or hasattr(find_and_replace, "found"):
        return
    found: dict[Any, str] = {}  # one of the builtins of each module or class

    def replace(package: Any, *rest: Any) -> None:
        if package not in found:
            found[package] = next((x for x in dir(package) if is_builtin(getattr(package, x))), "")
        name = found[package]
        if name and is_builtin(getattr(package, name)):  # all are replaced together, and restored together
            find_and_replace(package, *rest)

    replace.found = found  # type: ignore[attr-defined]
    interpreter._patch_builtin = replace
