"The kernels' own sources for CUDA and for Metal, compiled for a CPU and run thread for thread against the composed form"
import ctypes
import hashlib
import re
import shutil
import subprocess

import mlx.core as mx
import numpy as np
import pytest

import optiq.kv.kernels as tk
from kv_models import unpacked
from optiq.kv.attention import _attend
from optiq.kv.precondition import KeyPrecondition, turned
from optiq.kv.rotated import TurboQuantKVCache

CPU = r'''
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>
struct Index { int x, y, z; };
static thread_local Index at_thread, at_block, blocks;
static std::unique_ptr<std::barrier<>> all, warps[32];
static uint32_t lanes[1024][8]; // what the threads of a warp show each other
struct float4 { float x, y, z, w; };
struct uint2 { unsigned x, y; };
struct uint4 { unsigned x, y, z, w; };
static void meet() { all->arrive_and_wait(); }
template <class F> static float among(F f, float a) { // what `f` makes of the numbers of the warp
    const int t = at_thread.x;
    memcpy(lanes[t], &a, 4);
    warps[t/32]->arrive_and_wait();
    a = f([&](int lane) { float b; memcpy(&b, lanes[t/32*32+lane], 4); return b; });
    warps[t/32]->arrive_and_wait();
    return a;
}
static float of_lane(float a, int lane) { return among([=](auto get) { return get(lane); }, a); }
template <class F> static void launch(int gx, int gy, int n, F f) {
    for (int y = 0; y < gy; ++y) for (int x = 0; x < gx; ++x) { // block by block: shared memory is static
        all = std::make_unique<std::barrier<>>(n);
        for (int w = 0; w < n/32; ++w) warps[w] = std::make_unique<std::barrier<>>(32);
        std::vector<std::thread> ts;
        for (int t = 0; t < n; ++t) ts.emplace_back([=] { at_thread = {t, 0, 0}; at_block = {x, y, 0}; blocks = {gx, gy, 1}; f(); });
        for (auto& t : ts) t.join();
    }
}
'''
CUDA = r'''
#define threadIdx at_thread
#define blockIdx at_block
#define gridDim blocks
#define __device__
#define __shared__ static
#define __syncthreads meet
#define __align__(n) __attribute__((aligned(n)))
static float __shfl_xor_sync(unsigned, float a, int i) { return of_lane(a, at_thread.x % 32 ^ i); }
static float __shfl_sync(unsigned, float a, int lane) { return of_lane(a, lane); }
static bool __any_sync(unsigned, bool a) { return among([](auto get) { float b = 0; for (int i = 0; i < 32; ++i) b += get(i); return b; }, a); }
static unsigned __funnelshift_r(unsigned lo, unsigned hi, unsigned s) { return s & 31 ? lo >> (s & 31) | hi << (32-(s & 31)) : lo; }
static float __uint_as_float(unsigned u) { float f; memcpy(&f, &u, 4); return f; }
static unsigned __float_as_uint(float f) { unsigned u; memcpy(&u, &f, 4); return u; }
struct __half2 { _Float16 x, y; };
static __half2 __floats2half2_rn(float a, float b) { return {(_Float16)a, (_Float16)b}; }
static __half2 __float2half2_rn(float a) { return {(_Float16)a, (_Float16)a}; }
static __half2 __hsub2(__half2 a, __half2 b) { return {(_Float16)(a.x-b.x), (_Float16)(a.y-b.y)}; }
static void mma(float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) { // m16n8k16, as PTX describes it
    const int t = at_thread.x, w = t/32*32, row = t % 32/4, column = t % 4;
    const unsigned mine[] = {a0, a1, a2, a3, b0, b1};
    memcpy(lanes[t], mine, sizeof mine);
    warps[t/32]->arrive_and_wait();
    auto half = [&](int lane, int i, int k) { _Float16 h; memcpy(&h, (char*)&lanes[w+lane][i]+k % 2*2, 2); return (float)h; };
    for (int i = 0; i < 4; ++i) for (int k = 0; k < 16; ++k) // (row, k) of the first, (k, column) of the second
        c[i] += half(row*4+k % 8/2, i/2+k/8*2, k)*half((2*column+i % 2)*4+k % 8/2, 4+k/8, k);
    warps[t/32]->arrive_and_wait();
}
'''
METAL = r'''
#define thread_position_in_threadgroup at_thread
#define threadgroup_position_in_grid at_block
#define threadgroups_per_grid blocks
#define threadgroup static
#define device
#define simd_sum(a) among([](auto get) { float b = 0; for (int i = 0; i < 32; ++i) b += get(i); return b; }, a)
#define simd_max(a) among([](auto get) { float b = get(0); for (int i = 1; i < 32; ++i) b = fmaxf(b, get(i)); return b; }, a)
typedef Index uint3;
typedef unsigned short ushort;
enum class mem_flags { mem_threadgroup };
static void threadgroup_barrier(mem_flags) { meet(); }
static float simd_shuffle_xor(float a, ushort i) { return of_lane(a, at_thread.x % 32 ^ i); }
template <class T> static T as_type(unsigned u) { T f; memcpy(&f, &u, 4); return f; }
using std::floor, std::fma, std::sqrt, std::exp2;
static float max(float a, float b) { return a > b ? a : b; }
static float min(float a, float b) { return a < b ? a : b; }
'''
C_TYPES = {mx.float32: 'float', mx.float16: '_Float16', mx.uint32: 'uint32_t'}
NP_TYPES = {mx.float32: np.float32, mx.float16: np.float16, mx.uint32: np.uint32}

