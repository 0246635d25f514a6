"""Standard normals from Philox, keyed on (seed, flat element index) so that backward makes the same ones again."""

import triton
import triton.language as tl


@triton.jit
def box_muller(i0, i1):
    """Two independent standard normals from two blocks of random 32-bit integers.

    The radius uses (i0 + 1/2) 2^-32, whose tail reaches 6.7 sigma. The angle is i1 2^-32 turns: its nearest quarter is
    taken by integer arithmetic and the remainder, at most pi/4, goes into short polynomials, since `tl.sin` and `tl.cos`
    bring a slow path with local memory along.
    """
    u = (i0.to(tl.uint32, bitcast=True).to(tl.float32) + 0.5) * 2.3283064365386963e-10
    turns = i1.to(tl.uint32, bitcast=True)
    quarter = (turns + 0x20000000) >> 30  # modulo 4, by wrapping
    f = (turns << 2).to(tl.int32, bitcast=True).to(tl.float32) * (1.5707963267948966 * 2.3283064365386963e-10)
    f2 = f * f
    s = f + f * f2 * (-0.16666654611 + f2 * (0.0083321608736 - f2 * 0.00019515295891))
    c = 1.0 + f2 * (-0.5 + f2 * (0.041666645683 + f2 * (-0.0013887316255 + f2 * 2.443315711809948e-05)))
    odd = (quarter & 1) != 0
    sine, cosine = tl.where(odd, c, s), tl.where(odd, s, c)
    sine = tl.where((quarter & 2) != 0, -sine, sine)
    cosine = tl.where(((quarter + 1) & 2) != 0, -cosine, cosine)
    radius = tl.sqrt(-2.0 * tl.log(u))
    return radius * cosine, radius * sine


@triton.jit
def four_normals(seed, counters):
    """Normals `4c` to `4c + 3` of each counter c, `[..., 2, 2]`: interleaved in registers, for stores 128 bits wide."""
    i0, i1, i2, i3 = tl.randint4x(seed, counters)
    n0, n1 = box_muller(i0, i1)
    n2, n3 = box_muller(i2, i3)
    return tl.join(tl.join(n0, n2), tl.join(n1, n3))


@triton.jit
def normals(seed, start, SIZE: tl.constexpr, ALIGNED: tl.constexpr):
    """Normals number `start` to `start + SIZE` of the stream `seed`; ALIGNED promises that 16 divides `start`."""
    if ALIGNED and SIZE >= 1024:
        # Two counters a thread: it is given the eight neighbours that a vector of 16-bit numbers holds.
        even = start // 4 + 2 * tl.arange(0, SIZE // 8)
        pairs = tl.join(four_normals(seed, even), four_normals(seed, even + 1))
        return tl.permute(pairs, (0, 3, 1, 2)).reshape(SIZE)
    elif ALIGNED:
        return four_normals(seed, start // 4 + tl.arange(0, SIZE // 4)).reshape(SIZE)
    else:
        index = start + tl.arange(0, SIZE)
        i0, i1, i2, i3 = tl.randint4x(seed, index // 4)
        upper = index % 4 >= 2
        n0, n1 = box_muller(tl.where(upper, i2, i0), tl.where(upper, i3, i1))
        return tl.where(index % 2 == 0, n0, n1)
