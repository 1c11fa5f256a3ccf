"The quantizer against the exact constants of its theory, and its edges"
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import example, given, settings, strategies as st

from kv_models import unpacked
from optiq.arrays import pack_codes
from optiq.formats import Format, nbytes, parse_format, quantize_dequantize
from optiq.rotation import Rotation, _cell_moments, codebook, _density, _distortion, _mass, _moment, rotation_matrix
from optiq.turboquant import _PANTER_DITE, STEPS, TurboQuantMSE, TurboQuantProd, TurboQuantSplit, _round_trip
from optiq.turboquant import encode_rotated, _nearest_codes, padded, _rotate

D_MSE = {64: [.358387, .114526, .033391, .009132, .002399, .000616, .000156, .000039],
         96: [.360056, .115508, .033773, .009253, .002434, .000625, .000159, .000040],
         128: [.360889, .116000, .033966, .009315, .002451, .000630, .000160, .000040],
         256: [.362136, .116740, .034256, .009408, .002478, .000637, .000162, .000041]}

def unit(n, d, seed=0):
    x = np.random.default_rng([seed, n, d]).standard_normal((n, d)).astype(np.float32)
    return x/np.linalg.norm(x, axis=1, keepdims=True)

def error(q, x): return float(((x-q.dequantize(*q.quantize(x)))**2).sum(-1).mean())

# the law of a coordinate

@pytest.mark.parametrize('d', [3, 4, 5, 64, 127, 1536])
def test_mass_and_moment_are_integrals_of_the_density(d):
    x = np.linspace(-1, 1, 400001)
    f = _density(x, d)
    steps = (f[1:]+f[:-1])/2*np.diff(x)
    assert abs(np.cumsum(steps)[-1]-1) < 1e-5
    assert abs(np.cumsum(steps)[300000]-(_mass(x[300001], d)-_mass(-1, d))) < 1e-5
    assert abs((steps*(x[1:]+x[:-1])/2)[:150000].sum()-(_moment(x[150000], d)-_moment(-1, d))) < 1e-5

# T1

@pytest.mark.parametrize('d', D_MSE)
def test_code_books_have_the_exact_constants(d):
    for b in range(1, 9):
        c = codebook(d, b)
        p, m = _cell_moments(c, d)
        assert abs(c+c[::-1]).max() < 1e-7
        assert abs(m/p-c).max() < 1e-6*abs(c).max() # each point is the mean of its cell
        D = _distortion(c, d)
        assert abs(D-D_MSE[d][b-1]) <= 1e-3*D+5e-7 # the table has six decimals
        assert 4.**-b < D < _PANTER_DITE*4.**-b
    scaled = [4**b*_distortion(codebook(d, b), d) for b in range(1, 9)]
    assert scaled == sorted(scaled)

def test_centroids():
    assert np.allclose(codebook(128, 2)[2:]*128**.5, [.452453, 1.505193], rtol=1e-5)
    assert np.allclose(codebook(128, 3)[4:]*128**.5, [.244425, .753330, 1.336599, 2.131471], rtol=1e-5)
    assert np.allclose(codebook(64, 3)[4:]*8, [.243753, .750658, 1.329343, 2.111311], rtol=1e-5)
    large = codebook(100_000, 1)[1]*100_000**.5
    assert abs(large-math.sqrt(2/math.pi)) < 1e-5

@pytest.mark.parametrize('bits, step, mse', [(2, .99295, .117283), (3, .58216, .036681), (4, .33167, .011220)])
def test_uniform_grids(bits, step, mse):
    c = codebook(128, bits, 'uniform')
    assert np.allclose(np.diff(c), c[1]-c[0]) and abs((c[1]-c[0])*128**.5-step) < 1e-4
    assert abs(_distortion(c, 128)/mse-1) < 1e-4

@pytest.mark.parametrize('args, what', [((128, 0), 'bits=0'), ((128, 9), 'bits=9'), ((128, 2.5), 'bits=2.5'), ((2, 4), 'd=2'),
                                        ((128, 4, 'log'), 'log')])
def test_code_book_refuses(args, what):
    with pytest.raises(ValueError, match=what): codebook(*args)

