"""One tile of the walk that sums adjoints: its outputs' share, and the state after it.

There is a fast path, in one exponent, and an exact one for any data, with the same roundings. `rest` holds P numbers
each of: what rounding took from A, from B, R, and what it took from R.
"""

import triton
import triton.language as tl

from trwkv.ops.wkv.kernel_grads import grad_of_y, load_grad_rows, load_grads
from trwkv.ops.wkv.kernel_math import (
    carry,
    exact_carry,
    exact_output,
    exact_update,
    exp_near,
    exponent_above,
    load_decay,
    load_row,
    negative,
    ones,
    pow2,
    reciprocal,
    split_k,
    taken,
    zeros,
)
from trwkv.ops.wkv.kernel_outputs import channel_weights, of_token, token_weights, weights_of_tokens
from trwkv.ops.wkv.kernel_tiles import load_rows, widen


@triton.jit
def fast_tile_adjoint(
    A, B, O, rest, a, b, tile, grads, source, p_grad, missing, fast, weights, row, c,
    C: tl.constexpr, P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr, STEP: tl.constexpr,
    WEIGHTS: tl.constexpr, GROUPS: tl.constexpr, PAIRED: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """As the forward's `fast_tile`; but a token's state is what entered the tile, times W^j, plus what joined since:
    W^j is needed anyway.
    """
    W, U, tile_W, tile_W_low, _, _ = fast
    k_rows, v_rows = tile
    unweighted = ones(P, BLOCK_C)  # [P, C] weights: the sums are multiplied with them, not every term
    OUTPUTS: tl.constexpr = P if WEIGHTS == "none" else 1
    top = O[0]
    joined = ()
    for m in tl.static_range(2 * P):
        joined += (rest[m],)
    power = ones(P, BLOCK_C)
    num_sum = zeros(P, BLOCK_C)
    den_sum = zeros(P, BLOCK_C)
    token_w = weights_of_tokens(weights, unweighted, row, P, BLOCK_T, STEP, WEIGHTS, GROUPS)
    e_rows = ()
    for j in tl.static_range(BLOCK_T):
        e_rows += (exp_near(widen(k_rows[j], PAIRED), top),)
    p_k, p_v, c_tile = source
    next_row = row + BLOCK_T * STEP
    k_rows = load_rows(p_k, next_row, c_tile, missing, k_rows, C, BLOCK_C, BLOCK_T, STEP, PAIRED)
    next_v_rows = ()
    next_grads = ()
    for j in tl.static_range(BLOCK_T):
        e = e_rows[j]
        ev = e * widen(v_rows[j], PAIRED)
        next_v_rows += load_rows(
            p_v, next_row + j * STEP, c_tile, missing, (v_rows[j],), C, BLOCK_C, 1, STEP, PAIRED
        )
        j_grads = ()
        for i in tl.static_range(OUTPUTS):
            j_grads += (widen(grads[j * OUTPUTS + i], PAIRED),)
        grad_y, _ = grad_of_y(j_grads, 0, of_token(token_w, j, P), P, BLOCK_C, WEIGHTS)
        joined_A = ()
        joined_B = ()
        power_next = ()
        num_next = ()
        den_next = ()
        for p in tl.static_range(P):
            j_A = tl.fma(power[p], A[p], joined[p])
            j_B = tl.fma(power[p], B[p], joined[P + p])
            num, den = weighted_grads(
                tl.fma(U[p], ev, j_A), tl.fma(U[p], e, j_B), grad_y[p], power[p], num_sum[p], den_sum[p], PTX
            )
            num_next += (num,)
            den_next += (den,)
            joined_A += (tl.fma(joined[p], W[p], ev),)
            joined_B += (tl.fma(joined[P + p], W[p], e),)
            power_next += (power[p] * W[p],)
        joined = joined_A + joined_B
        power = power_next
        num_sum = num_next
        den_sum = den_next
        old = ()
        for i in tl.static_range(OUTPUTS):
            old += (grads[j * OUTPUTS + i],)
        next_grads += load_grads(
            p_grad, next_row + j * STEP, c_tile, missing, old, C, P, 1, STEP, WEIGHTS, GROUPS, PAIRED
        )
    share = shares(rest, weights, c, C, P, BLOCK_C, WEIGHTS)
    A_end = ()
    B_end = ()
    R = ()
    A_rest = ()
    B_rest = ()
    R_rest = ()
    a_end = ()
    b_end = ()
    for p in tl.static_range(P):
        decay = taken(tile_W[p])
        decay_low = taken(tile_W_low[p])
        a_end += (tl.fma(share[p], num_sum[p], a[p]),)
        b_end += (tl.fma(share[p], den_sum[p], b[p]),)
        x, x_rest = carry(A[p], joined[p], decay, decay_low)
        y, y_rest = carry(B[p], joined[P + p], decay, decay_low)
        r, r_rest = carry(rest[2 * P + p], rest[3 * P + p] * decay, decay, decay_low)
        A_end += (x,)
        B_end += (y,)
        R += (r,)
        A_rest += (x_rest,)
        B_rest += (y_rest,)
        R_rest += (r_rest,)
        if p == 0:
            largest = y
        else:
            largest = tl.maximum(largest, y)
    rest = A_rest + B_rest + R + R_rest
    bound = top + exponent_above(largest)
    return A_end, B_end, O, rest, a_end, b_end, bound, (k_rows, next_v_rows), next_grads


@triton.jit
def shares(rest, weights, c, C: tl.constexpr, P: tl.constexpr, BLOCK_C: tl.constexpr, WEIGHTS: tl.constexpr):
    """What of a unit at the chunk's start is left, R, times the perspective's weight if that is the channel's."""
    of_channels = channel_weights(weights, c, C, P, BLOCK_C, WEIGHTS)
    out = ()
    for p in tl.static_range(P):
        if WEIGHTS == "channel":
            out += (rest[2 * P + p] * of_channels[p],)
        else:
            out += (rest[2 * P + p],)
    return out


@triton.jit
def weighted_grads(num, den, grad_y, weight, num_sum, den_sum, PTX: tl.constexpr):
    """The sums so far plus, with this weight, the derivatives by numerator and denominator of y = num / den."""
    inverse = reciprocal(den, PTX)
    grad_num = (grad_y * inverse) * weight
    return num_sum + grad_num, tl.fma(negative(grad_num), num * inverse, den_sum)


@triton.jit
def exact_tile_adjoint(
    A, B, O, rest, a, b, vectors, w, k, v, weights, grad_output, row, steps, c,
    C: tl.constexpr, P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr, STEP: tl.constexpr,
    WEIGHTS: tl.constexpr, GROUPS: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """The same roundings as `fast_tile_adjoint` with an exponent per perspective and step: any data, up to BLOCK_T
    tokens.
    """
    decay, decay_exponent, tile_decay, tile_decay_low, tile_exponent, bonus, bonus_exponent = vectors
    unweighted = ones(P, BLOCK_C)  # [P, C] weights: the sums are multiplied with them, not every term
    WIDTH: tl.constexpr = P * C if WEIGHTS == "none" else C // GROUPS
    joined = ()
    for m in tl.static_range(2 * P):
        joined += (rest[m],)
    power = ones(P, BLOCK_C)
    num_sum = zeros(P, BLOCK_C)
    den_sum = zeros(P, BLOCK_C)
    i_A = A
    i_B = B
    i_O = O
    for i in range(steps):
        i_row = row + i * STEP
        e, exponent = split_k(load_row(k + i_row * C, c, C, BLOCK_C, 0.0).to(tl.float32))
        i_v = load_row(v + i_row * C, c, C, BLOCK_C, 0.0).to(tl.float32)
        grad_rows = load_grad_rows(grad_output + i_row * WIDTH, c, C, P, BLOCK_C, 1, 0, WEIGHTS)
        i_w = token_weights(weights, unweighted, i_row, P, WEIGHTS, GROUPS)
        grad_y, _ = grad_of_y(grad_rows, 0, i_w, P, BLOCK_C, WEIGHTS)
        A_next = ()
        B_next = ()
        O_next = ()
        joined_A = ()
        joined_B = ()
        power_next = ()
        num_next = ()
        den_next = ()
        for p in tl.static_range(P):
            kept = O[p] + i * decay_exponent[p]  # exponent of what has become of a unit at the tile's start
            scale = pow2(kept - i_O[p])
            num, den, top = exact_output(
                tl.fma(power[p] * scale, A[p], joined[p]), tl.fma(power[p] * scale, B[p], joined[P + p]), i_O[p],
                bonus[p], bonus_exponent[p], e, exponent, i_v,
            )  # fmt: skip
            num, den = weighted_grads(
                num, den, grad_y[p], power[p] * pow2(kept - top), num_sum[p], den_sum[p], PTX
            )
            num_next += (num,)
            den_next += (den,)
            x, y, o, x_joined, y_joined = exact_update(
                i_A[p], i_B[p], i_O[p], joined[p], joined[P + p], decay[p], decay_exponent[p], e, exponent, i_v
            )  # fmt: skip
            A_next += (x,)
            B_next += (y,)
            O_next += (o,)
            joined_A += (x_joined,)
            joined_B += (y_joined,)
            power_next += (power[p] * decay[p],)
        i_A = A_next
        i_B = B_next
        i_O = O_next
        joined = joined_A + joined_B
        power = power_next
        num_sum = num_next
        den_sum = den_next
    if steps < BLOCK_T:
        tile_decay, tile_decay_low, tile_exponent = load_decay(w, c, steps.to(tl.float64), C, P, BLOCK_C)
    share = shares(rest, weights, c, C, P, BLOCK_C, WEIGHTS)
    A_end = ()
    B_end = ()
    O_end = ()
    R = ()
    A_rest = ()
    B_rest = ()
    R_rest = ()
    a_end = ()
    b_end = ()
    for p in tl.static_range(P):
        a_end += (tl.fma(share[p], num_sum[p], a[p]),)
        b_end += (tl.fma(share[p], den_sum[p], b[p]),)
        x, y, o, x_rest, y_rest = exact_carry(
            A[p],
            B[p],
            O[p],
            joined[p],
            joined[P + p],
            i_O[p],
            tile_decay[p],
            tile_decay_low[p],
            tile_exponent[p],
        )
        scale = pow2(O[p] + tile_exponent[p] - o)
        r, r_rest = carry(
            rest[2 * P + p] * scale, rest[3 * P + p] * scale * tile_decay[p], tile_decay[p], tile_decay_low[p]
        )
        A_end += (x,)
        B_end += (y,)
        O_end += (o,)
        R += (r,)
        A_rest += (x_rest,)
        B_rest += (y_rest,)
        R_rest += (r_rest,)
    return A_end, B_end, O_end, A_rest + B_rest + R + R_rest, a_end, b_end