OPTIONS = '-std=c++20 -O1 -w -fPIC -pthread'.split()

@pytest.fixture(scope='module')
def headers(tmp_path_factory):
    "What stands above all kernels of a language, which takes the compiler longer to read than a kernel; beside it lies what was compiled"
    if not shutil.which('g++'): pytest.skip('needs g++')
    files = {language: tmp_path_factory.mktemp('kernels')/'above.h' for language in (CUDA, METAL)}
    for language, file in files.items():
        file.write_text(CPU+language)
        subprocess.run(['g++', *OPTIONS, '-x', 'c++-header', str(file), '-o', f'{file}.gch'], check=True)
    return files

def on_threads(language, above, made):
    "`mx.fast.cuda_kernel` or `mx.fast.metal_kernel`, with g++ and threads"
    def make(name, input_names, output_names, source, header):
        ins, outs = input_names, output_names
        header = re.sub(r'asm volatile\(.*?\);', 'mma(c, a0, a1, a2, a3, b0, b1);', header, flags=re.S)
        if language is METAL: # where a pointer points is a part of its type there, which C++ has no word for
            header = header.replace('#define LOCAL threadgroup', '#define LOCAL').replace('alignas(16)', '__attribute__((aligned(16)))')
        def call(inputs, template, grid, threadgroup, output_shapes, output_dtypes):
            made.append(name)
            given = [np.array(a) for a in inputs]
            out = [np.full(s, 7, NP_TYPES[d]) for s, d in zip(output_shapes, output_dtypes)]
            params = ', '.join([*(f'const {C_TYPES[a.dtype]}* {n}' for n, a in zip(ins, inputs)),
                                *(f'{C_TYPES[d]}* {n}' for n, d in zip(outs, output_dtypes))])
            using = ''.join(f'using {n} = {C_TYPES[d]};' for n, d in template)
            code = f"""#include "{above}"
{header}
static void kernel({params}) {{ {using}
{source}
}}
#undef threadgroup
extern "C" void run(int x_, int y_, int n_, {params}) {{
    launch(x_, y_, n_, [=] {{ kernel({", ".join([*ins, *outs])}); }});
}}"""
            so = above.with_name(f'{hashlib.sha256(code.encode()).hexdigest()}.so') # the same source in another test is the same kernel
            if not so.exists():
                so.with_suffix('.cpp').write_text(code)
                subprocess.run(['g++', *OPTIONS, '-shared', str(so.with_suffix('.cpp')), '-o', str(so)], check=True)
            assert not grid[0] % threadgroup[0]
            ctypes.CDLL(str(so)).run(grid[0]//threadgroup[0], grid[1], threadgroup[0], *(a.ctypes.data_as(ctypes.c_void_p) for a in given+out))
            return [mx.array(a) for a in out]
        return call
    return make

@pytest.fixture(params=['cuda', 'metal'])
def on_cpu(request, headers, monkeypatch):
    "The names of the kernels that were run"
    made, language = [], dict(cuda=CUDA, metal=METAL)[request.param]
    monkeypatch.setattr(tk, '_CUDA_HERE', language is CUDA)
    monkeypatch.setattr(mx.fast, f'{request.param}_kernel', on_threads(language, headers[language], made))
    monkeypatch.setattr(mx, 'default_device', lambda: mx.gpu)
    monkeypatch.setattr(mx, 'compile', lambda f: f)
    made_once = tk._kernel, tk._kernels, tk._encoder, tk._appender, tk._attention, tk._unpacker
    for f in made_once: f.cache_clear()
    yield made
    for f in made_once: f.cache_clear()

def statistics(r, G, D, mean=1):
    return KeyPrecondition(mean*r.standard_normal((G, 1, D)).astype(np.float32), np.exp(.3*r.standard_normal((G, 1, D))).astype(np.float32))

CASES = [('cuda', 1, 128, 2, 2, 4, 4, 140, 'float32'), ('cuda', 1, 64, 1, 8, 8, 5, 1, 'float32'), ('metal', 2, 64, 2, 3, 3, 2, 130, 'float32'),
         ('metal', 1, 128, 1, 2, 4, 4, 140, 'float16'), ('cuda', 1, 128, 2, 4, 4, 4, 140, 'float16'), ('cuda', 2, 64, 1, 3, 3, 2, 75, 'float16'),
         ('cuda', 1, 64, 1, 8, 8, 5, 1, 'float16'), ('cuda', 1, 256, 1, 2, 6, 3, 40, 'float16')]

@pytest.mark.parametrize('on_cpu, B, D, G, N, kb, vb, T, dtype', CASES, indirect=['on_cpu'])
def test_kernels_do_what_the_composed_form_does(B, D, G, N, kb, vb, T, dtype, on_cpu, monkeypatch):
    r = np.random.default_rng(D+kb)
    k, v = (mx.array(r.standard_normal((B, G, T, D)).astype(np.float32)) for _ in 'kv')
    q = mx.array(r.standard_normal((B, G*N, 1, D)).astype(dtype))
    def run(fused):
        monkeypatch.setattr(tk, '_FUSED', False)
        c = TurboQuantKVCache.of(turned(f'tq{kb}', 42, statistics(np.random.default_rng(0), G, D)),
                                 turned(f'tq{vb}', 7, statistics(np.random.default_rng(1), G, D, 0) if N > 1 else None))
        if T > 1: c.update_and_fetch(k[:, :, :-2], v[:, :, :-2])
        monkeypatch.setattr(tk, '_FUSED', fused)
        for t in range(max(T-2, 0), T): stored = c.update_and_fetch(k[:, :, t:t+1], v[:, :, t:t+1])
        assert c.offset == T and bool(c.newest) == (fused and T > 1)
        return c, _attend(q if fused else q.astype(mx.float32), *stored, scale=D**-.5)
    (a, x), (b, y) = run(True), run(False)
    tensor = tk._CUDA_HERE and dtype == 'float16'
    stored = ['append']*2 if T > 1 else ['encode']
    assert [n.split('_')[1] for n in on_cpu] == [*stored, 'tensor' if tensor else 'partial', 'merge']
    assert abs(x-y).max() < (1e-4 if dtype == 'float32' else 1e-3)*max(1, abs(y).max().item())
    for p, o, bits in ((a.keys, b.keys, kb), (a.values, b.values, vb)):
        assert (unpacked(np.array(p[0][:, :, max(T-2, 0):T]), bits) == unpacked(np.array(o[0][:, :, max(T-2, 0):T]), bits)).mean() > .98
        assert abs(np.array(p[1])/np.maximum(np.array(o[1]), 1e-6)-1)[:, :, max(T-2, 0):T].max() < .01

def test_a_prompt_is_stored_as_its_tokens_are(on_cpu, monkeypatch):
    k, v = mx.random.normal((2, 2, 2, 5, 64))
    def stored(fused):
        monkeypatch.setattr(tk, '_FUSED', fused)
        c = TurboQuantKVCache.of(*(turned(f'tq{n}', 42, statistics(np.random.default_rng(n), 2, 64)) for n in (4, 3)))
        c.update_and_fetch(k, v)
        return [unpacked(np.array(arrays[0][:, :, :5]), n) for arrays, n in ((c.keys, 4), (c.values, 3))]
    for x, y in zip(stored(True), stored(False)): assert (x == y).mean() > .98
    assert [n.split('_')[1] for n in on_cpu] == ['encode']

@pytest.mark.parametrize('on_cpu, bits, D', [('cuda', 4, 128), ('cuda', 3, 64), ('metal', 4, 64), ('metal', 8, 128), ('cuda', 2, 64)],
                         indirect=['on_cpu'])
def test_unpacking_in_one_pass(bits, D, on_cpu, monkeypatch):
    monkeypatch.setattr(tk, '_FUSED', True)
    c, (k, v) = TurboQuantKVCache(D, bits), mx.random.normal((2, 1, 2, 20, D)).astype(mx.float16)
    keys, _ = c.update_and_fetch(k, v)
    one = keys.dense()
    assert on_cpu[-1].startswith('turbo_dense')
    monkeypatch.setattr(tk, '_FUSED', False)
    assert mx.array_equal(one, keys.dense()) and one.shape == (1, 2, 20, D)

@pytest.mark.parametrize('on_cpu', ['cuda'], indirect=True)
@pytest.mark.parametrize('dtype, name', [(mx.float32, '_96'), (mx.float16, 'tensor')])
def test_other_stretches(dtype, name, on_cpu, monkeypatch):
    monkeypatch.setattr(tk, '_STRETCHES', ((0, 64), (100, 96)))
    monkeypatch.setattr(tk, '_BLOCKS', 3)
    c, (k, v, q) = TurboQuantKVCache(64, 2), mx.random.normal((3, 1, 1, 150, 64))
    stored = c.update_and_fetch(k, v)
    monkeypatch.setattr(tk, '_FUSED', True)
    got = _attend(q[:, :, :1].astype(dtype), *stored, scale=.125)
    monkeypatch.setattr(tk, '_FUSED', False)
    assert abs(got-_attend(q[:, :, :1], *c.keys_and_values(), scale=.125)).max() < (1e-4 if dtype == mx.float32 else 1e-3)
    assert name in on_cpu[0]

@pytest.mark.parametrize('on_cpu', ['cuda'], indirect=True)
@pytest.mark.parametrize('far', [1e-4, 3e3])
def test_scales_that_are_far_apart(far, on_cpu, monkeypatch):
    r = np.random.default_rng(0)
    k, v = (mx.array(r.standard_normal((1, 1, 90, 64)).astype(np.float32)*np.where(np.arange(90) % 7, 1, a)[:, None]) for a in (1, far))
    q, c = mx.array(3*r.standard_normal((1, 2, 1, 64)).astype(np.float16)), TurboQuantKVCache(64, 4)
    stored = c.update_and_fetch(k.astype(mx.float32), v.astype(mx.float32))
    want = _attend(q.astype(mx.float32), *stored, scale=.125)
    monkeypatch.setattr(tk, '_FUSED', True)
    assert abs(_attend(q, *stored, scale=.125)-want).max() < 2e-3*abs(want).max()

@pytest.mark.parametrize('D, G, H', [(80, 1, 4), (128, 1, 16), (256, 1, 8)])
def test_heads_that_the_kernels_are_not_made_for(D, G, H, monkeypatch):
    monkeypatch.setattr(tk, '_FUSED', True)
    monkeypatch.setattr(mx, 'default_device', lambda: mx.gpu)
    assert not tk.kernels_fit(D, G, H) and tk.kernels_fit(128, G, 8)