def test_code_books_cannot_be_changed():
    with pytest.raises(ValueError): codebook(64, 2)[0] = 0

# T2

@pytest.mark.parametrize('d', [64, 80, 96, 128, 160, 192, 256, 576])
@pytest.mark.parametrize('kind', ['haar', 'hadamard', 'hadamard2'])
def test_rotations_are_rotations(d, kind):
    r = Rotation(d, 7, kind)
    assert abs(r.matrix @ r.matrix.T-np.eye(d)).max() < 1e-5
    x = unit(20, d)
    assert abs(np.linalg.norm(r(x), axis=1)-1).max() < 1e-5 and abs(r.inverse(r(x))-x).max() < 1e-5

def test_haar_has_the_sign_fix():
    g = np.random.default_rng([3, 32]).standard_normal((32, 32))
    assert (np.diag(rotation_matrix(32, 3, 'haar').T @ g) > 0).all()

def test_same_rotation_in_every_process():
    code = "from optiq.turboquant import Rotation; print(*[Rotation(96, 5, k).matrix.sum() for k in ('haar', 'hadamard')])"
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.split()
    assert [float(x) for x in out] == pytest.approx([Rotation(96, 5, k).matrix.sum() for k in ('haar', 'hadamard')], abs=1e-4)

def test_width_without_a_hadamard_matrix():
    with pytest.raises(ValueError, match='112 rows'): Rotation(112)
    assert Rotation(112, kind='haar').matrix.shape == (112, 112)
    with pytest.raises(ValueError, match='dct'): Rotation(64, kind='dct')
    assert [padded(d) for d in (64, 80, 96, 112, 128, 192, 576)] == [64, 96, 96, 128, 128, 192, 576]

# T3

@pytest.mark.parametrize('d', [64, 128, 256])
@pytest.mark.parametrize('bits', [1, 2, 3, 4])
def test_measured_distortion(d, bits):
    measured = np.mean([error(TurboQuantMSE(d, bits, s), unit(1000, d, s)) for s in range(4)])
    assert abs(measured/D_MSE[d][bits-1]-1) < .02

# T4

def worst_cases(d=128):
    rng = np.random.default_rng(0)
    base = rng.standard_normal((5, d))
    x = np.stack([np.eye(d)[5], *base])
    for i, n in enumerate((1, 2, 4)): x[i+1, :n] *= 30
    x[4] += 60
    return (x[:5]/np.linalg.norm(x[:5], axis=1, keepdims=True)).astype(np.float32)

@pytest.mark.parametrize('bits', [1, 2, 3, 4])
def test_worst_cases_are_no_worse(bits):
    measured = np.mean([error(TurboQuantMSE(128, bits, s), worst_cases()) for s in range(8)])
    assert abs(measured/D_MSE[128][bits-1]-1) < .08

def test_one_hadamard_round_on_one_channel():
    "every coordinate has the same size, and the error is that of one number"
    one = np.eye(128, dtype=np.float32)[5:6]
    single = [error(TurboQuantMSE(128, b, rotation='hadamard'), one) for b in (1, 2, 3, 4)]
    assert np.allclose(single, [.040, .255, .061, .004], atol=1e-3)
    twice = [np.mean([error(TurboQuantMSE(128, b, s, rotation='hadamard2'), one) for s in range(8)]) for b in (1, 2, 3, 4)]
    assert np.allclose(twice, D_MSE[128][:4], rtol=.3)

# T5 to T9

def inner_products(make, rounds=120, n=100, d=128, cosine=None):
    "(true, estimated) inner products over many rotations; independent vectors unless a cosine is given"
    out = []
    for s in range(rounds):
        x, y = unit(n, d, 2*s), unit(n, d, 2*s+1)
        if cosine is not None:
            y -= (x*y).sum(1, keepdims=True)*x
            y = cosine*x+math.sqrt(1-cosine**2)*y/np.linalg.norm(y, axis=1, keepdims=True)
        q = make(s)
        z = q.dequantize(*q.quantize(x))
        out.append(((x*y).sum(1), (z*y).sum(1)))
    return np.concatenate(out, 1)

