"""One tile of the backward: the adjoint of the state from after the tile to before it, and the tile's gradients.

As in the forward there is a fast path, in one exponent, and an exact one for any data; see MATH.md.
"""

import triton
import triton.language as tl

from trwkv.ops.wkv.kernel_grads import grad_of_y, load_grad_rows
from trwkv.ops.wkv.kernel_math import (
    EMPTY,
    carry,
    exact_output,
    exact_update,
    exp_near,
    load_decay,
    load_row,
    load_triple,
    load_vectors,
    negative,
    pow2,
    reciprocal,
    split_k,
    store_row,
    taken,
    zeros,
)
from trwkv.ops.wkv.kernel_outputs import channel_weights, of_token, token_weights, weights_of_tokens
from trwkv.ops.wkv.kernel_tiles import load_tile, no_tile, widen
from trwkv.ops.wkv.kernel_unit import exponents, scaled


@triton.jit
def store_entered(ptr, lane, A, B, O, is_fast, P: tl.constexpr, BLOCK_C: tl.constexpr):
    """[3, P, BLOCK_C] for a tile's way back, of which a fast one takes 2 P + 1."""
    for p in tl.static_range(P):
        tl.store(ptr + p * BLOCK_C + lane, A[p])
        tl.store(ptr + (P + p) * BLOCK_C + lane, B[p])
    tl.store(ptr + 2 * P * BLOCK_C + lane, O[0])
    if not is_fast:
        for p in tl.static_range(1, P):
            tl.store(ptr + (2 * P + p) * BLOCK_C + lane, O[p])


@triton.jit
def load_entered(ptr, lane, P: tl.constexpr, BLOCK_C: tl.constexpr):
    """A, B and their common exponent, where `store_entered` put them for a fast tile."""
    A = ()
    B = ()
    for p in tl.static_range(P):
        A += (tl.load(ptr + p * BLOCK_C + lane),)
        B += (tl.load(ptr + (P + p) * BLOCK_C + lane),)
    return A, B, tl.load(ptr + 2 * P * BLOCK_C + lane)


@triton.jit
def store_token_grads(
    p_grad_k, p_grad_v, grad_weights, row, c, e, v, from_num, from_den, g, y,
    C: tl.constexpr, P: tl.constexpr, BLOCK_C: tl.constexpr, WEIGHTS: tl.constexpr,
):  # fmt: skip
    """dv = e N', dk = e (v N' + D') with N', D' the adjoints of this token's own terms, summed over perspectives."""
    store_row(p_grad_v, c, e * from_num, C, BLOCK_C)
    store_row(p_grad_k, c, e * tl.fma(v, from_num, from_den), C, BLOCK_C)
    if WEIGHTS == "token":
        for p in tl.static_range(P):
            tl.store(grad_weights + row * P + p, tl.sum(g * y[p], 0))


@triton.jit
def vectors_so_far(ptr, c, C: tl.constexpr, P: tl.constexpr, BLOCK_C: tl.constexpr, WEIGHTS: tl.constexpr):
    """Gradients of w, u and [P, C] weights at ptr [3, P, C], P numbers of each; registers have no room to keep them."""
    out = ()
    for i in tl.static_range(3 * P if WEIGHTS == "channel" else 2 * P):
        out += (load_row(ptr + i * C, c, C, BLOCK_C, 0.0),)
    return out


@triton.jit
def store_vectors(
    ptr, c, so_far, decay, dw, bonus, du, dweights,
    C: tl.constexpr, P: tl.constexpr, BLOCK_C: tl.constexpr, WEIGHTS: tl.constexpr,
):  # fmt: skip
    """A tile's share, added to what `vectors_so_far` loaded."""
    for p in tl.static_range(P):
        store_row(ptr + p * C, c, tl.fma(decay[p], dw[p], so_far[p]), C, BLOCK_C)
        store_row(ptr + (P + p) * C, c, tl.fma(bonus[p], du[p], so_far[P + p]), C, BLOCK_C)
        if WEIGHTS == "channel":
            store_row(ptr + (2 * P + p) * C, c, so_far[2 * P + p] + dweights[p], C, BLOCK_C)
    tl.debug_barrier()  # other lanes may read than wrote


