"""What Triton's interpreter, which runs kernels on a CPU, must be taught to compute as a GPU does."""

from typing import Any


def fuse_interpreted_multiply_add() -> None:
    """Makes Triton's interpreter round `tl.fma` on float32 once, as every GPU does; as it comes it rounds twice.

    What a kernel adds below the last place (what rounding takes from a sum, the end of k log2(e)) would be lost. The
    kernels' module calls this when it is imported for the interpreter.
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