@pytest.mark.parametrize('bits', [1, 2, 3, 4])
def test_bias_of_the_first_quantizer(bits):
    true, got = inner_products(lambda s: TurboQuantMSE(128, bits, s), cosine=.8)
    relative = got/true-1
    assert abs(relative.mean()+D_MSE[128][bits-1]) < 4*relative.std()/math.sqrt(len(relative))+1e-3

VARIANTS = {'gaussian': (lambda b: lambda s: TurboQuantProd(128, b, s), [1.571, .567, .182, .0534]),
            'orthogonal': (lambda b: lambda s: TurboQuantProd(128, b, s, 'orthogonal'), [.571, .206, .066, .0194]),
            'unbiased': (lambda b: lambda s: TurboQuantMSE(128, b, s, 'unbiased'), [.571, .137, .0361, .0092])}

@pytest.fixture(scope='module')
def inner_product_errors():
    def error(v, b):
        true, got = inner_products(VARIANTS[v][0](b), cosine=0.)
        return 128*((got-true)**2).mean()
    return {v: [error(v, b) for b in (1, 2, 3, 4)] for v in VARIANTS}

@pytest.mark.parametrize('variant', VARIANTS)
def test_inner_product_error(variant, inner_product_errors):
    assert np.allclose(inner_product_errors[variant], VARIANTS[variant][1], rtol=.05)
    assert all(e > 4.**-b for b, e in zip((1, 2, 3, 4), inner_product_errors[variant]))

def test_orthogonal_sketch_has_a_third_of_the_variance(inner_product_errors):
    ratio = np.array(inner_product_errors['gaussian'])/inner_product_errors['orthogonal']
    assert (abs(ratio-2.75) < .25).all()
    for b in (1, 2, 3):
        e = [inner_product_errors[v][b] for v in ('unbiased', 'orthogonal', 'gaussian')]
        assert e == sorted(e)
    assert inner_product_errors['unbiased'][1] < inner_product_errors['gaussian'][2] # 2 bits against 3

@pytest.mark.parametrize('variant', VARIANTS)
@pytest.mark.parametrize('cosine', [0., .1, .5, 1.])
def test_no_bias(variant, cosine):
    true, got = inner_products(VARIANTS[variant][0](2), cosine=cosine)
    off = got-true
    assert abs(off.mean()) < 4*off.std()/math.sqrt(len(off))+1e-4

def test_unbiased_scale_is_exact_along_the_vector():
    x = unit(50, 128)
    q = TurboQuantMSE(128, 2, scale='unbiased')
    assert abs((x*q.dequantize(*q.quantize(x))).sum(1)-1).max() < 1e-3 # float16 scales

def test_norm_match_keeps_lengths():
    x = unit(50, 128)*np.linspace(.01, 100, 50, dtype=np.float32)[:, None]
    q = TurboQuantMSE(128, 3, scale='norm_match')
    assert np.allclose(np.linalg.norm(q.dequantize(*q.quantize(x)), axis=1), np.linalg.norm(x, axis=1), rtol=1e-3)

# T10, T11

@pytest.mark.parametrize('bits, entropy', [(2, 1.9111), (3, 2.8249), (4, 3.7653)])
def test_entropy_of_the_codes(bits, entropy):
    codes, _ = TurboQuantMSE(256, bits).quantize(unit(2000, 256))
    p = np.bincount(codes.ravel())/codes.size
    assert abs(-(p*np.log2(p)).sum()/entropy-1) < .01

@pytest.mark.parametrize('bits', [1, 2, 3, 4, 5, 6, 8])
def test_reported_size_is_the_stored_size(bits):
    x = unit(10, 128)
    q = TurboQuantMSE(128, bits)
    codes, scales = q.quantize(x)
    assert 8*(pack_codes(codes, bits).nbytes+scales.nbytes)/x.size == q.bits_per_coordinate == bits+16/128
    if bits < 2: return
    q = TurboQuantProd(128, bits)
    codes, scales, signs, lengths = q.quantize(x)
    stored = pack_codes(codes, bits-1).nbytes+pack_codes(signs, 1).nbytes+scales.nbytes+lengths.nbytes
    assert 8*stored/x.size == q.bits_per_coordinate == bits+32/128

