"Formats against MLX itself: bytes, and every bit of the round trip"
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest
import torch

from optiq.formats import ALL_FORMATS, AS_IS, Format, config_entry, divides, nbytes, parse_format, quantize_dequantize

DTYPES = {'float32': (torch.float32, mx.float32), 'bfloat16': (torch.bfloat16, mx.bfloat16),
          'float16': (torch.float16, mx.float16)}

def hard_weights(seed):
    "Random rows with the cases that break a sloppy rule: zeros, constants, one sign, tiny, large, a lone outlier"
    w = np.random.default_rng(seed).standard_normal((64, 512)).astype(np.float32)
    w[3, :128], w[4, :128], w[5], w[6] = 0, 5, abs(w[5]), -abs(w[6])
    w[7] *= 1e-6; w[8] *= 900; w[9, 17] = 60; w[10, ::2] = 0; w[11] *= 2e-3
    return w

@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('fmt', ALL_FORMATS, ids=str)
def test_bit_for_bit(fmt, dtype):
    t, m = DTYPES[dtype]
    w = hard_weights(fmt.bits*fmt.group_size)
    expected = mx.array(w).astype(m)
    expected = mx.dequantize(*mx.quantize(expected, fmt.group_size, fmt.bits, fmt.mode), group_size=fmt.group_size,
                             bits=fmt.bits, mode=fmt.mode, dtype=m)
    expected = np.array(expected.astype(mx.float32))
    got = quantize_dequantize(torch.tensor(w).to(t), fmt)
    assert got.dtype == t and got.shape == w.shape
    np.testing.assert_array_equal(got.float().numpy(), expected)
    np.testing.assert_array_equal(np.array(quantize_dequantize(mx.array(w).astype(m), fmt).astype(mx.float32)), expected)
    if dtype != 'bfloat16':
        got = quantize_dequantize(w.astype(dtype), fmt)
        assert got.dtype == np.dtype(dtype)
        np.testing.assert_array_equal(got.astype(np.float32), expected)

@pytest.mark.parametrize('fmt', ALL_FORMATS, ids=str)
@pytest.mark.parametrize('shape', [(8, 256), (3, 16, 128)])
def test_bytes_are_what_mlx_stores(fmt, shape):
    for m, itemsize in ((mx.float32, 4), (mx.bfloat16, 2)):
        stored = mx.quantize(mx.random.normal(shape).astype(m), fmt.group_size, fmt.bits, fmt.mode)
        assert nbytes(fmt, shape, itemsize) == sum(a.nbytes for a in stored)

def test_names():
    assert all(parse_format(str(f)) == f for f in (*ALL_FORMATS, AS_IS))
    assert parse_format('4') == Format(4, 64) and parse_format(3, 32) == Format(3, 32)
    assert config_entry(AS_IS) is False and config_entry(Format(4, 64)) == dict(group_size=64, bits=4, mode='affine')
    assert len({*ALL_FORMATS, *map(parse_format, map(str, ALL_FORMATS))}) == len(ALL_FORMATS)

@pytest.mark.parametrize('bad', ['7', '4g63', '1', 'int4', '', '4x64'])
def test_no_such_format(bad):
    with pytest.raises(ValueError, match='format'): parse_format(bad)

def test_width_that_no_group_divides():
    for f in (lambda: nbytes(Format(4, 64), (8, 96)), lambda: quantize_dequantize(np.ones((8, 96), np.float32), Format(4, 64))):
        with pytest.raises(ValueError, match='groups of 64'): f()

@pytest.mark.parametrize('fmt', ALL_FORMATS, ids=str)
@pytest.mark.parametrize('width', [16, 48, 80, 96, 144, 160, 192])
def test_divides_says_what_mlx_opens(fmt, width):
    import mlx.nn as nn
    from mlx_lm.utils import quantize_model
    model = nn.Sequential(nn.Linear(width, 32, bias=False))
    quantize_model(model, {}, group_size=32, bits=4, quant_predicate=lambda path, m: divides(fmt, m.weight.shape) and config_entry(fmt))
    assert ('scales' in model.layers[0]) == divides(fmt, (32, width)) == (width % max(fmt.group_size, 32) == 0)
    if not divides(fmt, (32, width)):
        with pytest.raises(ValueError, match='groups of|multiple of 32'): nbytes(fmt, (32, width))

def test_a_family_is_found_by_its_name():
    "In a process that has imported nothing else"
    code = "from optiq.formats import parse_format; print(parse_format('tq3').bits)"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout == '3\n'
