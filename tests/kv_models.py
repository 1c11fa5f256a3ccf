"Models, prompts and texts that the tests of caches share"
import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import BatchGenerator, generate_step

from optiq.backends.torch import TorchBackend
from optiq.kv.cache import mixed_caches
from optiq.kv.config import read_kv_config
from optiq.kv.layout import kv_layers
from optiq.material.tiny import tiny
from optiq.models import Checkpoint

SHAPES = [(64, '4g64', '3g32'), (256, '3g64', '5g128'), (128, '6g64', 'mxfp4'), (96, '2g32', 'as-is')]

@pytest.fixture(scope='session')
def folder(tmp_path_factory): return tiny('qwen3', tmp_path_factory.mktemp('kv')/'m', shape=dict(num_hidden_layers=3), dtype='float32')

@pytest.fixture(scope='session')
def backend(folder): return TorchBackend(Checkpoint(folder))

@pytest.fixture(scope='session')
def tokens(): return np.random.default_rng(0).integers(20, 500, (2, 24)).astype(np.int32)

@pytest.fixture(scope='session')
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp('text')/'t.txt'
    words, r = 'the river was low that summer so the ferry waited until the evening tide'.split(), np.random.default_rng(3)
    file.write_text('\n'.join(' '.join(r.permutation(words*3))+f' {i}' for i in range(60)))
    return str(file)

@pytest.fixture(scope='session', params=SHAPES, ids=str)
def served(request, tmp_path_factory):
    "A float32 model of a head width, its config, and prompts"
    dim, keys, values = request.param
    shape = dict(num_hidden_layers=2, head_dim=dim)
    model = Checkpoint(tiny('qwen3', tmp_path_factory.mktemp('served')/'m', shape=shape, dtype='float32')).load()
    rows = [dict(layer=l.index, heads=l.heads, key_dim=l.key_dim, value_dim=l.value_dim, keys=keys, values=values) for l in kv_layers(model)]
    config = dict(optiq='kv_config', version=1, model='tiny', layers=rows)
    ids = np.random.default_rng(1).integers(20, 500, 96)
    return model, config, [ids[:n].tolist() for n in (40, 23, 5)], mx.array(ids)[None]

def unpacked(words, bits): # numpy (…, d·bits/32) uint32 ▸ (…, d)
    "The codes in a stream of bits, one bit at a time"
    stream = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=-1, bitorder='little')
    return stream.reshape(*words.shape[:-1], -1, bits) @ 2**np.arange(bits)

def run(model, prompt, caches, n=10):
    return [int(t) for t, _ in generate_step(mx.array(prompt), model, max_tokens=n, prompt_cache=caches)]

def caches_of(served): return mixed_caches(served[0], read_kv_config(served[1], served[0]))

def run_together(model, prompts, n):
    "What a batch writes after each of its prompts, n tokens each"
    generator, got = BatchGenerator(model, max_tokens=n), {}
    ids = generator.insert(prompts, [n]*len(prompts))
    for _ in range(n+100):
        for r in [x for part in generator.next() for x in part or []]:
            if hasattr(r, 'token'): got.setdefault(r.uid, []).append(r.token)
    return [got[i] for i in ids]