def test_half_bits():
    x = unit(200, 128)
    for q, bits in ((TurboQuantSplit(128, 2.5), 2.5), (TurboQuantSplit(128, 3.5), 3.5), (TurboQuantSplit(128, 2.5, paper_ratio=True), 2.25)):
        a, s, c, t = q.quantize(x)
        assert 8*(pack_codes(a, q.high.bits).nbytes+pack_codes(c, q.low.bits).nbytes)/x.size == q.code_bits == bits
        assert 8*(s.nbytes+t.nbytes)/x.size+bits == q.bits_per_coordinate
    order = np.random.default_rng(0).permutation(128)
    q = TurboQuantSplit(128, 2.5, channels=order)
    high = ((x-q.dequantize(*q.quantize(x)))**2).mean(0)
    assert high[order[:64]].mean() < .5*high[order[64:]].mean()
    with pytest.raises(ValueError, match='each of the 128'): TurboQuantSplit(128, 2.5, channels=[0]*128)
    with pytest.raises(ValueError, match='TurboQuantMSE'): TurboQuantSplit(128, 3)

# T12

def test_recall():
    rng = np.random.default_rng(0)
    d, basis = 200, rng.standard_normal((32, 200))
    def draw(n):
        x = (rng.standard_normal((n, 32)) @ basis+2*rng.standard_normal((n, d))).astype(np.float32)
        return x/np.linalg.norm(x, axis=1, keepdims=True)
    data, queries = draw(10_000), draw(500)
    best = (queries @ data.T).argmax(1)
    for b in (2, 3):
        scores = [queries @ q.dequantize(*q.quantize(data)).T for q in (
            TurboQuantMSE(d, b, scale='unbiased'), TurboQuantMSE(d, b), TurboQuantProd(d, b, sketch='orthogonal'), TurboQuantProd(d, b))]
        first = [(s.argmax(1) == best).mean() for s in scores]
        assert first[0] >= first[1] > first[2] > first[3]
        assert (np.argpartition(-scores[0], 8, axis=1)[:, :8] == best[:, None]).any(1).mean() >= .98

# T13, T14

@pytest.mark.parametrize('bits', [1, 2, 3, 5])
def test_codes_are_those_of_the_nearest_point(bits):
    import mlx.core as mx
    import torch
    c, y = codebook(64, bits), unit(40, 64)
    naive = np.abs(y[..., None].astype(np.float64)-c).argmin(-1)
    assert (_nearest_codes(y, c) == naive).mean() > .9999
    assert (_nearest_codes(torch.tensor(y), c).numpy() == _nearest_codes(y, c)).all()
    assert (np.array(_nearest_codes(mx.array(y), c)) == _nearest_codes(y, c)).all()

@pytest.mark.parametrize('bits', [1, 2, 3, 4, 5, 6, 8])
def test_packing_is_that_of_mlx(bits):
    import mlx.core as mx
    codes = np.random.default_rng(0).integers(0, 2**bits, (3, 5, 128)).astype(np.uint8)
    words = pack_codes(mx.array(codes), bits)
    one = mx.ones((3, 5, 1))
    assert (np.array(mx.dequantize(words, one, one*0, group_size=128, bits=bits)) == codes).all()
    assert (np.array(words) == pack_codes(codes, bits)).all()

@settings(deadline=None, max_examples=30)
@given(st.integers(1, 8), st.integers(1, 4), st.integers(0, 2**32-1))
def test_packing_round_trip(bits, words, seed):
    codes = np.random.default_rng(seed).integers(0, 2**bits, (2, 32*words)).astype(np.uint8)
    assert pack_codes(codes, bits).shape == (2, words*bits) and (unpacked(pack_codes(codes, bits), bits) == codes).all()

# every library, every width

@pytest.mark.parametrize('make', [lambda: TurboQuantMSE(96, 3), lambda: TurboQuantProd(96, 3), lambda: TurboQuantProd(96, 1),
                                  lambda: TurboQuantSplit(96, 2.5)])
