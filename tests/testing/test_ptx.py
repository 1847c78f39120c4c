"""The emulator of compiled kernels: what instructions compute, how lanes diverge and meet, what it calls a fault."""

from functools import partial

import numpy as np
import pytest
import torch

from trwkv.ops._dispatch import is_interpreting
from trwkv.testing.ptx import arithmetic, emulated_launches
from trwkv.testing.ptx.machine import Machine
from trwkv.testing.ptx.memory import Memory, MemoryFault
from trwkv.testing.ptx.parse import parse

FLOATS = torch.tensor(
    [0.0, -0.0, 1.0, -1.5, 1.00390625, 1.01171875, 3.3895e38, -3.4e38, 1e-40, float("inf"), float("nan")]
)


def run(body: str, *tensors: torch.Tensor, grid: int = 1, threads: int = 32) -> None:
    """A kernel of these instructions; %rd0, %rd1, ... are its tensors."""
    parameters = ", ".join(f".param .u64 p_{i}" for i in range(len(tensors)))
    loads = "\n".join(f"ld.param.b64 %rd{i}, [p_{i}];" for i in range(len(tensors)))
    program = parse(f".visible .entry kernel(\n{parameters}\n)\n{{\n{loads}\n{body}\nret;\n}}\n")
    named = {f"tensor {i}": x for i, x in enumerate(tensors)}
    memory = Memory(named, np.repeat(np.arange(grid), threads))
    Machine(program, grid, threads, memory, [memory.address(name) for name in named]).run()


def at(register: str, tensor: int = 0, width: int = 4) -> str:
    """The address of the lane's own element, in a register."""
    return f"mov.u32 %r90, %tid.x;\nmul.wide.u32 %rd90, %r90, {width};\nadd.s64 {register}, %rd{tensor}, %rd90;\n"


