"The CUDA kernels' own sources, compiled for a CPU and run thread for thread against the composed form"
import ctypes
import shutil
import subprocess

import mlx.core as mx
import numpy as np
import pytest

import optiq.kv.kernels as tk
from optiq.kv.attention import _attend
from optiq.kv.precondition import KeyPrecondition, turned
from optiq.kv.rotated import TurboQuantKVCache
from optiq.turboquant import _unpack_words

CPU = r'''
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>
struct Index { int x, y, z; };
static thread_local Index threadIdx, blockIdx, gridDim;
static std::unique_ptr<std::barrier<>> all, warps[32];
static float lanes[1024];
#define __shared__ static
#define __align__(n) __attribute__((aligned(n)))
#define __expf expf
struct float4 { float x, y, z, w; };
static void __syncthreads() { all->arrive_and_wait(); }
static float __shfl_xor_sync(unsigned, float a, int other) {
    const int t = threadIdx.x;
    lanes[t] = a;
    warps[t/32]->arrive_and_wait();
    a = lanes[t^other];
    warps[t/32]->arrive_and_wait();
    return a;
}
static unsigned __funnelshift_r(unsigned lo, unsigned hi, unsigned s) { return s & 31 ? lo >> (s & 31) | hi << (32-(s & 31)) : lo; }
static float __uint_as_float(unsigned u) { float f; memcpy(&f, &u, 4); return f; }
template <class F> static void launch(int gx, int gy, int n, F f) {
    for (int y = 0; y < gy; ++y) for (int x = 0; x < gx; ++x) { // block by block: shared memory is static
        all = std::make_unique<std::barrier<>>(n);
        for (int w = 0; w < n/32; ++w) warps[w] = std::make_unique<std::barrier<>>(32);
        std::vector<std::thread> ts;
        for (int t = 0; t < n; ++t) ts.emplace_back([=] { threadIdx = {t, 0, 0}; blockIdx = {x, y, 0}; gridDim = {gx, gy, 1}; f(); });
        for (auto& t : ts) t.join();
    }
}
'''
C_TYPES = {mx.float32: 'float', mx.float16: '_Float16', mx.uint32: 'uint32_t'}
NP_TYPES = {mx.float32: np.float32, mx.float16: np.float16, mx.uint32: np.uint32}

@pytest.fixture
def on_cpu(tmp_path, monkeypatch):
    "`mx.fast.cuda_kernel`, with g++ and threads"
    if not shutil.which('g++'): pytest.skip('needs g++')
    made = []
    def cuda_kernel(name, ins, outs, body):
        def call(inputs, template, grid, threadgroup, output_shapes, output_dtypes):
            made.append(name)
            given = [np.array(a) for a in inputs]
            out = [np.zeros(s, NP_TYPES[d]) for s, d in zip(output_shapes, output_dtypes)]
            params = ', '.join([*(f'const {C_TYPES[a.dtype]}* {n}' for n, a in zip(ins, inputs)),
                                *(f'{C_TYPES[d]}* {n}' for n, d in zip(outs, output_dtypes))])
            using = ''.join(f'using {n} = {C_TYPES[d]};' for n, d in template)
            so = tmp_path/f'{name}.so'
            if not so.exists():
                code = f'''{CPU}
static void kernel({params}) {{ {using}
{body}
}}
extern "C" void run(int x_, int y_, int n_, {params}) {{
    launch(x_, y_, n_, [=] {{ kernel({", ".join([*ins, *outs])}); }});
}}'''
                (tmp_path/'k.cpp').write_text(code)
                options = '-std=c++20 -O1 -w -shared -fPIC -pthread'.split()
                subprocess.run(['g++', *options, str(tmp_path/'k.cpp'), '-o', str(so)], check=True)
            assert not grid[0] % threadgroup[0]
            ctypes.CDLL(str(so)).run(grid[0]//threadgroup[0], grid[1], threadgroup[0], *(a.ctypes.data_as(ctypes.c_void_p) for a in given+out))
            return [mx.array(a) for a in out]
        return call
    monkeypatch.setattr(mx.fast, 'cuda_kernel', cuda_kernel)
    monkeypatch.setattr(mx, 'default_device', lambda: mx.gpu)
    tk._kernel.cache_clear()
    yield made
    tk._kernel.cache_clear()

def statistics(r, G, D, mean=1):
    return KeyPrecondition(mean*r.standard_normal((G, 1, D)).astype(np.float32), np.exp(.3*r.standard_normal((G, 1, D))).astype(np.float32))

@pytest.mark.parametrize('B, D, G, N, kb, vb, T', [(1, 128, 2, 2, 4, 4, 290), (2, 64, 2, 3, 3, 2, 130), (1, 64, 1, 8, 8, 5, 1)])
def test_kernels_do_what_the_composed_form_does(B, D, G, N, kb, vb, T, on_cpu, monkeypatch):
    r = np.random.default_rng(D+kb)
    k, v = (mx.array(r.standard_normal((B, G, T, D)).astype(np.float32)) for _ in 'kv')
    q = mx.array(r.standard_normal((B, G*N, 1, D)).astype(np.float32))
    def run(fused):
        monkeypatch.setattr(tk, '_FUSED', fused)
        c = TurboQuantKVCache.of(turned(f'tq{kb}', 42, statistics(np.random.default_rng(0), G, D)),
                                 turned(f'tq{vb}', 7, statistics(np.random.default_rng(1), G, D, 0) if N > 1 else None))
        if T > 1: c.update_and_fetch(k[:, :, :-1], v[:, :, :-1])
        return c, _attend(q, *c.update_and_fetch(k[:, :, -1:], v[:, :, -1:]), scale=D**-.5)
    (a, x), (b, y) = run(True), run(False)
    assert [n.split('_')[1] for n in on_cpu] == ['encode', 'partial', 'merge']
    assert abs(x-y).max() < 1e-4*max(1, abs(y).max().item())
    for p, o, bits in ((a.keys, b.keys, kb), (a.values, b.values, vb)):
        assert (_unpack_words(np.array(p[0][:, :, T-1]), bits) == _unpack_words(np.array(o[0][:, :, T-1]), bits)).mean() > .98
        assert abs(np.array(p[1])/np.maximum(np.array(o[1]), 1e-6)-1)[:, :, T-1].max() < .01

def test_long_stretches(on_cpu, monkeypatch):
    monkeypatch.setattr(tk, '_STRETCHES', ((0, 128), (256, 512)))
    monkeypatch.setattr(tk, '_FUSED', True)
    c, (k, v, q) = TurboQuantKVCache(64, 2), mx.random.normal((3, 1, 1, 600, 64))
    got = _attend(q[:, :, :1], *c.update_and_fetch(k, v), scale=.125)
    monkeypatch.setattr(tk, '_FUSED', False)
    assert abs(got-_attend(q[:, :, :1], *c.keys_and_values(), scale=.125)).max() < 1e-4 and '_512' in on_cpu[0]

@pytest.mark.parametrize('D, G, H', [(80, 1, 4), (128, 1, 16), (256, 1, 8)])
def test_heads_that_the_kernels_are_not_made_for(D, G, H, monkeypatch):
    monkeypatch.setattr(tk, '_FUSED', True)
    monkeypatch.setattr(mx, 'default_device', lambda: mx.gpu)
    assert not tk.kernels_fit(D, G, H) and tk.kernels_fit(128, G, 8)