def test_libraries_agree(make):
    import mlx.core as mx
    import torch
    q, x = make(), unit(20, 96)
    z = q.dequantize(*q.quantize(x))
    assert abs(q.dequantize(*q.quantize(torch.tensor(x))).numpy()-z).max() < 1e-4
    assert abs(np.array(q.dequantize(*q.quantize(mx.array(x))))-z).max() < 1e-4

@pytest.mark.parametrize('d', [80, 96, 112, 192, 576])
def test_any_width(d):
    for bits in (2, 4, 8): assert abs(error(TurboQuantMSE(d, bits), unit(200, d))/_distortion(codebook(d, bits), d)-1) < .05

@pytest.mark.parametrize('quantizer', [TurboQuantMSE(128, 4), TurboQuantProd(128, 4), TurboQuantMSE(128, 4, scale='unbiased'),
                                       TurboQuantMSE(128, 4, scale='norm_match')])
def test_zero_vectors_stay_zero(quantizer):
    out = quantizer.dequantize(*quantizer.quantize(np.zeros((3, 128), np.float32)))
    assert np.isfinite(out).all() and abs(out).max() == 0

def test_refusals():
    with pytest.raises(ValueError, match='64 wide'): TurboQuantMSE(128, 4).quantize(unit(1, 64))
    with pytest.raises(ValueError, match='scale='): TurboQuantMSE(128, 4, scale='max')
    with pytest.raises(ValueError, match='sketch='): TurboQuantProd(128, 4, sketch='sparse')

# the format

@pytest.mark.parametrize('bits, least', [(2, .117283), (3, .036681), (4, .01122)])
def test_round_trip_of_the_format(bits, least):
    import mlx.core as mx
    import torch
    x = unit(1000, 128)
    f = parse_format(f'tq{bits}')
    y = quantize_dequantize(x, f)
    assert y.dtype == x.dtype and str(f) == f'tq{bits}' and 4.**-bits < ((x-y)**2).sum(1).mean() < least*1.06
    assert np.allclose(np.linalg.norm(y, axis=1), 1, rtol=1e-3)
    assert abs(quantize_dequantize(torch.tensor(x), f).numpy()-y).max() < 1e-4
    assert abs(np.array(quantize_dequantize(mx.array(x), f))-y).max() < 1e-4
    half = quantize_dequantize(torch.tensor(x).bfloat16(), f)
    assert half.dtype == torch.bfloat16

@pytest.mark.parametrize('bits, gain', [(2, .999), (3, .98), (4, .93), (6, .9)])
def test_a_step_for_each_vector(bits, gain):
    from optiq.turboquant import _decode_rotated, encode_rotated, _rotate
    y = _rotate(unit(1000, 128), 42)
    one, best = ((((y-_decode_rotated(*encode_rotated(y, bits, steps), bits))**2).sum(1)) for steps in ((1,), STEPS))
    assert best.mean() < gain*one.mean() and (best < one*1.001+1e-6).mean() > .99

@pytest.mark.parametrize('d', [64, 80, 96, 112, 128, 192, 256, 576])
@pytest.mark.parametrize('bits', [2, 3, 4, 5, 6, 8])
def test_bytes_of_the_format(d, bits):
    import mlx.core as mx
    codes, scales = encode_rotated(_rotate(mx.array(unit(7, d)), 42), bits)
    assert pack_codes(codes, bits).nbytes+scales.nbytes == nbytes(Format(bits, None, 'tq'), (7, d))
    if d % 32 == 0: assert nbytes(Format(bits, None, 'tq'), (1, d)) == bits*d//8+2

@pytest.mark.parametrize('name', ['tq1', 'tq7', 'tq4g64', 'tq'])
def test_formats_that_are_none(name):
    with pytest.raises(ValueError): parse_format(name)

@settings(deadline=None, max_examples=25)
@given(st.integers(2, 8).filter(lambda b: b != 7), st.sampled_from([64, 80, 128]), st.floats(1e-3, 1e3), st.integers(0, 2**31))
@example(8, 80, 1e-3, 0)
def test_scaling_a_vector_scales_what_comes_back(bits, d, factor, seed):
    x = unit(2, d, seed)
    assert np.allclose(_round_trip(x*np.float32(factor), bits), factor*_round_trip(x, bits), rtol=5e-3, atol=1e-3*factor)