def test_bfloat16_is_rounded_as_pytorch_does() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randint(-(2**31), 2**31 - 1, (20000,), generator=g).to(torch.int32).view(torch.float32)
    x = torch.cat([x, FLOATS])
    ours = torch.from_numpy(arithmetic.to_bfloat16(x.numpy()).view(np.int16)).view(torch.bfloat16)
    torch.testing.assert_close(ours, x.bfloat16(), rtol=0, atol=0, equal_nan=True)
    back = torch.from_numpy(arithmetic.from_bfloat16(ours.view(torch.int16).numpy().view(np.uint16)))
    torch.testing.assert_close(back, x.bfloat16().float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("larger", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_extremes_of_pairs(dtype: torch.dtype, larger: bool) -> None:
    a, b = (
        x.to(dtype) for x in torch.cartesian_prod(FLOATS, FLOATS[torch.arange(2, 11)])[:98].T.contiguous()
    )
    expected = (torch.maximum if larger else torch.minimum)(a, b)  # NaN where there is one
    pairs = [x.view(torch.int32).numpy().view(np.uint32) for x in (a, b)]
    kind = {torch.bfloat16: "bf16x2", torch.float16: "f16x2"}[dtype]
    operation = arithmetic.of_halves(partial(arithmetic.extreme, larger=larger, nan=True), kind)
    ours = torch.from_numpy(operation(*pairs).view(np.int32)).view(dtype)
    torch.testing.assert_close(ours, expected, rtol=0, atol=0, equal_nan=True)


def test_two_numbers_in_one_register() -> None:
    x, y = torch.arange(64.0), torch.zeros(64)
    body = at("%rd10", 0, 8) + at("%rd11", 1, 8)
    body += """
    ld.global.b64 { %rd1 }, [ %rd10 + 0 ];
    add.rn.f32x2 %rd2, %rd1, %rd1;
    fma.rn.f32x2 %rd3, %rd1, %rd1, %rd2;
    st.global.b64 [ %rd11 + 0 ], { %rd3 };
    """
    run(body, x, y)
    assert torch.equal(y, x * x + 2 * x)


def test_approximations_err_as_much_as_they_may_and_alike_for_powers_of_two() -> None:
    x = np.linspace(0.5, 1.0, 5001, dtype=np.float32)[1:-1]
    y = arithmetic.reciprocal_approximate(x)
    exact = 1 / x.astype(np.float64)
    ulp = np.spacing(exact.astype(np.float32))
    assert np.abs(y - exact).max() <= 1.5 * ulp.max()
    assert (np.abs(y - exact) > 0.6 * ulp).any()
    np.testing.assert_array_equal(
        arithmetic.reciprocal_approximate(x * np.float32(2**60)), y * np.float32(2**-60)
    )
    assert arithmetic.reciprocal_approximate(np.float32([4, np.inf])).tolist() == [0.25, 0]
    assert arithmetic.exp2_approximate(np.float32([0, 3, -126])).tolist() == [1, 8, 2.0**-126]


def test_numbers_at_their_limits() -> None:
    ones = np.uint32([1, 1, 1, 1])
    np.testing.assert_array_equal(arithmetic.shift_left(ones, np.uint32([0, 31, 32, 40])), [1, 1 << 31, 0, 0])
    np.testing.assert_array_equal(arithmetic.shift_right(np.int32([-8]), np.uint32([40])), [-1])
    np.testing.assert_array_equal(
        arithmetic.bit_field(np.int32([0b1101000]), np.uint32([3]), np.uint32([4])), [-3]
    )
    np.testing.assert_array_equal(arithmetic.quotient(np.int32([-7, 7]), np.int32([2, -2])), [-3, -3])
    factors = np.int32([-(2**31), 7]), np.int32([3, 2])
    np.testing.assert_array_equal(arithmetic.multiply_high(*factors), [-2, 0])
    np.testing.assert_array_equal(arithmetic.multiply_high(*(x.view(np.uint32) for x in factors)), [1, 0])
    factors = np.uint16([2**15, 7]), np.uint16([6, 2])
    np.testing.assert_array_equal(arithmetic.multiply_high(*factors), np.uint16([3, 0]))
    bytes_of = np.uint32([0x83828180]), np.uint32([0x07060504])
    for selector, permuted in {0x7632: 0x07068382, 0x0123: 0x80818283, 0x4C8F: 0x0400FF00}.items():
        assert arithmetic.permute_bytes(*bytes_of, np.uint32([selector])) == permuted
    to_int = arithmetic.convert("s32", "f32", "rzi")
    assert to_int(np.float32([-1.9, 1e20, np.nan])).tolist() == [-1, 2**31 - 1, 0]
    # 2^-24 is half of the last place of 1: it counts only where the product is not rounded first
    product = arithmetic.fma(np.float32([1 + 2**-12]), np.float32([1 + 2**-12]), np.float32([-1 - 2**-11]))
    assert product == 2**-24
    for name, expected in {
        "lt": False,
        "ne": False,
        "neu": True,
        "geu": True,
        "nan": True,
        "num": False,
    }.items():
        assert arithmetic.compare(name)(np.float32([np.nan]), np.float32([1.0])) == expected, name


def test_lanes_diverge_and_meet() -> None:
    """Every lane takes as many turns as its number; then all are there for the sum's minimum."""
    out, low = torch.zeros(64, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    body = (
        at("%rd10")
        + at("%rd11", 1)
        + """
    mov.b32 %r1, 0;
    mov.b32 %r2, 5;
$L__loop:
    setp.ge.s32 %p1, %r1, %r90;
    @%p1 bra $L__done;
    add.s32 %r1, %r1, 1;
    add.s32 %r2, %r2, 3;
    bra.uni $L__loop;
$L__done:
    bar.sync 0;
    redux.sync.min.s32 %r3, %r2, -1;
    st.global.b32 [ %rd10 + 0 ], { %r2 };
    st.global.b32 [ %rd11 + 0 ], { %r3 };
    """
    )
    run(body, out, low, threads=64)
    assert out.tolist() == [5 + 3 * i for i in range(64)]
    assert low.tolist() == [5] * 32 + [5 + 3 * 32] * 32


def test_vectors_predicates_and_types() -> None:
    x = torch.arange(64.0)
    out = torch.full((32,), -1.0)
    body = (
        at("%rd10", 0, 8)
        + at("%rd11", 1)
        + """
    setp.lt.u32 %p1, %r90, 7;
    mov.u32 %r1, 0x0;
    mov.u32 %r2, 0f42C80000;  // 100
    @%p1 ld.global.v2.b32 { %r1, %r2 }, [ %rd10 + 0 ];
    fma.rn.f32 %r3, %r1, 0f40000000, %r2;
    @!%p1 st.global.b32 [ %rd11 + 0 ], { %r2 };
    @%p1 st.global.b32 [ %rd11 + 0 ], { %r3 };
    { .reg .b32 tmp; mov.b64 {tmp, %r4}, %rd10; }
    """
    )
    run(body, x, out)
    assert out.tolist() == [2 * (2.0 * i) + 2 * i + 1 for i in range(7)] + [100.0] * 25


STORE, LOAD = "st.global.b32 [ %rd10 + 0 ], { %r90 };", "ld.global.b32 { %r1 }, [ %rd11 + 0 ];"
OTHERS = "xor.b32 %r91, %r90, 1;\nmul.wide.u32 %rd91, %r91, 4;\nadd.s64 %rd11, %rd0, %rd91;\n"
BARRIER = "bar.sync 0;"


@pytest.mark.parametrize(
    "body, message",
    [
        (STORE + BARRIER + LOAD, None),
        (STORE + LOAD, "read by lane 0, with no barrier after lane 1"),
        (LOAD + STORE, "written by lane 0, with no barrier after lane 1"),
        (LOAD + BARRIER + STORE, None),
        ("st.global.b32 [ %rd0 + 0 ], { %r90 };", "two lanes write"),
        ("setp.eq.s32 %p1, %r90, 3;\n@%p1 st.global.b32 [ %rd0 + 0 ], { %r90 };", None),
        ("ld.global.b32 { %r1 }, [ %rd10 + 4 ];", "4 bytes at 128 of 128"),
        ("ld.global.b32 { %r1 }, [ %rd10 + -4 ];", "4 bytes at -4 of 128"),
        ("ld.global.b32 { %r1 }, [ %rd10 + 2 ];", "no multiple of 4"),
        ("ld.global.v2.b32 { %r1, %r2 }, [ %rd10 + 0 ];", "no multiple of 8"),
        ("setp.eq.s32 %p1, %r90, 3;\n@%p1 bra $L__out;\nbar.sync 0;\n$L__out:", "elsewhere"),
        ("ld.global.b32 { %r1 }, [ %rd90 + 0 ];", "of no tensor"),
    ],
)  # fmt: skip
def test_faults(body: str, message: str | None) -> None:
    body = at("%rd10") + OTHERS + "\n".join(body.replace(";", ";\n").split("\n"))
    x = torch.zeros(32, dtype=torch.int32)
    if message is None:
        run(body, x)
    else:
        with pytest.raises(MemoryFault, match=message):
            run(body, x)


SHUFFLE = "shfl.sync.bfly.b32 %r2, %r1, 1, 31, -1;\n"
NEVER = "setp.eq.s32 %p1, %r90, 99;\n"
STORE_SHUFFLED = "add.s32 %r3, %r2, 1;\nst.global.b32 [ %rd10 + 0 ], { %r3 };\n"


@pytest.mark.parametrize(
    "body, is_ordered",
    [
        (LOAD + "\n" + SHUFFLE + STORE_SHUFFLED, True),
        (LOAD + "\n$L__nobody_comes_here:\n" + SHUFFLE + STORE_SHUFFLED, True),
        (LOAD + "\nadd.s32 %r2, %r1, 0;\n" + STORE_SHUFFLED, False),  # the lane's own load alone
        (LOAD + "\n" + SHUFFLE.replace("%r1", "%r90") + STORE_SHUFFLED, False),  # of something else
        (LOAD + "\nmov.u32 %r1, 7;\n" + SHUFFLE + STORE_SHUFFLED, False),
        # two ways lead to the shuffle
        (LOAD + "\n$L__a:\n" + SHUFFLE + STORE_SHUFFLED + NEVER + "@%p1 bra $L__a;", False),
        (LOAD + "\n" + NEVER + "@%p1 bra $L__a;\n" + SHUFFLE + STORE_SHUFFLED + "$L__a:\n", True),
        (LOAD + "\n" + LOAD.replace("%r1", "%r5") + "\n" + SHUFFLE + STORE_SHUFFLED, False),  # of the second
    ],
)
def test_a_store_waits_for_what_a_shuffle_hands_it(body: str, is_ordered: bool) -> None:
    x = torch.arange(100, 132, dtype=torch.int32)
    expected = x + 1
    if is_ordered:
        run(at("%rd10") + OTHERS + body, x)
        assert torch.equal(x, expected)
    else:
        with pytest.raises(MemoryFault, match="written by lane 0, with no barrier after lane 1"):
            run(at("%rd10") + OTHERS + body, x)


def test_a_shuffle_orders_no_other_warp() -> None:
    x = torch.zeros(64, dtype=torch.int32)
    others = OTHERS.replace("%r90, 1", "%r90, 32")
    with pytest.raises(MemoryFault, match="written by lane 0, with no barrier after lane 32"):
        run(at("%rd10") + others + LOAD + "\n" + SHUFFLE + STORE_SHUFFLED, x, threads=64)


@pytest.mark.parametrize("misaligned", [0, 4])
def test_an_access_in_front_of_a_tensor_is_said_to_be_that(misaligned: int) -> None:
    pages = torch.zeros(4096, dtype=torch.int32)
    start = (-pages.data_ptr() % 4096 + misaligned) // 4
    x, y = pages[start : start + 32], pages[start + 1024 : start + 1056]
    assert x.data_ptr() % 4096 == y.data_ptr() % 4096 == misaligned
    with pytest.raises(MemoryFault, match="tensor 1: 4 bytes at -4 of 128"):
        run(at("%rd10", 1) + "ld.global.b32 { %r1 }, [ %rd10 + -4 ];", x, y)


def test_no_barrier_orders_programs() -> None:
    x = torch.zeros(64, dtype=torch.int32)
    own = (
        at("%rd10")
        + "mov.u32 %r5, %ctaid.x;\nmul.wide.u32 %rd12, %r5, 128;\nadd.s64 %rd10, %rd10, %rd12;\n"
        + STORE
    )
    run(own, x, grid=2)
    assert x.tolist() == 2 * list(range(32))
    with pytest.raises(MemoryFault, match="written by lane 32"):
        run(
            at("%rd10")
            + "setp.eq.u32 %p1, %ctaid.x, 1;\n@%p1 bra $L__b;\n"
            + STORE
            + "\nret;\n$L__b:\n"
            + BARRIER
            + "\n"
            + STORE,
            x,
            grid=2,
        )


@pytest.mark.parametrize(
    "instruction", ["brev.b32", "mul.hi.u64", "add.sat.f32", "cvt.rz.f32.f64", "ld.shared.b32"]
)
def test_what_is_unknown_is_refused(instruction: str) -> None:
    with pytest.raises(NotImplementedError, match=instruction):
        run(f"mov.b32 %r1, 0;\n{instruction} %r1, %r1;", torch.zeros(1))


def test_what_nothing_was_written_to_is_no_number() -> None:
    x, y, z = torch.zeros(32), torch.zeros(32), torch.zeros(32)
    body = at("%rd10") + at("%rd11", 1) + at("%rd12", 2)
    body += """
    setp.lt.u32 %p1, %r90, 7;
    @%p1 mov.b32 %r1, 0f40000000;
    mov.b32 %r2, {%rs1, %rs2};
    add.rn.f32 %r4, %r3, 0f40000000;
    st.global.b32 [ %rd10 + 0 ], { %r1 };
    st.global.b32 [ %rd11 + 0 ], { %r2 };
    st.global.b32 [ %rd12 + 0 ], { %r4 };
    """
    run(body, x, y, z)
    assert (x[:7] == 2).all() and x[7:].isnan().all() and y.isnan().all() and z.isnan().all()


def test_what_cannot_be_read_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a kernel"):
        parse(".version 8.7")
    with pytest.raises(ValueError, match="expected a contiguous tensor"):
        Memory({"x": torch.zeros(4, 4).T}, np.zeros(32, int))


def test_denormal_numbers_are_flushed_where_the_instruction_says_so() -> None:
    x = torch.full((32,), 1e-40)
    flushed, kept, inverse = (torch.zeros(32) for _ in range(3))
    body = at("%rd10") + at("%rd11", 1) + at("%rd12", 2) + at("%rd13", 3)
    body += """
    ld.global.b32 { %r1 }, [ %rd10 + 0 ];
    abs.ftz.f32 %r2, %r1;
    abs.f32 %r3, %r1;
    rcp.approx.ftz.f32 %r4, %r1;
    st.global.b32 [ %rd11 + 0 ], { %r2 };
    st.global.b32 [ %rd12 + 0 ], { %r3 };
    st.global.b32 [ %rd13 + 0 ], { %r4 };
    """
    run(body, x, flushed, kept, inverse)
    assert (flushed == 0).all() and torch.equal(kept, x) and inverse.isinf().all()


@pytest.mark.parametrize("kind, expected", [("bfly", [i ^ 6 for i in range(32)]), ("idx", [6] * 32)])
def test_shuffles(kind: str, expected: list[int]) -> None:
    out = torch.zeros(64, dtype=torch.int32)
    shuffle = f"shfl.sync.{kind}.b32 %r1, %r90, 6, 31, -1;\nst.global.b32 [ %rd10 + 0 ], {{ %r1 }};"
    run(at("%rd10") + shuffle, out, threads=64)
    assert out.tolist() == expected + [32 + i for i in expected]


@pytest.mark.skipif(not is_interpreting(), reason="what is refused is the interpreter")
def test_what_cannot_be_emulated_is_refused() -> None:
    with pytest.raises(ValueError, match="capability: expected 80 or more"), emulated_launches(75):
        pass
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET: expected 0"), emulated_launches(90):
        pass


def test_the_bits_of_nan() -> None:
    x, bits = torch.full((32,), float("inf")), torch.zeros(32, dtype=torch.int32)
    body = at("%rd10") + at("%rd11", 1)
    body += (
        "ld.global.b32 { %r1 }, [ %rd10 + 0 ];\nsub.f32 %r2, %r1, %r1;\nst.global.b32 [ %rd11 + 0 ], { %r2 };"
    )
    run(body, x, bits)
    assert (bits == 0x7FFFFFFF).all()