@triton.jit
def fast_tile_bwd(
    a, b, O, rest, A, B, top, k_rows, v_rows, fast, weights, grad_output,
    grad_k, grad_v, grad_weights, grad_vectors, row, c,
    C: tl.constexpr, P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr, STEP: tl.constexpr,
    WEIGHTS: tl.constexpr, GROUPS: tl.constexpr, PAIRED: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Recomputes the tile's states with the forward's arithmetic, keeps them in registers and walks back.

    The adjoint is joint: O[0] is its exponent.
    """
    W, U, tile_W, tile_W_low, _, _ = fast
    EARLY: tl.constexpr = min(3, BLOCK_T - 1)
    of_channels = channel_weights(weights, c, C, P, BLOCK_C, WEIGHTS)
    WIDTH: tl.constexpr = P * C if WEIGHTS == "none" else C // GROUPS
    # All at once: after the store of a gradient the compiler moves no load before it.
    grad_rows = load_grad_rows(grad_output + row * WIDTH, c, C, P, BLOCK_C, BLOCK_T, STEP * WIDTH, WEIGHTS)
    # Weights likewise, of as many tokens as there are registers for; the last token's first.
    AHEAD: tl.constexpr = BLOCK_T if P * BLOCK_C <= 128 else 1
    last_row = row + (BLOCK_T - 1) * STEP
    token_w = weights_of_tokens(weights, of_channels, last_row, P, AHEAD, -STEP, WEIGHTS, GROUPS)
    p_grad_k = grad_k + row * C
    p_grad_v = grad_v + row * C
    A_rows = A  # entry j * P + p: before token j
    B_rows = B
    a_row = ()
    b_row = ()
    joined = ()
    dw = zeros(P, BLOCK_C)
    du = zeros(P, BLOCK_C)
    dweights = zeros(P, BLOCK_C)
    scale = pow2(top - O[0])
    for p in tl.static_range(P):
        a_row += (a[p] * scale,)
        b_row += (b[p] * scale,)
    for i in tl.static_range(2 * P):
        joined += (rest[i] * scale,)
    a_end = a_row
    b_end = b_row
    a = a_row
    b = b_row
    e_rows = ()
    for j in tl.static_range(BLOCK_T):
        e_rows += (exp_near(widen(k_rows[j], PAIRED), top),)
        if j + 1 < BLOCK_T:
            ev = e_rows[j] * widen(v_rows[j], PAIRED)
            for p in tl.static_range(P):
                A_rows += (tl.fma(A_rows[j * P + p], W[p], ev),)
                B_rows += (tl.fma(B_rows[j * P + p], W[p], e_rows[j]),)
    for j in tl.static_range(BLOCK_T - 1, -1, -1):
        # Before the last tokens' stores, which no load may pass, and when registers of earlier states are free.
        if j == EARLY:
            tile_decay = ()
            tile_decay_low = ()
            for p in tl.static_range(P):
                tile_decay += (taken(tile_W[p]),)
                tile_decay_low += (taken(tile_W_low[p]),)
            so_far = vectors_so_far(grad_vectors, c, C, P, BLOCK_C, WEIGHTS)
        e = e_rows[j]
        j_v = widen(v_rows[j], PAIRED)
        ev = e * j_v
        if j >= AHEAD:
            token_w += token_weights(weights, of_channels, row + (j - AHEAD) * STEP, P, WEIGHTS, GROUPS)
        grad_y, g = grad_of_y(grad_rows, j, of_token(token_w, BLOCK_T - 1 - j, P), P, BLOCK_C, WEIGHTS)
        y = ()
        a_next = ()
        b_next = ()
        a_joined = ()
        b_joined = ()
        du_next = ()
        dw_next = ()
        dweights_next = ()
        for p in tl.static_range(P):
            j_A = A_rows[j * P + p]
            j_B = B_rows[j * P + p]
            inverse = reciprocal(tl.fma(U[p], e, j_B), PTX)
            y += (tl.fma(U[p], ev, j_A) * inverse,)
            grad_num = grad_y[p] * inverse
            grad_den = negative(grad_num) * y[p]
            if p == 0:
                from_num = tl.fma(U[p], grad_num, a[p])
                from_den = tl.fma(U[p], grad_den, b[p])
            else:
                from_num += tl.fma(U[p], grad_num, a[p])
                from_den += tl.fma(U[p], grad_den, b[p])
            du_next += (tl.fma(ev, grad_num, tl.fma(e, grad_den, du[p])),)
            dw_next += (tl.fma(a[p], j_A, tl.fma(b[p], j_B, dw[p])),)
            if WEIGHTS == "channel":
                dweights_next += (tl.fma(g, y[p], dweights[p]),)
            a_next += (tl.fma(W[p], a[p], grad_num),)
            b_next += (tl.fma(W[p], b[p], grad_den),)
            a_joined += (tl.fma(W[p], joined[p], grad_num),)
            b_joined += (tl.fma(W[p], joined[P + p], grad_den),)
        a = a_next
        b = b_next
        joined = a_joined + b_joined
        du = du_next
        dw = dw_next
        if WEIGHTS == "channel":
            dweights = dweights_next
        store_token_grads(
            p_grad_k + j * STEP * C, p_grad_v + j * STEP * C, grad_weights, row + j * STEP, c, e, j_v,
            from_num, from_den, g, y, C, P, BLOCK_C, WEIGHTS,
        )  # fmt: skip
    a_begin = ()
    b_begin = ()
    O_begin = ()
    a_rest = ()
    b_rest = ()
    for p in tl.static_range(P):
        p_a, p_a_rest = carry(a_end[p], joined[p], tile_decay[p], tile_decay_low[p])
        p_b, p_b_rest = carry(b_end[p], joined[P + p], tile_decay[p], tile_decay_low[p])
        a_begin += (p_a,)
        b_begin += (p_b,)
        if p == 0:
            O_begin += (top,)
        else:
            O_begin += (O[p],)
        a_rest += (p_a_rest,)
        b_rest += (p_b_rest,)
    store_vectors(grad_vectors, c, so_far, W, dw, U, du, dweights, C, P, BLOCK_C, WEIGHTS)
    return a_begin, b_begin, O_begin, a_rest + b_rest


@triton.jit
def exact_token_bwd(
    a, b, O, joined, dw, du, dweights, A, B, A_exponent, e, k_exponent, v, grad_y, g,
    decay, decay_exponent, bonus, bonus_exponent, P: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """One token back, whatever the exponents: no factor 2^n below has n > 1.

    dw and du are the tile's, without the factors of decay and bonus, and every rounding is that of the fast path: later
    tokens have a say in which of the two a tile takes.
    """
    from_num = tl.zeros_like(e)
    from_den = tl.zeros_like(e)
    y = ()
    a_next = ()
    b_next = ()
    O_next = ()
    a_joined = ()
    b_joined = ()
    dw_next = ()
    du_next = ()
    dweights_next = ()
    for p in tl.static_range(P):
        num, den, top = exact_output(A[p], B[p], A_exponent[p], bonus[p], bonus_exponent[p], e, k_exponent, v)
        inverse = reciprocal(den, PTX)
        y += (num * inverse,)
        grad_num = grad_y[p] * inverse
        grad_den = negative(grad_num) * y[p]
        own_scale = pow2(k_exponent + bonus_exponent[p] - top)
        own = bonus[p] * own_scale
        later = pow2(k_exponent - O[p])
        from_num += tl.fma(own, grad_num, later * a[p])
        from_den += tl.fma(own, grad_den, later * b[p])
        own_e = e * own_scale
        du_next += (tl.fma(own_e * v, grad_num, tl.fma(own_e, grad_den, du[p])),)
        dweights_next += (tl.fma(g, y[p], dweights[p]),)
        scale = pow2(A_exponent[p] + decay_exponent[p] - O[p])
        dw_next += (tl.fma(scale * a[p], A[p], tl.fma(scale * b[p], B[p], dw[p])),)
        # An empty state has no exponent of its own: take the largest that keeps both factors below within 1.
        before = tl.where(A_exponent[p] == EMPTY, tl.minimum(top, O[p] - decay_exponent[p]), A_exponent[p])
        now = pow2(before - top)
        kept = decay[p] * pow2(before + decay_exponent[p] - O[p])
        grad_num = now * grad_num
        grad_den = now * grad_den
        a_next += (tl.fma(kept, a[p], grad_num),)
        b_next += (tl.fma(kept, b[p], grad_den),)
        a_joined += (tl.fma(kept, joined[p], grad_num),)
        b_joined += (tl.fma(kept, joined[P + p], grad_den),)
        O_next += (before,)
    return a_next, b_next, O_next, a_joined + b_joined, dw_next, du_next, dweights_next, from_num, from_den, y


@triton.jit
def exact_tile_bwd(
    a, b, O, rest, p_entered, vectors, w, k, v, weights, grad_output,
    grad_k, grad_v, grad_weights, grad_vectors, row, steps, c,
    C: tl.constexpr, P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr, STEP: tl.constexpr,
    WEIGHTS: tl.constexpr, GROUPS: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Any data, up to BLOCK_T tokens: before each token the state is computed anew from the tile's start."""
    decay, decay_exponent, tile_decay, tile_decay_low, tile_exponent, bonus, bonus_exponent = vectors
    of_channels = channel_weights(weights, c, C, P, BLOCK_C, WEIGHTS)
    WIDTH: tl.constexpr = P * C if WEIGHTS == "none" else C // GROUPS
    lane = tl.arange(0, BLOCK_C)
    a_end = a
    b_end = b
    O_end = O
    joined = rest
    dw = zeros(P, BLOCK_C)
    du = zeros(P, BLOCK_C)
    dweights = zeros(P, BLOCK_C)
    for i in range(steps):
        at = steps - 1 - i
        A, B, A_exponent = load_triple(p_entered, lane, BLOCK_C, P, BLOCK_C)
        for m in range(at):
            m_e, m_exponent = split_k(load_row(k + (row + m * STEP) * C, c, C, BLOCK_C, 0.0).to(tl.float32))
            m_v = load_row(v + (row + m * STEP) * C, c, C, BLOCK_C, 0.0).to(tl.float32)
            A_next = ()
            B_next = ()
            O_next = ()
            for p in tl.static_range(P):
                x, y, z, _, _ = exact_update(
                    A[p], B[p], A_exponent[p], 0.0, 0.0, decay[p], decay_exponent[p], m_e, m_exponent, m_v
                )
                A_next += (x,)
                B_next += (y,)
                O_next += (z,)
            A = A_next
            B = B_next
            A_exponent = O_next
        e, exponent = split_k(load_row(k + (row + at * STEP) * C, c, C, BLOCK_C, 0.0).to(tl.float32))
        i_v = load_row(v + (row + at * STEP) * C, c, C, BLOCK_C, 0.0).to(tl.float32)
        i_grad = load_grad_rows(grad_output + (row + at * STEP) * WIDTH, c, C, P, BLOCK_C, 1, 0, WEIGHTS)
        i_w = token_weights(weights, of_channels, row + at * STEP, P, WEIGHTS, GROUPS)
        grad_y, g = grad_of_y(i_grad, 0, i_w, P, BLOCK_C, WEIGHTS)
        a, b, O, joined, dw, du, dweights, from_num, from_den, rows_y = exact_token_bwd(
            a, b, O, joined, dw, du, dweights, A, B, A_exponent, e, exponent, i_v, grad_y, g,
            decay, decay_exponent, bonus, bonus_exponent, P, PTX,
        )  # fmt: skip
        store_token_grads(
            grad_k + (row + at * STEP) * C, grad_v + (row + at * STEP) * C, grad_weights, row + at * STEP, c,
            e, i_v, from_num, from_den, g, rows_y, C, P, BLOCK_C, WEIGHTS,
        )  # fmt: skip
    so_far = vectors_so_far(grad_vectors, c, C, P, BLOCK_C, WEIGHTS)
    store_vectors(grad_vectors, c, so_far, decay, dw, bonus, du, dweights, C, P, BLOCK_C, WEIGHTS)
    if steps < BLOCK_T:
        tile_decay, tile_decay_low, tile_exponent = load_decay(w, c, steps.to(tl.float64), C, P, BLOCK_C)
    a_begin = ()
    b_begin = ()
    a_rest = ()
    b_rest = ()
    for p in tl.static_range(P):
        scale = pow2(O[p] + tile_exponent[p] - O_end[p])
        p_a, p_a_rest = carry(a_end[p] * scale, joined[p], tile_decay[p], tile_decay_low[p])
        p_b, p_b_rest = carry(b_end[p] * scale, joined[P + p], tile_decay[p], tile_decay_low[p])
        a_begin += (p_a,)
        b_begin += (p_b,)
        a_rest += (p_a_rest,)
        b_rest += (p_b_rest,)
    return a_begin, b_begin, O, a_rest + b_rest


@triton.jit
def walk_tile_back(
    a, b, O, rest, is_joint, is_fast, p_entered, fast, source, w, u, k, v, weights, grad_output,
    grad_k, grad_v, grad_weights, grad_vectors, row0, t0, end, c,
    C: tl.constexpr, P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr, STEP: tl.constexpr,
    WEIGHTS: tl.constexpr, GROUPS: tl.constexpr, PAIRED: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Adjoint before token t0 from that after the tile; p_entered: where `store_entered` put the tile's first state."""
    row = row0 + t0 * STEP
    lane = tl.arange(0, BLOCK_C)
    if is_fast:
        A, B, top = load_entered(p_entered, lane, P, BLOCK_C)
        tile = no_tile(source, BLOCK_T)
        k_rows, v_rows = load_tile(source, row, 0, tile, C, BLOCK_C, BLOCK_T, STEP, PAIRED)
        if not is_joint:
            a, b, O, rest = join_adjoint(a, b, O, rest, top, P)
        a, b, O, rest = fast_tile_bwd(
            a, b, O, rest, A, B, top, k_rows, v_rows, fast, weights, grad_output,
            grad_k, grad_v, grad_weights, grad_vectors, row, c,
            C, P, BLOCK_C, BLOCK_T, STEP, WEIGHTS, GROUPS, PAIRED, PTX,
        )  # fmt: skip
    else:
        # Anew: the fast path has no registers left for them.
        vectors = load_vectors(w, u, c, C, P, BLOCK_C, BLOCK_T)
        O = exponents(O, is_joint, P)
        a, b, O, rest = exact_tile_bwd(
            a, b, O, rest, p_entered, vectors, w, k, v, weights, grad_output,
            grad_k, grad_v, grad_weights, grad_vectors, row, tl.minimum(BLOCK_T, end - t0), c,
            C, P, BLOCK_C, BLOCK_T, STEP, WEIGHTS, GROUPS, PTX,
        )  # fmt: skip
    return a, b, O, rest


@triton.jit
def join_adjoint(a, b, O, rest, top, P: tl.constexpr):
    """An adjoint that has an exponent for each perspective, with `top` for all."""
    scale = ()
    O_out = ()
    for p in tl.static_range(P):
        scale += (pow2(top - O[p]),)
        O_out += (top,)
    a, b, rest = scaled(a, b, rest, scale, P)
    return a, b, O_out, rest
